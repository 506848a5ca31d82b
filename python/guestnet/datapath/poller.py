"""The datapath step by step: a packet pool, a ring each way, the NAT engine between them, and a poller.

    guest's frame -> packet_pool -> tx_ring -> poll_once -> NatEngine -> uplink
    uplink -> poll_once -> NatEngine -> packet_pool -> rx_ring -> guest's frame

The packet threads of a `NatNetwork` do the same in Rust. Here each step is a call, for programs that bring
guests or an outside of their own. Buffers on the rings hold Ethernet frames.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from types import SimpleNamespace
from typing import Any, Protocol

from guestnet.errors import ConfigError
from guestnet.model.ipam import generate_mac, parse_mac
from guestnet.model.spec import PollingStrategy
from guestnet.model.stats import BATCH_BUCKETS, ConnTrackStats, DatapathStats, NatStats
from guestnet.model.values import choice, whole_number
from guestnet.nat.engine import NatDirection, NatEngine, NatEngineConfig, NatResult, PacketPool, Ring

ETHERNET = 14
_IPV4 = b"\x08\x00"
_BATCH_HIGHEST = 65536
_PACKET_LONGEST = 65535
_LEARNED_MOST = 4096


class _Prefixes:
    """Whether an address, as four bytes, is in one of some networks."""

    def __init__(self, networks: Iterable[IPv4Network | str]) -> None:
        found = map(IPv4Network, networks)
        self._pairs = [(int(n.network_address), int(n.netmask)) for n in found]

    def has(self, address: bytes) -> bool:
        value = int.from_bytes(address, "big")
        return any(value & mask == net for net, mask in self._pairs)


class Uplink(Protocol):
    """How translated packets leave, and how answers arrive: IP packets without a link header."""

    def send(self, packet: bytes) -> bool:
        """Sends a packet; False when it cannot be sent now."""

    def receive(self, count: int) -> list[bytes]:
        """Returns up to `count` packets that have arrived, without waiting."""

    def wait(self, seconds: float) -> None:
        """Returns when a packet has arrived, or after `seconds`."""


class MemoryUplink:
    """An outside in memory: `sent` has what left, and `deliver` lets a packet arrive."""

    def __init__(self) -> None:
        self.sent: deque[bytes] = deque()
        self._coming: deque[bytes] = deque()

    def deliver(self, packet: bytes) -> None:
        """Lets a packet arrive from the outside."""
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
    """A descriptor that carries one packet for each call: a TUN device (IFF_NO_PI) or a datagram socket.

    The descriptor is duplicated, so the caller may close its own.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        os.set_blocking(self._fd, False)

    def fileno(self) -> int:
        """Returns the descriptor in use."""
        return self._fd

    def send(self, packet: bytes) -> bool:
        try:
            return os.write(self._fd, packet) == len(packet)
        except OSError:
            return False

    def receive(self, count: int) -> list[bytes]:
        packets: list[bytes] = []
        for _ in range(count):
            try:
                packet = os.read(self._fd, _PACKET_LONGEST)
            except BlockingIOError:
                break
            except ConnectionRefusedError:
                continue  # an ICMP error about a packet that was sent
            except OSError:
                if packets:
                    break  # they are not to be lost; the error comes again
                raise
            if not packet:
                break
            packets.append(packet)
        return packets

    def wait(self, seconds: float) -> None:
        select.select([self._fd], [], [], seconds)

    def close(self) -> None:
        """Closes it. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Datapath:
    """A pool, rings, an engine and an uplink.

    One thread polls it; other threads may use the rings and the pool. What the engine translates goes on. So
    do packets of a guest to a destination of `no_nat`, their answers, and packets between guests, all of them
    untranslated. Everything else is counted as an error.

    Args:
        config: The settings of an engine, or an engine.
        uplink: How packets leave; in memory by default.
        pool: The buffers; 8192 by default.
        ring_capacity: The capacity of each ring; 4096 by default.
        gateway_mac: The MAC address of the gateway; random by default.
        clock: Returns nanoseconds, for the engine.

    Raises:
        ConfigError: A value is wrong.

    Example:
        >>> path = Datapath(NatEngineConfig("203.0.113.1", internal="192.168.64.0/24"))
        >>> path.add_guest("192.168.64.2", "02:00:5e:10:00:01")
        >>> header = "ffffffffffff 02005e100001 0800 4500001c0001000040113e1cc0a84002cb007109"
        >>> index = path.packet_pool.put(bytes.fromhex(header + "c350003500080000"))
        >>> path.tx_ring.enqueue(index)
        True
        >>> DatapathPoller().poll_once(path)
        True
        >>> [packet[12:16].hex() for packet in path.uplink.sent]
        ['cb007101']
    """

    def __init__(
        self,
        config: NatEngineConfig | NatEngine,
        *,
        uplink: Uplink | None = None,
        pool: PacketPool | None = None,
        ring_capacity: int | None = None,
        gateway_mac: str | bytes | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.engine = config if isinstance(config, NatEngine) else NatEngine(config, clock=clock)
        self.uplink: Uplink = MemoryUplink() if uplink is None else uplink
        self.packet_pool = PacketPool() if pool is None else pool
        self.tx_ring = Ring() if ring_capacity is None else Ring(ring_capacity)
        """Buffers with frames from guests."""
        self.rx_ring = Ring() if ring_capacity is None else Ring(ring_capacity)
        """Buffers with frames to guests; who takes one frees it."""
        self.gateway_mac = parse_mac(generate_mac() if gateway_mac is None else gateway_mac)
        self._internal = IPv4Network(self.engine.config.internal)
        self._inside = _Prefixes([self._internal])
        self._untranslated = _Prefixes(self.engine.config.no_nat)
        self._macs: dict[bytes, bytes] = {}
        """Hardware addresses by address."""
        self._given: set[bytes] = set()
        """The addresses that `add_guest` named; the others were learned."""
        self._counters = SimpleNamespace(**vars(DatapathStats()))
        self._counters.batch_histogram = [0] * BATCH_BUCKETS

    def add_guest(self, ip: IPv4Address | str, mac: str | bytes) -> None:
        """Sets the MAC address of a guest's address.

        Without this, the MAC is learned from the first frame of each address inside, for up to 4096
        addresses. What is set here overrides what frames say.

        Args:
            ip: The address of the guest.
            mac: Its MAC address.

        Raises:
            ConfigError: A value is wrong, or the address is not inside.
        """
        try:
            address = IPv4Address(ip)
        except AddressValueError:
            raise ConfigError(f"{ip!r} is not an IPv4 address: write one such as 192.168.64.2.") from None
        if address not in self._internal:
            raise ConfigError(
                f"{address} is not an address of a guest: choose one inside {self._internal}, "
                "or make the datapath with another internal network."
            )
        self._macs[address.packed] = parse_mac(mac)
        self._given.add(address.packed)

    # ---- packet by packet -------------------------------------------------------------------------------

    def process_tx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a frame from a guest in place.

        Args:
            frame: A writable buffer.
            now: The time in seconds. None asks the clock.

        Returns:
            What became of the packet.
        """
        result, length = self.engine.translate_frame(frame, NatDirection.OUTBOUND, now=now)
        counters = self._counters
        counters.tx_packets += 1
        counters.tx_bytes += length
        if result.send:
            counters.nat_outbound += 1
        elif result.is_dropped:
            counters.tx_errors += 1
        return result

    def process_rx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a frame for a guest in place.

        Args:
            frame: A writable buffer.
            now: The time in seconds. None asks the clock.

        Returns:
            What became of the packet.
        """
        result, length = self.engine.translate_frame(frame, NatDirection.INBOUND, now=now)
        counters = self._counters
        counters.rx_packets += 1
        counters.rx_bytes += length
        if result.send:
            counters.nat_inbound += 1
        elif result.is_dropped:
            counters.rx_errors += 1
        return result

    # ---- in batches -------------------------------------------------------------------------------------

    def poll_tx(self, count: int) -> int:
        """Moves frames from `tx_ring` through the engine to the uplink.

        Their buffers are freed in any case. An index that nobody holds is counted as an error.

        Args:
            count: How many frames to take at most.

        Returns:
            How many were taken.
        """
        indices = self.tx_ring.dequeue_batch(count)
        if not indices:
            return 0
        counters = self._counters
        taken = map(self.packet_pool.take, indices)
        frames = [bytearray(frame) for frame in taken if frame is not None]
        packets = [memoryview(f)[ETHERNET:] for f in frames if len(f) > ETHERNET and f[12:ETHERNET] == _IPV4]
        counters.tx_errors += len(indices) - len(packets)
        for frame in frames:
            if len(frame) >= ETHERNET + 20 and frame[12:ETHERNET] == _IPV4:
                self._learn(bytes(frame[26:30]), bytes(frame[6:12]))
        results = self.engine.translate_batch(packets, NatDirection.OUTBOUND)
        for packet, result in zip(packets, results, strict=True):
            counters.nat_outbound += result.send
            if result is NatResult.TRANSLATED:
                left = self.uplink.send(bytes(packet))
            elif result is NatResult.HAIRPINNED:
                left = self._to_guest(bytes(packet))
            elif result is NatResult.PASS_THROUGH:
                left = self._pass_out(bytes(packet))
                counters.tx_passed += left
            else:
                left = not result.is_dropped
            counters.tx_errors += not left
        self._flush()
        counters.tx_packets += len(frames)
        counters.tx_bytes += sum(map(len, frames))
        self._count_batch(len(indices))
        return len(indices)

    def poll_rx(self, count: int) -> int:
        """Moves packets from the uplink through the engine to `rx_ring`.

        Args:
            count: How many packets to take at most.

        Returns:
            How many were taken.
        """
        packets = [bytearray(p) for p in self.uplink.receive(count)]
        if not packets:
            return 0
        counters = self._counters
        results = self.engine.translate_batch(packets, NatDirection.INBOUND)
        for packet, result in zip(packets, results, strict=True):
            counters.nat_inbound += result.send
            if result.send:
                left = self._to_guest(bytes(packet))
            elif result is NatResult.PASS_THROUGH:
                left = self._pass_in(bytes(packet))
                counters.rx_passed += left
            else:
                left = not result.is_dropped
            counters.rx_errors += not left
        self._flush()
        counters.rx_packets += len(packets)
        counters.rx_bytes += sum(map(len, packets))
        self._count_batch(len(packets))
        return len(packets)

    def _pass_out(self, packet: bytes) -> bool:
        """A guest's packet that the engine leaves alone, to another guest or a destination of `no_nat`."""
        if packet[0] >> 4 != 4 or not self._inside.has(packet[12:16]):
            return False
        if self._inside.has(packet[16:20]):
            return self._to_guest(packet)
        return self._untranslated.has(packet[16:20]) and self.uplink.send(packet)

    def _pass_in(self, packet: bytes) -> bool:
        """A packet from outside that the engine leaves alone: an answer from a destination of `no_nat`."""
        known = packet[0] >> 4 == 4 and self._untranslated.has(packet[12:16])
        return known and self._inside.has(packet[16:20]) and self._to_guest(packet)

    def _flush(self) -> None:
        """Sends what the engine itself has to say."""
        for direction, packet in self.engine.output():
            if direction is NatDirection.OUTBOUND:
                self._counters.tx_errors += not self.uplink.send(packet)
            else:
                self._counters.rx_errors += not self._to_guest(packet)

    def _learn(self, ip: bytes, mac: bytes) -> None:
        room = len(self._macs) - len(self._given) < _LEARNED_MOST
        one_station = not mac[0] & 1 and mac != self.gateway_mac
        if ip not in self._macs and room and one_station and self._inside.has(ip):
            self._macs[ip] = mac

    def _mac_of(self, ip: bytes) -> bytes | None:
        """The hardware address of a guest."""
        return self._macs.get(ip)

    def _to_guest(self, packet: bytes) -> bool:
        mac = self._mac_of(packet[16:20])
        return mac is not None and self._to_ring(mac + self.gateway_mac + _IPV4 + packet)

    def _to_ring(self, frame: bytes) -> bool:
        """Puts a frame for a guest on `rx_ring`; False when there is no room for it."""
        if len(frame) > self.packet_pool.buffer_size:
            return False
        index = self.packet_pool.put(frame)
        if index is None:
            return False
        if not self.rx_ring.enqueue(index):
            self.packet_pool.free(index)
            return False
        return True

    def maintenance(self) -> None:
        """Does the expiry work that is due, and sends what the engine then has to send."""
        self.expire_connections()
        self._flush()

    def expire_connections(self) -> int:
        """Ends connections whose timeout has passed.

        Returns:
            How many ended.
        """
        gone = self.engine.expire_connections()
        self._counters.nat_expired += gone
        return gone

    # ---- looking ----------------------------------------------------------------------------------------

    @property
    def connection_count(self) -> int:
        """How many connections are tracked now."""
        return self.engine.connection_count

    def stats(self) -> DatapathStats:
        """Returns what was moved so far.

        Returns:
            The counters.
        """
        counters = vars(self._counters)
        return DatapathStats(**{**counters, "batch_histogram": tuple(counters["batch_histogram"])})

    def nat_stats(self) -> NatStats:
        """Returns what the engine did so far.

        Returns:
            The counters of the engine.
        """
        return self.engine.stats()

    def conntrack_stats(self) -> ConnTrackStats:
        """Returns what the engine holds now.

        Returns:
            The counters of the connection table.
        """
        return self.engine.conntrack()

    def record_poll(self, work: bool) -> None:
        """Counts a poll.

        Args:
            work: Whether it found work.
        """
        self._counters.polls += 1
        self._counters.busy_polls += work

    def _count_batch(self, size: int) -> None:
        counters = self._counters
        counters.batches += 1
        counters.batched += size
        counters.largest_batch = max(counters.largest_batch, size)
        counters.batch_histogram[min(size.bit_length(), BATCH_BUCKETS - 1)] += 1

    def __repr__(self) -> str:
        return f"<Datapath, {len(self.tx_ring)} frames out, {len(self.rx_ring)} in, {self.engine!r}>"


