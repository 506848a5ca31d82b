"""The events of a network, one class for each kind.

Each event names its network, has the time, and a sequence number that counts the events of its network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import Any, ClassVar, Literal

from guestnet.model.frozen_record import FrozenRecord

Side = tuple[IPv4Address | IPv6Address, int]
"""An address and a port; for ICMP the port is 0, or the identifier of an echo."""


class NetworkEvent(FrozenRecord):
    """Something that happened in a network. `NatNetwork.on_event` and `NatNetwork.events` deliver it.

    Example:
        >>> event = GuestUp(endpoint="vm1", mac="02:00:00:00:00:01", ip=IPv4Address("192.168.64.2"))
        >>> event.kind, event.details()["ip"]
        ('guest_up', '192.168.64.2')
    """

    kind: ClassVar[str] = "event"
    """The name of the kind, as `guestnet up --json` prints it."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Fields that `details` leaves out when they are None."""

    network: str = ""
    """The name of the network."""
    time: float = 0.0
    """Seconds since the epoch, as of `time.time()`."""
    sequence: int = 0
    """Events of a network have ascending numbers, also across its starts. A gap is events of a kind that was
    not asked for, or events that were lost."""
    endpoint: str | None = None
    """The id of the endpoint that the event is about."""

    def details(self) -> dict[str, Any]:
        """The fields of this kind.

        Returns:
            The names of the fields, with values that JSON can carry.
        """
        values = {name: getattr(self, name) for name in self._fields if name not in _COMMON}
        return {
            name: plain(value)
            for name, value in values.items()
            if value is not None or name not in self.optional
        }

    def as_dict(self) -> dict[str, Any]:
        """All fields, and the kind.

        Returns:
            The names of the fields, with values that JSON can carry.
        """
        return {"kind": self.kind, **{name: getattr(self, name) for name in _COMMON}, **self.details()}


_COMMON = NetworkEvent._fields


def plain(value: Any) -> Any:
    """A value as JSON can carry it: addresses as text, tuples as lists."""
    if isinstance(value, IPv4Address | IPv6Address):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    return value


class GuestUp(NetworkEvent):
    """A guest is attached, or came to a listener and showed its MAC."""

    kind = "guest_up"
    optional = frozenset(("attachment", "listener"))
    mac: str
    ip: IPv4Address
    hostname: str | None = None
    attachment: str | None = None
    """The kind of its attachment, when it was attached by the program."""
    listener: str | None = None
    """The path of the listener that it came to."""


class GuestDown(NetworkEvent):
    """A guest was detached, disconnected, or removed."""

    kind = "guest_down"
    mac: str
    ip: IPv4Address
    reason: str


class LeaseTaken(NetworkEvent):
    """A guest took an address by DHCP."""

    kind = "lease"
    mac: str
    ip: IPv4Address | IPv6Address
    hostname: str | None = None


class LeaseReleased(NetworkEvent):
    """A guest gave an address back."""

    kind = "release"
    mac: str
    ip: IPv4Address | IPv6Address


class AddressSeen(NetworkEvent):
    """A guest uses another address of the subnet too, or one of the IPv6 prefix; in the mode "bridged", its
    first address."""

    kind = "address_seen"
    ip: IPv4Address | IPv6Address
    mac: str


class AddressChanged(NetworkEvent):
    """The network changed the address of an endpoint."""

    kind = "address_changed"
    ip: IPv4Address
    old: IPv4Address


class PortOpened(NetworkEvent):
    """A guest opened a port of the host by PCP or NAT-PMP."""

    kind = "port_opened"
    protocol: str
    port: int
    """Of the host."""
    guest: Side


class PortClosed(NetworkEvent):
    """A port that a guest had opened is closed."""

    kind = "port_closed"
    protocol: str
    port: int
    guest: Side


class LogMessage(NetworkEvent):
    """Something that the owner should know went wrong. It is logged too."""

    kind = "log"
    level: str
    """As of the module logging, in lower case."""
    message: str


class NetworkFailed(NetworkEvent):
    """A packet thread failed: the network has to be started again."""

    kind = "failed"
    reason: str


class EventsLost(NetworkEvent):
    """Events were lost for this receiver, because it had not taken earlier ones."""

    kind = "events_lost"
    count: int


class FlowEvent(NetworkEvent):
    """What happens to flows. Guests cause as many of these as they like, so they are delivered to receivers
    that ask for them."""

    kind = "flow"


class FlowOpened(FlowEvent):
    """A connection, a datagram flow or an echo was opened."""

    kind = "flow_opened"
    optional = frozenset(("rule", "name"))
    flow: str
    """Its id, as `FlowRecord.id`."""
    protocol: int
    """The number of the IP protocol."""
    guest: Side
    remote: Side
    inbound: bool
    """Whether the outside opened it, through a published port."""
    rule: str | None = None
    """The label of the rule that allowed it; None for services of the gateway."""
    name: str | None = None
    """A name for which the guest got the remote address, or its name in the network's zone."""


class FlowClosed(FlowEvent):
    """A flow ended."""

    kind = "flow_closed"
    optional = frozenset(("packets_out", "packets_in", "rule", "name", "shown"))
    flow: str
    bytes_out: int
    """Payload from the guest."""
    bytes_in: int
    """Payload to the guest."""
    packets_out: int | None = None
    """Datagrams or segments from the guest, a large one that is cut later counted once; None for flows that
    are translated."""
    packets_in: int | None = None
    """Datagrams or segments to the guest."""
    rule: str | None = None
    """The label of the rule that allowed it; None when the rules have changed since."""
    name: str | None = None
    """A name for which the guest got the remote address."""
    shown: str | None = None
    """The name that the conversation showed: of a TLS or QUIC server, or an HTTP host."""


class FlowDenied(FlowEvent):
    """A new flow was refused, or a running one was cut by a change of the rules.

    Each guest has 100 of these events a second. `NetworkStats.drops` counts every refused packet.
    """

    kind = "denied"
    optional = frozenset(("shown",))
    direction: Literal["outbound", "inbound", "between_guests"]
    """Which way the flow goes. Between guests, `endpoint` is the guest that opens it."""
    protocol: int
    guest: Side
    remote: Side
    name: str | None = None
    """A name for which the guest got the remote address, or its name in the network's zone."""
    shown: str | None = None
    """The name that the conversation showed, if it was refused by that."""
    rule: str | None = None
    """The label of the rule that decided, such as "host_only"; None where a limit was reached."""
    reason: str
    """As in `NetworkStats.drops`."""
    unreported: int = 0
    """Denials of this guest that were left out since the last event."""


class NameDenied(FlowEvent):
    """A DNS query was refused by a rule, or its answer was.

    Each guest has 100 of these and of `FlowDenied` events a second.
    """

    kind = "name_denied"
    name: str
    """The name that was asked for, in lower case."""
    query_type: str
    """The type of the query, such as "A"."""
    rule: str
    """The label of the rule that decided."""
    reason: str
    unreported: int = 0
    """Denials of this guest that were left out since the last event."""


EventCallback = Callable[[Any], object]
