"""The datapath by hand: a packet pool, a ring each way, the NAT engine between them, and a poller that moves
frames from one to the other.

    guest's frame -> packet_pool -> tx_ring -> poll_once -> NatEngine -> uplink
    uplink -> poll_once -> NatEngine -> packet_pool -> rx_ring -> guest's frame

The packet threads of a `NatNetwork` do this in Rust. Here each step is a call, for programs that bring their
own guests or their own outside, and for trying things out. Buffers on the rings hold Ethernet frames.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from guestnet.config import PollingStrategy
from guestnet.errors import ConfigError
from guestnet.ipam import generate_mac, parse_mac
from guestnet.nat import NatDirection, NatEngine, NatEngineConfig, NatResult, PacketPool, Ring
from guestnet.stats import ConnTrackStats, DatapathStats, NatStats

ETHERNET = 14
_IPV4 = b"\x08\x00"
_BATCH_HIGHEST = 65536
_PACKET_LONGEST = 65535


class Uplink(Protocol):
    """How translated packets leave, and answers come in: IP packets without a link header."""

    def send(self, packet: bytes) -> bool:
        """Sends one; False when it cannot be sent now."""

    def receive(self, count: int) -> list[bytes]:
        """Up to `count` packets that have come, without waiting."""

    def wait(self, seconds: float) -> None:
        """Returns when a packet has come, or after this time."""


class MemoryUplink:
    """An outside in memory: `sent` is what left, `deliver` is what comes."""

    def __init__(self) -> None:
        self.sent: deque[bytes] = deque()
        self._coming: deque[bytes] = deque()

    def deliver(self, packet: bytes) -> None:
        """Lets a packet come from outside."""
        self._coming.append(bytes(packet))

    def send(self, packet: bytes) -> bool:
        self.sent.append(packet)
        return True

    def receive(self, count: int) -> list[bytes]:
        return [self._coming.popleft() for _ in range(min(count, len(self._coming)))]

    def wait(self, seconds: float) -> None:
        if not self._coming:
            time.sleep(seconds)


class FdUplink:
    """A descriptor that gives and takes a packet a call: a TUN device (IFF_NO_PI) or a datagram socket. It is
    duplicated: close yours when you like."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        os.set_blocking(self._fd, False)

    def fileno(self) -> int:
        """The descriptor in use."""
        return self._fd

    def send(self, packet: bytes) -> bool:
        try:
            return os.write(self._fd, packet) == len(packet)
        except OSError:
            return False

    def receive(self, count: int) -> list[bytes]:
        packets = []
        for _ in range(count):
            try:
                packet = os.read(self._fd, _PACKET_LONGEST)
            except BlockingIOError:
                break
            if not packet:
                break
            packets.append(packet)
        return packets

    def wait(self, seconds: float) -> None:
        select.select([self._fd], [], [], seconds)

    def close(self) -> None:
        """Closes it; may be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Datapath:
    """Pool, rings, engine and uplink. One thread polls it; others may use the rings and the pool."""

    def __init__(
        self,
        config: NatEngineConfig | NatEngine,
        *,
        uplink: Uplink | None = None,
        pool: PacketPool | None = None,
        ring_capacity: int = 1024,
        gateway_mac: str | bytes | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.engine = config if isinstance(config, NatEngine) else NatEngine(config, clock=clock)
        self.uplink: Uplink = MemoryUplink() if uplink is None else uplink
        self.packet_pool = PacketPool() if pool is None else pool
        self.tx_ring = Ring(ring_capacity)
        """Buffers with frames from guests."""
        self.rx_ring = Ring(ring_capacity)
        """Buffers with frames to guests; who takes one frees it."""
        self.gateway_mac = parse_mac(generate_mac() if gateway_mac is None else gateway_mac)
        self._macs: dict[bytes, bytes] = {}
        self._stats = DatapathStats()

    def add_guest(self, ip: Any, mac: str | bytes) -> None:
        """Says which hardware address a guest's address has; otherwise it is learned from its frames."""
        self._macs[ip.packed if hasattr(ip, "packed") else bytes(map(int, str(ip).split(".")))] = parse_mac(
            mac
        )

    # ---- packet by packet -------------------------------------------------------------------------------

    def process_tx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a guest's frame in place, in any writable buffer."""
        return self._process(frame, NatDirection.OUTBOUND, now)

    def process_rx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a frame for a guest in place, in any writable buffer."""
        return self._process(frame, NatDirection.INBOUND, now)

    def _process(self, frame: Any, direction: NatDirection, now: float | None) -> NatResult:
        view = memoryview(frame).cast("B")
        if len(view) >= ETHERNET and view[12:ETHERNET] != _IPV4:
            result = NatResult.PASS_THROUGH
        else:
            result = self.engine.translate(view, direction, offset=min(len(view), ETHERNET), now=now)
        if direction is NatDirection.OUTBOUND:
            self._add(tx_packets=1, tx_bytes=len(view), tx_errors=result.is_dropped, nat_outbound=result.send)
        else:
            self._add(rx_packets=1, rx_bytes=len(view), rx_errors=result.is_dropped, nat_inbound=result.send)
        return result

    # ---- in batches -------------------------------------------------------------------------------------

    def poll_tx(self, count: int) -> int:
        """Moves up to `count` frames from `tx_ring` through the engine to the uplink; returns how many. Their
        buffers are freed, whatever becomes of them."""
        indices = self.tx_ring.dequeue_batch(count)
        if not indices:
            return 0
        frames = [bytearray(self.packet_pool.get(i)) for i in indices]
        for index in indices:
            self.packet_pool.free(index)
        packets = [memoryview(f)[ETHERNET:] for f in frames if len(f) > ETHERNET and f[12:ETHERNET] == _IPV4]
        for frame in frames:
            if len(frame) >= ETHERNET + 20 and frame[12:ETHERNET] == _IPV4:
                self._macs[bytes(frame[26:30])] = bytes(frame[6:12])
        results = self.engine.translate_batch(packets, NatDirection.OUTBOUND)
        errors = translated = 0
        for packet, result in zip(packets, results, strict=True):
            translated += result.send
            if result is NatResult.TRANSLATED:
                errors += not self.uplink.send(bytes(packet))
            elif result is NatResult.HAIRPINNED:
                self._to_guest(bytes(packet))
            errors += result.is_dropped
        self._flush()
        self._add(
            tx_packets=len(frames),
            tx_bytes=sum(map(len, frames)),
            tx_errors=errors,
            nat_outbound=translated,
            batches=1,
            batched=len(frames),
        )
        self._largest(len(frames))
        return len(frames)

    def poll_rx(self, count: int) -> int:
        """Moves up to `count` packets from the uplink through the engine to `rx_ring`; returns how many."""
        packets = [bytearray(p) for p in self.uplink.receive(count)]
        if not packets:
            return 0
        results = self.engine.translate_batch(packets, NatDirection.INBOUND)
        errors = 0
        for packet, result in zip(packets, results, strict=True):
            if result.send:
                errors += not self._to_guest(bytes(packet))
            errors += result.is_dropped
        self._flush()
        self._add(
            rx_packets=len(packets),
            rx_bytes=sum(map(len, packets)),
            rx_errors=errors,
            nat_inbound=sum(r.send for r in results),
            batches=1,
            batched=len(packets),
        )
        self._largest(len(packets))
        return len(packets)

    def _flush(self) -> None:
        """Sends what the engine itself has to say."""
        for direction, packet in self.engine.output():
            if direction is NatDirection.OUTBOUND:
                self.uplink.send(packet)
            else:
                self._to_guest(packet)

    def _to_guest(self, packet: bytes) -> bool:
        mac = self._macs.get(packet[16:20])
        if mac is None:
            return False
        if len(packet) + ETHERNET > self.packet_pool.buffer_size:
            return False
        index = self.packet_pool.put(mac + self.gateway_mac + _IPV4 + packet)
        if index is None:
            return False
        if not self.rx_ring.enqueue(index):
            self.packet_pool.free(index)
            return False
        return True

    def maintenance(self) -> None:
        """What has to be done now and then: expiry, and what the engine has to say of it."""
        self.expire_connections()
        self._flush()

    def expire_connections(self) -> int:
        """Ends connections whose time is over; returns how many."""
        gone = self.engine.expire_connections()
        self._add(nat_expired=gone)
        return gone

    # ---- looking ----------------------------------------------------------------------------------------

    @property
    def connection_count(self) -> int:
        """Connections tracked now."""
        return self.engine.connection_count

    def stats(self) -> DatapathStats:
        """What was moved so far."""
        return self._stats

    def nat_stats(self) -> NatStats:
        """What the engine did so far."""
        return self.engine.stats()

    def conntrack_stats(self) -> ConnTrackStats:
        """What the engine holds now."""
        return self.engine.conntrack()

    def record_poll(self, work: bool) -> None:
        """Counts a poll, and whether it found work."""
        self._add(polls=1, busy_polls=work)

    def _add(self, **more: int) -> None:
        s = self._stats
        self._stats = replace(s, **{name: getattr(s, name) + int(n) for name, n in more.items()})

    def _largest(self, size: int) -> None:
        if size > self._stats.largest_batch:
            self._stats = replace(self._stats, largest_batch=size)

    def __repr__(self) -> str:
        return f"<Datapath, {len(self.tx_ring)} frames out, {len(self.rx_ring)} in, {self.engine!r}>"


class HasDatapath(Protocol):
    """A network that has one."""

    @property
    def datapath(self) -> Datapath: ...


class DatapathPoller:
    """Moves frames when it is called, and decides what to do when there are none."""

    def __init__(
        self,
        batch_size: int = 64,
        strategy: PollingStrategy | str = PollingStrategy.ADAPTIVE,
        max_spins: int = 1000,
    ) -> None:
        if not 1 <= batch_size <= _BATCH_HIGHEST:
            raise ConfigError(f"The batch size {batch_size} is not between 1 and {_BATCH_HIGHEST}.")
        if max_spins < 0:
            raise ConfigError(f"max_spins {max_spins} is under 0: give how often to look before resting.")
        self.batch_size = batch_size
        self.strategy = PollingStrategy(strategy)
        self.max_spins = max_spins
        self.spins = 0
        """Polls without work since the last that found some."""

    def with_batch_size(self, size: int) -> DatapathPoller:
        """Another poller with this batch size."""
        return DatapathPoller(size, self.strategy, self.max_spins)

    def with_strategy(self, strategy: PollingStrategy | str) -> DatapathPoller:
        """Another poller with this strategy."""
        return DatapathPoller(self.batch_size, strategy, self.max_spins)

    def poll_once(self, network: Datapath | HasDatapath, *, patience: float = 0.01) -> bool:
        """One batch each way; True when there was any work. Without work: `busy` returns at once, `adaptive`
        lets others run after `max_spins` times, `event_driven` waits up to `patience` seconds for
        the uplink."""
        path = network if isinstance(network, Datapath) else network.datapath
        work = bool(path.poll_tx(self.batch_size)) | bool(path.poll_rx(self.batch_size))
        path.record_poll(work)
        if work:
            self.spins = 0
            return True
        self.spins += 1
        if self.strategy is PollingStrategy.EVENT_DRIVEN:
            path.uplink.wait(patience)
            self.spins = 0
        elif self.strategy is PollingStrategy.ADAPTIVE and self.spins > self.max_spins:
            time.sleep(0)
            self.spins = 0
        return False

    def __repr__(self) -> str:
        return f"DatapathPoller(batch_size={self.batch_size}, strategy={str(self.strategy)!r})"
