"""Checks of single values: each returns the value in its own type, or raises a ConfigError.

The error names the value and what it is for, and says what to write instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    NetmaskValueError,
    ip_address,
)
from typing import TYPE_CHECKING, Any, TypeVar

from guestnet.errors import ConfigError
from guestnet.model.defaults import DEFAULT_SUBNET, DEFAULT_ZONE
from guestnet.model.frozen import FrozenMapping

if TYPE_CHECKING:
    from guestnet.policy.limit import Limit
    from guestnet.policy.policy import Policy

PREFIX_SHORTEST, PREFIX_LONGEST = 8, 30
"""A /30 has room for the gateway and one guest."""
NAME_LONGEST, LABEL_LONGEST = 253, 63
_LINK_LOCAL = IPv4Network("169.254.0.0/16")

_Choice = TypeVar("_Choice", bound=StrEnum)


def choice(kind: type[_Choice], what: str, value: object) -> _Choice:
    """A member of an enumeration, from itself or its value. Raises ConfigError."""
    try:
        return kind(str(value))
    except ValueError:
        known = ", ".join(repr(choice.value) for choice in kind)
        raise ConfigError(f"{what} {value!r} is none of {known}: choose one of them.") from None


def whole_number(what: str, value: object, lowest: int, highest: int) -> int:
    """A whole number between two others. Raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{what} {value!r} is not a whole number: write one from {lowest} to {highest}.")
    if not lowest <= value <= highest:
        raise ConfigError(f"{what} {value} is not between {lowest} and {highest}: choose one that is.")
    return value


