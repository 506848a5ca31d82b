"""The IPv6 that the one guest of a command's own network has before its command starts."""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Interface
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guestnet.model.spec import NatConfig

ROUTER = IPv6Address("fe80::1")
"""The gateway's address on the link in every network with IPv6."""


def address6(config: NatConfig) -> IPv6Interface | None:
    """The guest's address, None without a prefix."""
    address = config.first_guest_address6
    return None if address is None else IPv6Interface((address, 64))


def router6(config: NatConfig) -> IPv6Address | None:
    """The guest's router, if the host has IPv6."""
    if config.subnet6 is None:
        return None
    from guestnet._linux.host_addresses import has_ipv6

    return ROUTER if has_ipv6() else None
