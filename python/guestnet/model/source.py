"""Where flows leave from: an address or an interface of the host."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NoReturn

from guestnet.errors import ConfigError

_NAME_LONGEST = 15


def source(value: object) -> str | None:
    """Checks the setting `source`. Whether the host has it is known when the network starts.

    Args:
        value: An address, the name of an interface, or None.

    Returns:
        It as text, None for none.

    Raises:
        ConfigError: It is neither, or no flow to the outside can leave from it.

    Example:
        >>> source("192.0.2.7"), source("eth0"), source(None)
        ('192.0.2.7', 'eth0', None)
    """
    if value is None:
        return None
    address = _address(value)
    if address is None:
        if not isinstance(value, str) or value in {"", ".", ".."}:
            _refuse(value)
        if any(c in "/:" or c.isspace() or not c.isprintable() for c in value):
            _refuse(value)
        if len(value.encode()) > _NAME_LONGEST:
            _refuse(value)
        return value
    if address.is_loopback or address.is_unspecified or address.is_multicast:
        raise ConfigError(f"`source` {address} is no address to leave the host from: choose another.")
    if address.is_link_local:
        raise ConfigError(
            f"`source` {address} is link-local, which each interface has: write the name of the interface."
        )
    return str(address)


def _address(value: object) -> IPv4Address | IPv6Address | None:
    if isinstance(value, IPv4Address | IPv6Address):
        return value
    try:
        return ip_address(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _refuse(value: object) -> NoReturn:
    raise ConfigError(
        f"`source` {value!r} is neither an address nor an interface: write one such as '192.0.2.7' or 'eth0'."
    )
