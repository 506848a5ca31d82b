"""Rings of frames, and an engine by hand.

A network has two ways for packets. Packets of guests go through the packet threads, by relays or by the
engine of the uplink "tun". The engine by hand is for single packets of this program: `process_tx_packet`,
`process_rx_packet`, `nat_stats`, `conntrack_stats`, `connection_count` and `expire_connections` are about
this engine alone, whether the network runs or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guestnet.api.guests import GuestMethods
from guestnet.model.stats import ConnTrackStats, NatStats

if TYPE_CHECKING:
    from guestnet.datapath.network_datapath import NetworkDatapath
    from guestnet.nat.engine import NatResult, PacketPool, Ring


class RingMethods(GuestMethods):
    """Rings of frames, and an engine by hand."""

    _datapath: NetworkDatapath | None

    @property
    def datapath(self) -> NetworkDatapath:
        """Pool and rings, by which this program sends and receives as its guests, and an engine by hand.

        `DatapathPoller.poll_once(network)` polls it.
        """
        if self._datapath is None:
            from guestnet.datapath.network_datapath import NetworkDatapath

            self._datapath = NetworkDatapath(self)
        return self._datapath

    @property
    def packet_pool(self) -> PacketPool:
        """The buffers of `tx_ring` and `rx_ring`."""
        return self.datapath.packet_pool

    @property
    def tx_ring(self) -> Ring:
        """Buffers with frames from guests: what is put here leaves by the uplink."""
        return self.datapath.tx_ring

    @property
    def rx_ring(self) -> Ring:
        """Buffers with frames for guests. Whoever takes one frees it."""
        return self.datapath.rx_ring

    def process_tx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a frame from a guest in place, by the engine by hand (`datapath.engine`).

        Packets of a running network's guests do not go through this engine.

        Args:
            frame: A writable buffer.
            now: The time in seconds. None asks the clock.

        Returns:
            What became of the packet.
        """
        return self.datapath.process_tx_packet(frame, now=now)

    def process_rx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a frame for a guest in place, by the engine by hand (`datapath.engine`).

        Args:
            frame: A writable buffer.
            now: The time in seconds. None asks the clock.

        Returns:
            What became of the packet.
        """
        return self.datapath.process_rx_packet(frame, now=now)

    def nat_stats(self) -> NatStats:
        """What the engine by hand did. `uplink_nat_stats` is about the engine of the uplink "tun".

        Returns:
            The counters.
        """
        return self.datapath.nat_stats()

    def conntrack_stats(self) -> ConnTrackStats:
        """What the engine by hand holds. `uplink_conntrack_stats` is about the engine of the uplink "tun".

        Returns:
            The counters.
        """
        return self.datapath.conntrack_stats()

    @property
    def connection_count(self) -> int:
        """How many connections the engine by hand tracks, as `conntrack_stats().connections`.

        `stats().connections` counts those of the guests of a running network.
        """
        return 0 if self._datapath is None else self._datapath.connection_count

    def expire_connections(self) -> int:
        """Ends connections of the engine by hand whose timeout has passed.

        Those of a running network end by themselves.

        Returns:
            How many ended.
        """
        return 0 if self._datapath is None else self._datapath.expire_connections()
