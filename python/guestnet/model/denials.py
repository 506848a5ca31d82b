"""What a network refused to its guests, as its owner sees it."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

from guestnet.model.events import plain
from guestnet.model.frozen_record import FrozenRecord


class Denial(FrozenRecord):
    """Flows, or queries for a name, that one rule refused to one guest. Equal ones are counted together.

    Example:
        >>> denial = Denial(endpoint="vm1", what="tcp", rule="default", reason="policy", count=2,
        ...                 first=1.0, last=2.0, address=IPv4Address("192.0.2.7"), port=443)
        >>> print(denial)
        vm1: tcp to 192.0.2.7:443 refused 2 times by default (policy)
    """

    endpoint: str
    """The guest that opened the flow, or that it was for."""
    what: str
    """"tcp", "udp", "icmp", the number of another protocol, or "dns" for a query."""
    direction: str = "outbound"
    """"outbound", "inbound" or "between_guests"."""
    address: IPv4Address | IPv6Address | None = None
    """The other side; None for a query."""
    port: int = 0
    name: str | None = None
    """The name that was asked for, or that the guest had asked to get the address."""
    shown: str | None = None
    """The name that the conversation showed: SNI or Host."""
    rule: str | None = None
    """The label of the rule that decided; None where a limit was reached."""
    reason: str
    count: int = 1
    first: float
    """Seconds since the epoch."""
    last: float

    def __str__(self) -> str:
        times = "" if self.count == 1 else f" {self.count} times"
        by = "" if self.rule is None else f" by {self.rule}"
        return f"{self.endpoint}: {self.what} to {self.destination} refused{times}{by} ({self.reason})"

    @property
    def destination(self) -> str:
        """The other side as text, with its name where one is known."""
        if self.address is None:
            return self.name or "?"
        address = str(self.address)
        if self.port:
            address = f"[{address}]:{self.port}" if self.address.version == 6 else f"{address}:{self.port}"
        name = self.shown or self.name
        return address if name is None else f"{name} ({address})"

    def as_dict(self) -> dict[str, Any]:
        """The denial with values that JSON can carry.

        Returns:
            The fields by name.
        """
        return {name: plain(value) for name, value in vars(self).items()}
