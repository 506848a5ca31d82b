"""What the DNS authority of a network is made of."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Protocol

from guestnet.model.defaults import DEFAULT_ZONE
from guestnet.model.frozen import FrozenMapping
from guestnet.model.frozen_record import FrozenRecord


class Directory(Protocol):
    """Knows the endpoints of a network by name."""

    def addresses_named(self, name: str, *, told: bool = True) -> tuple[IPv4Address | IPv6Address, ...]:
        """The addresses of the guest with this name, in any case; `told`: also of one that only the guest
        itself says that it has."""

    def name_of(self, address: IPv4Address | IPv6Address) -> str | None:
        """The name of the guest with this address."""


class NoDirectory:
    """Knows nobody."""

    def addresses_named(self, name: str, *, told: bool = True) -> tuple[IPv4Address | IPv6Address, ...]:
        """Nobody."""
        return ()

    def name_of(self, address: IPv4Address | IPv6Address) -> str | None:
        """Nobody."""
        return None


class DnsConfig(FrozenRecord):
    """A DNS server.

    - `zone`: where endpoints have their names, and the gateway its own: `gateway.` and the zone.
    - `records`: names with their values, each an address or `TYPE:value`.
    - `gateway`, `subnet`: the network's; addresses of the subnet are not asked of others. `gateway6` and
      `subnet6` are the same in IPv6, None without it.
    - `host`: where guests reach the host's loopback, None when they do not.
    - `resolvers`: name servers for all other names, as `192.0.2.53`, `192.0.2.53:5353` or
      `[2001:db8::53]:5353`; None: those of `resolv_conf`, which is read again when it changes; (): none.
    """

    zone: str = DEFAULT_ZONE
    records: Mapping[str, tuple[str, ...]] = FrozenMapping({})
    gateway: IPv4Address
    subnet: IPv4Network | None = None
    gateway6: IPv6Address | None = None
    subnet6: IPv6Network | None = None
    host: IPv4Address | None = None
    resolvers: tuple[str, ...] | None = None
    directory: Directory = NoDirectory()
    resolv_conf: str = "/etc/resolv.conf"