def yes_or_no(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{what} {value!r} is neither True nor False: write one of them.")
    return value


def ipv4_address(what: str, value: object) -> IPv4Address:
    """An IPv4 address. Raises ConfigError."""
    try:
        if isinstance(value, str | IPv4Address):
            return IPv4Address(value)
    except AddressValueError:
        pass
    raise ConfigError(f"{what} {value!r} is not an IPv4 address: write one such as 192.168.64.10.")


def ipv4_subnet(what: str, value: object) -> IPv4Network:
    """A subnet with room for a gateway and a guest. Raises ConfigError."""
    if isinstance(value, IPv4Network):
        network = value
    else:
        try:
            network = IPv4Network(value if isinstance(value, str) else "", strict=False)
        except (AddressValueError, NetmaskValueError, ValueError):
            raise ConfigError(
                f"{what} {value!r} is not an IPv4 subnet: write one such as {DEFAULT_SUBNET}."
            ) from None
        if "/" not in str(value):
            raise ConfigError(f"{what} {value!r} has no length of its prefix: write one such as {value}/24.")
        if str(network.network_address) != str(value).partition("/")[0]:
            raise ConfigError(f"{what} {value!r} is an address within a subnet: write {network}.")
    if not PREFIX_SHORTEST <= network.prefixlen <= PREFIX_LONGEST:
        raise ConfigError(
            f"{what} {network} must have a prefix of /{PREFIX_SHORTEST} to /{PREFIX_LONGEST}: "
            f"write one such as {DEFAULT_SUBNET}."
        )
    first, last = network.network_address.packed[0], network.broadcast_address.packed[0]
    if first == 0 or last >= 224 or first == 127:
        raise ConfigError(f"{what} {network} is not for hosts: write a private one such as {DEFAULT_SUBNET}.")
    if network.overlaps(_LINK_LOCAL):
        raise ConfigError(
            f"{what} {network} holds link-local addresses, which no gateway leads out (RFC 3927 section 7): "
            f"write a private one such as {DEFAULT_SUBNET}."
        )
    return network


def checked_prefix6(value: object) -> IPv6Network | None:
    if value is None:
        return None
    # Imported only where there is IPv6.
    from guestnet.model.spec6 import ipv6_prefix

    return ipv6_prefix("subnet6", value)


def domain(what: str, value: object, *, one_label: bool = False) -> str:
    """A domain name in lower case, without its final dot."""
    kind = "name of one label" if one_label else "domain name"
    example = "web" if one_label else DEFAULT_ZONE
    if isinstance(value, str):
        name = value.rstrip(".").lower()
        labels = name.split(".")
        if len(name) <= NAME_LONGEST and all(map(_is_label, labels)) and (len(labels) == 1 or not one_label):
            return name
    raise ConfigError(
        f"{what} {value!r} is not a {kind}: write letters, digits and hyphens, such as {example!r}."
    )


def _is_label(label: str) -> bool:
    fits = 0 < len(label) <= LABEL_LONGEST and label.isascii() and label.replace("_", "").replace("-", "")
    return bool(fits) and str(fits).isalnum() and label[0] != "-" and label[-1] != "-"


def checked_records(value: object) -> dict[str, tuple[str, ...]]:
    if not value:
        return {}
    # Imported only where there are records: it brings asyncio.
    from guestnet.services.dns.records import parse_record

    if not isinstance(value, Mapping):
        raise ConfigError(f"dns_records {value!r} is not a mapping: write {{'web.example': ['192.0.2.1']}}.")
    found: dict[str, tuple[str, ...]] = {}
    for name, given in value.items():
        if not isinstance(name, str) or not 0 < len(name.rstrip(".")) <= NAME_LONGEST:
            raise ConfigError(f"dns_records name {name!r} is not a domain name: write one such as 'web.lan'.")
        values = (
            [given] if isinstance(given, str | IPv4Address | IPv6Address) else several("dns_records", given)
        )
        for one in values:
            parse_record(name, one)
        found[name.rstrip(".").lower()] = tuple(str(one) for one in values)
    return found


def several(what: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{what} {value!r} is not a list: write one in brackets.")
    return tuple(value)


def any_address(what: str, value: object) -> str:
    """An address of either family, as text. Raises ConfigError."""
    try:
        if isinstance(value, str | IPv4Address | IPv6Address):
            return str(ip_address(value))
    except ValueError:
        pass
    raise ConfigError(f"{what} {value!r} is not an IP address: write one such as '192.0.2.1'.")


def checked_resolvers(value: object) -> tuple[str, ...]:
    return tuple(any_address("resolvers", server) for server in several("resolvers", value))


def path(what: str, value: object, example: str = "guests.pcapng") -> str:
    """A path as text. Raises ConfigError for what no file can be called."""
    try:
        name = os.fspath(value) if isinstance(value, str | os.PathLike) else b""
        if isinstance(name, str) and name and b"\0" not in os.fsencode(name):
            return name
    except UnicodeEncodeError:
        pass
    raise ConfigError(f"{what} {value!r} is not a path: write one such as {example!r}.")


def named_numbers(what: str, value: object, known: tuple[str, ...]) -> FrozenMapping[int]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} {value!r} is not a mapping of names to numbers.")
    for name in value:
        if name not in known:
            raise ConfigError(f"{what} has nothing named {name!r}: choose among {', '.join(known)}.")
    return FrozenMapping(
        {name: whole_number(f"{what} {name}", number, 1, 0xFFFFFFFF) for name, number in value.items()}
    )


def check_port_range(
    value: object, what: str = "port_range", example: str = "(49152, 65535)"
) -> tuple[int, int]:
    """A first and a last port. Raises ConfigError."""
    given = several(what, value)
    if len(given) != 2:
        raise ConfigError(f"{what} {value!r} is not a first and a last port: write {example}.")
    first, last = (whole_number(what, one, 1, 65535) for one in given)
    if first > last:
        raise ConfigError(f"{what} {first} to {last} starts after its end: give the lower one first.")
    return first, last


def checked_policy(value: object) -> Policy | None:
    """A policy, or a mapping with the keys of a policy file. Raises ConfigError."""
    if value is None:
        return None
    # Imported only where there is one.
    from guestnet.policy.policy import Policy

    if isinstance(value, Policy):
        return value
    if isinstance(value, Mapping):
        return Policy.from_dict(value)
    raise ConfigError(f"policy {value!r} is not a Policy: make one with Policy(...) or Policy.load(path).")


def checked_limit(value: object) -> Limit | None:
    """A limit, its text, or a mapping with its fields. Raises ConfigError."""
    if value is None:
        return None
    # Imported only where there is one.
    from guestnet.policy.limit import Limit

    return Limit.of(value)


def checked_guest_ports(value: object) -> tuple[int, int] | None:
    return None if value is None else check_port_range(value, "pcp_ports", "(40000, 40999)")