class HasDatapath(Protocol):
    """A network that has a datapath."""

    @property
    def datapath(self) -> Datapath: ...


class DatapathPoller:
    """Moves frames when it is called, and decides what to do when there are none.

    Args:
        batch_size: Frames of one batch, 1 to 65536.
        strategy: What to do without work: see `poll_once`.
        max_spins: Polls without work before `adaptive` lets other threads run.

    Raises:
        ConfigError: A value is wrong.

    Example:
        >>> poller = DatapathPoller(strategy="busy").with_batch_size(32)
        >>> poller.batch_size, poller.poll_once(Datapath("203.0.113.1"))
        (32, False)
    """

    def __init__(
        self,
        batch_size: int = 64,
        strategy: PollingStrategy | str = PollingStrategy.ADAPTIVE,
        max_spins: int = 1000,
    ) -> None:
        self.batch_size = whole_number("batch_size", batch_size, 1, _BATCH_HIGHEST)
        self.strategy = choice(PollingStrategy, "strategy", strategy)
        self.max_spins = whole_number("max_spins", max_spins, 0, 0xFFFFFFFF)
        self.spins = 0
        """Polls without work since the last that found some."""

    def with_batch_size(self, size: int) -> DatapathPoller:
        """Returns another poller with this batch size.

        Args:
            size: Frames of one batch.

        Returns:
            The new poller.

        Raises:
            ConfigError: The number is out of range.
        """
        return DatapathPoller(size, self.strategy, self.max_spins)

    def with_strategy(self, strategy: PollingStrategy | str) -> DatapathPoller:
        """Returns another poller with this strategy.

        Args:
            strategy: A `PollingStrategy`, or its value.

        Returns:
            The new poller.

        Raises:
            ConfigError: There is no such strategy.
        """
        return DatapathPoller(self.batch_size, strategy, self.max_spins)

    def poll_once(self, network: Datapath | HasDatapath, *, patience: float = 0.01) -> bool:
        """Moves one batch each way.

        Without work, `busy` returns at once, `adaptive` lets other threads run after `max_spins` calls, and
        `event_driven` waits for the uplink.

        Args:
            network: A `Datapath`, or a network that has one.
            patience: How long `event_driven` waits, in seconds.

        Returns:
            Whether there was work.

        Raises:
            TypeError: The object has no datapath.
        """
        path = network if isinstance(network, Datapath) else getattr(network, "datapath", None)
        if path is None:
            raise TypeError(f"{network!r} has no datapath: give a Datapath or a NatNetwork.")
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
