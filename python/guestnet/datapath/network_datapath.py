"""The rings of a network: guests of this program, one frame in each buffer.

    program -> packet_pool, tx_ring -> poll_once -> the network's packet thread -> uplink
    uplink -> the network's packet thread -> poll_once -> packet_pool, rx_ring -> program

A frame on `tx_ring` is sent for the endpoint that has its source address and no other attachment; the first
frame attaches the endpoint. While the network does not run, the rings work like those of a `Datapath`, with
an engine of their own and an outside in memory. `process_tx_packet` and `process_rx_packet` use that engine
at any time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Literal, Protocol

from guestnet.datapath.poller import ETHERNET, Datapath, MemoryUplink
from guestnet.errors import GuestnetError
from guestnet.model.ipam import parse_mac
from guestnet.nat.engine import NatEngineConfig
from guestnet.runtime.attachments import MemoryAttachment

if TYPE_CHECKING:
    from guestnet.model.spec import NatConfig
    from guestnet.runtime.endpoint import Endpoint

_IPV4, _ARP = b"\x08\x00", b"\x08\x06"
_EXTERNAL = (IPv4Address("100.64.0.2"), IPv4Address("198.18.0.2"))
"""Of the engine of a network that has no external address: the first that is not inside."""
_WAITING = 4096
"""Frames for guests that wait for a poll; the oldest go first."""


class _Arrivals(MemoryUplink):
    """Waits for frames of a network that runs, too."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: deque[bytes] = deque(maxlen=_WAITING)
        self._came = threading.Event()

    def came(self, frame: bytes) -> None:
        """A frame for a guest; called in the control thread."""
        self.frames.append(frame)
        self._came.set()

    def wait(self, seconds: float) -> None:
        if not self.frames and not self._coming:
            self._came.clear()
            if not self.frames:
                self._came.wait(seconds)


class RingNetwork(Protocol):
    """What the rings need of their network."""

    @property
    def config(self) -> NatConfig: ...

    @property
    def is_running(self) -> bool: ...

    def endpoint_at(self, address: IPv4Address, /) -> Endpoint | None: ...

    def attach(
        self, endpoint_id: str, kind: Literal["memory"], *, on_frame: Callable[[bytes], object]
    ) -> MemoryAttachment: ...


class NetworkDatapath(Datapath):
    """The pool and the rings of a network. One thread polls it; other threads may use the rings and the pool.

    `NatNetwork.datapath` makes it.

    Example:
        >>> from guestnet import DatapathPoller, NatNetwork
        >>> network = NatNetwork()
        >>> network.datapath.packet_pool.capacity
        8192
        >>> DatapathPoller().poll_once(network)
        False
    """

    def __init__(self, network: RingNetwork) -> None:
        config = network.config
        self._network = network
        self._arrivals = _Arrivals()
        self._guests: dict[str, MemoryAttachment] = {}
        engine = NatEngineConfig(
            external=config.external or next(a for a in _EXTERNAL if a not in config.subnet),
            internal=config.subnet,
            gateway=config.gateway,
            port_range=config.port_range,
            mtu_outside=config.mtu,
            mtu_inside=config.mtu,
        )
        super().__init__(
            engine.with_filtering(config.filtering), uplink=self._arrivals, gateway_mac=config.gateway_mac
        )

    def poll_tx(self, count: int) -> int:
        """Sends frames from `tx_ring` into the network.

        Their buffers are freed in any case. An index that nobody holds is counted as an error.

        Args:
            count: How many frames to take at most.

        Returns:
            How many were taken.
        """
        if not self._network.is_running:
            return super().poll_tx(count)
        indices = self.tx_ring.dequeue_batch(count)
        if not indices:
            return 0
        counters = self._counters
        for index in indices:
            frame = self.packet_pool.take(index)
            if frame is not None:
                counters.tx_packets += 1
                counters.tx_bytes += len(frame)
            sent = frame is not None and self._send(frame)
            counters.nat_outbound += sent
            counters.tx_errors += not sent
        self._count_batch(len(indices))
        return len(indices)

    def poll_rx(self, count: int) -> int:
        """Moves frames for guests to `rx_ring`.

        Args:
            count: How many frames to move at most.

        Returns:
            How many were moved.
        """
        if not self._network.is_running:
            return super().poll_rx(count)
        counters = self._counters
        moved = 0
        while moved < count and self._arrivals.frames:
            frame = self._arrivals.frames.popleft()
            moved += 1
            counters.rx_bytes += len(frame)
            arrived = self._to_ring(frame)
            counters.nat_inbound += arrived
            counters.rx_errors += not arrived
        if moved:
            counters.rx_packets += moved
            self._count_batch(moved)
        return moved

    def _mac_of(self, ip: bytes) -> bytes | None:
        """The hardware address of a guest: an endpoint's is its own, whatever frames say."""
        endpoint = self._network.endpoint_at(IPv4Address(ip))
        return super()._mac_of(ip) if endpoint is None else parse_mac(endpoint.mac)

    def _send(self, frame: bytes) -> bool:
        """Sends a frame as the guest that it is from; False when there is none, or it cannot send now."""
        try:
            guest = self._guest(frame)
            if guest is None:
                return False
            guest.send(frame)
        except GuestnetError:
            return False
        return True

    def _guest(self, frame: bytes) -> MemoryAttachment | None:
        """Who sends the frame: the endpoint with its source address, attached to the rings."""
        at = {_IPV4: ETHERNET + 12, _ARP: ETHERNET + 14}.get(frame[12:ETHERNET])
        if at is None or len(frame) < at + 4:
            return None
        endpoint = self._network.endpoint_at(IPv4Address(frame[at : at + 4]))
        if endpoint is None:
            return None
        if endpoint.attachment is None:
            self._guests[endpoint.id] = self._network.attach(
                endpoint.id, "memory", on_frame=self._arrivals.came
            )
        elif endpoint.attachment != "memory":
            return None
        return self._guests.get(endpoint.id)
