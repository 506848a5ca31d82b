"""The checks of the IPv6 settings of a network."""

from __future__ import annotations

from ipaddress import AddressValueError, IPv6Address, IPv6Network, NetmaskValueError

from guestnet.errors import ConfigError

_EXAMPLE = "fd12:3456:789a::/64"
_LENGTH = 64
"""Guests configure themselves in no other prefix (RFC 4862 section 5.5.3, RFC 7421)."""
_NOT_FOR_HOSTS = tuple(
    map(IPv6Network, ("::/8", "100::/64", "2001::/32", "2002::/16", "fe80::/9", "ff00::/8"))
)
"""Loopback, embedded IPv4 and NAT64, discard, Teredo, 6to4, link-local and site-local, multicast."""


def ipv6_prefix(what: str, value: object) -> IPv6Network:
    """A /64 that guests can have addresses of. Raises ConfigError."""
    if isinstance(value, IPv6Network):
        network = value
    else:
        try:
            network = IPv6Network(value if isinstance(value, str) else "", strict=False)
        except (AddressValueError, NetmaskValueError, ValueError):
            raise ConfigError(
                f"{what} {value!r} is not an IPv6 prefix: write one such as {_EXAMPLE}."
            ) from None
        if "/" not in str(value):
            raise ConfigError(f"{what} {value!r} has no length of its prefix: write {value}/{_LENGTH}.")
        if IPv6Address(str(value).partition("/")[0]) != network.network_address:
            raise ConfigError(f"{what} {value!r} is an address within a prefix: write {network}.")
    if network.prefixlen != _LENGTH:
        raise ConfigError(
            f"{what} {network} must have a prefix of /{_LENGTH}, because guests configure themselves in no "
            f"other one: write one such as {_EXAMPLE}."
        )
    if any(network.overlaps(one) for one in _NOT_FOR_HOSTS):
        raise ConfigError(f"{what} {network} is not for hosts: write a unique local one such as {_EXAMPLE}.")
    return network


def host6_address(what: str, value: object, prefix: IPv6Network | None) -> IPv6Address:
    """An address that a guest of the prefix can have. Raises ConfigError."""
    try:
        address = IPv6Address(value if isinstance(value, str | IPv6Address) else "")
    except AddressValueError:
        raise ConfigError(f"{what} {value!r} is not an IPv6 address: write one such as fd12::10.") from None
    if prefix is None:
        raise ConfigError(f"{what} {address} needs `subnet6`: set it too, or leave the address out.")
    if address.scope_id is not None or address not in prefix or address == prefix[0]:
        raise ConfigError(f"{what} {address} is not the address of a host in {prefix}: write {prefix[16]}.")
    if address == prefix[1]:
        raise ConfigError(f"{what} {address} is the gateway's own: choose another of {prefix}.")
    return address
