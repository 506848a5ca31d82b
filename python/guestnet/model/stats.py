"""Counters and records of a network: values that can be kept, printed and compared."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Self

from guestnet.model.frozen import FrozenMapping
from guestnet.model.frozen_record import FrozenRecord


class NetworkStats(FrozenRecord, kw_only=False):
    """The counters of a network, an endpoint or a worker since the network was started.

    Frames and bytes are counted at the guests' side. `drops` has a count for each reason, `io` the counters
    of the packet threads. Two snapshots can be subtracted.

    Example:
        >>> earlier, later = NetworkStats(flows_opened=2), NetworkStats(flows_opened=5, flows_closed=1)
        >>> later.connections, (later - earlier).flows_opened
        (4, 3)
    """

    rx_frames: int = 0
    """Frames from guests."""
    rx_bytes: int = 0
    tx_frames: int = 0
    """Frames to guests."""
    tx_bytes: int = 0
    flows_opened: int = 0
    flows_closed: int = 0
    retransmits: int = 0
    """TCP segments sent to guests again."""
    icmp_errors: int = 0
    """ICMP errors sent to guests."""
    dns_hits: int = 0
    """DNS queries answered from the forwarder's cache."""
    dns_misses: int = 0
    """Other DNS queries."""
    dns_asked: int = 0
    """Those of them that were asked of name servers at once; the rest asked the service or was refused."""
    dns_refused: int = 0
    """DNS queries refused because their guest had too many outstanding."""
    dns_unanswered: int = 0
    """DNS queries that no name server responded to."""
    drops: Mapping[str, int] = FrozenMapping({})
    io: Mapping[str, Any] = FrozenMapping({})

    @classmethod
    def from_native(cls, values: Mapping[str, Any]) -> NetworkStats:
        """Makes a snapshot from what `guestnet._native` returns.

        Args:
            values: The counters by name.

        Returns:
            The snapshot.
        """
        return cls(**values)

    @property
    def connections(self) -> int:
        """How many flows are open."""
        return self.flows_opened - self.flows_closed

    @property
    def dropped(self) -> int:
        """The sum of all drops."""
        return sum(self.drops.values())

    def __sub__(self, earlier: NetworkStats) -> NetworkStats:
        """What was counted since `earlier`. A value that can fall (open sockets) is 0 when it fell."""
        return NetworkStats(
            **{name: _less(getattr(self, name), getattr(earlier, name)) for name in self._fields}
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns plain dictionaries, for JSON.

        Returns:
            The counters by name.
        """
        return {name: _plain(getattr(self, name)) for name in self._fields}


BATCH_BUCKETS = 8
"""Sizes that a histogram of batches tells apart: 0, 1, then twice as many each, 64 and more the last."""


class _Subtractable(FrozenRecord):
    """Snapshots that can be subtracted. A value that can fall is 0 when it fell."""

    def __sub__(self, earlier: Self) -> Self:
        return type(self)(**{n: _less(getattr(self, n), getattr(earlier, n)) for n in self._fields})

    def as_dict(self) -> dict[str, Any]:
        """Returns plain dictionaries, for JSON.

        Returns:
            The counters by name.
        """
        return {name: _plain(getattr(self, name)) for name in self._fields}


class NatStats(_Subtractable, kw_only=False):
    """What a NatEngine did since it was made.

    Example:
        >>> NatStats(outbound=2, inbound=1).translated
        3
    """

    outbound: int = 0
    """Packets translated on the way out."""
    inbound: int = 0
    """Packets translated on the way in."""
    hairpinned: int = 0
    passed: int = 0
    """Packets that do not concern the engine."""
    fragmented: int = 0
    held: int = 0
    too_big: int = 0
    icmp_errors: int = 0
    """ICMP errors made."""
    drops: Mapping[str, int] = FrozenMapping({})

    @property
    def translated(self) -> int:
        """How many packets were translated, in both directions."""
        return self.outbound + self.inbound + self.hairpinned

    @property
    def dropped(self) -> int:
        """The sum of all drops."""
        return sum(self.drops.values())


class ConnTrackStats(_Subtractable, kw_only=False):
    """What a NatEngine holds at one moment, and how its table was used since it was made.

    Example:
        >>> from guestnet import NatEngine
        >>> NatEngine("203.0.113.1").conntrack().connections
        0
    """

    connections: int = 0
    mappings: int = 0
    """Internal addresses and ports that have an external port."""
    ports: int = 0
    """External ports in use, resting ones included."""
    capacity: int = 0
    memory: int = 0
    """Bytes of records and indexes."""
    created: int = 0
    expired: int = 0
    hits: int = 0
    """Packets that found their connection."""
    misses: int = 0


class DatapathStats(_Subtractable, kw_only=False):
    """What a datapath moved, in frames and bytes as its rings carry them.

    Example:
        >>> DatapathStats(batches=4, batched=168).batched / 4
        42.0
    """

    tx_packets: int = 0
    """From guests."""
    tx_bytes: int = 0
    tx_errors: int = 0
    """Frames that were refused, had an index that was not held, or had no destination."""
    tx_passed: int = 0
    """Frames that passed untranslated."""
    rx_packets: int = 0
    """To guests."""
    rx_bytes: int = 0
    rx_errors: int = 0
    rx_passed: int = 0
    nat_outbound: int = 0
    nat_inbound: int = 0
    nat_expired: int = 0
    polls: int = 0
    busy_polls: int = 0
    """Polls that found work."""
    batches: int = 0
    batched: int = 0
    """Packets in those; `batched / batches` is the mean size."""
    largest_batch: int = 0
    batch_histogram: tuple[int, ...] = (0,) * BATCH_BUCKETS
    """Batches by size: 0, 1, 2-3, 4-7, 8-15, 16-31, 32-63, 64 and more packets."""


def _less(now: Any, then: Any) -> Any:
    if isinstance(now, Mapping):
        return {key: _less(value, then.get(key, 0)) for key, value in now.items()}
    if isinstance(now, list | tuple):
        return type(now)(_less(a, b) for a, b in zip(now, then or [0] * len(now), strict=True))
    return max(0, now - then)


def _plain(value: Any) -> Any:
    return {key: _plain(v) for key, v in value.items()} if isinstance(value, Mapping) else value


class LeaseRecord(FrozenRecord, kw_only=False):
    """An address that a guest holds by DHCP.

    Example:
        >>> from guestnet import NatNetwork
        >>> NatNetwork().services.dhcp.leases()
        []
    """

    endpoint_id: str
    mac: str
    """As `Endpoint.mac`."""
    ip: IPv4Address | IPv6Address
    hostname: str | None
    """The name that the client gave itself, or was given."""
    expires: float
    """Seconds since the epoch, as of `time.time()`; infinite for a lease without end."""


class MappingRecord(FrozenRecord, kw_only=False):
    """A port of the host that a guest opened for itself, by PCP or NAT-PMP.

    Example:
        >>> from guestnet import NatNetwork
        >>> NatNetwork(pcp_ports=(40000, 40999)).services.pcp.mappings()
        []
    """

    endpoint_id: str
    address: IPv4Address
    """The guest's."""
    protocol: str
    """ "tcp" or "udp"."""
    internal_port: int
    """Of the guest."""
    external_port: int
    """Of the host."""
    expires: float
    """Seconds since the epoch, as of `time.time()`."""


class FlowRecord(FrozenRecord, kw_only=False):
    """One flow that the network carries now.

    Example:
        >>> from guestnet import NatNetwork
        >>> with NatNetwork() as network:
        ...     network.flows()
        []
    """

    id: str
    """Its id, unique for the life of the network; `FlowOpened.flow` has the same."""
    endpoint: str | None
    """The id of the guest, None when it has just left."""
    protocol: str
    """ "tcp", "udp" or "icmp"."""
    guest: tuple[IPv4Address | IPv6Address, int]
    """The guest's address and port (echo: identifier)."""
    remote: tuple[IPv4Address | IPv6Address, int]
    """The other side, as the guest names it."""
    inbound: bool
    """Whether the outside opened it, through a forward."""
    state: str
    bytes_out: int
    """Payload from the guest."""
    bytes_in: int
    """Payload to the guest."""
    age: float
    """Seconds since it was opened."""
    idle: float
    """Seconds since it last carried data."""
