"""The proxy that flows go through: its URL, and where that may come from."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

from guestnet.errors import ConfigError

_CREDENTIAL_LONGEST = 255
_PORTS = {"socks5": 1080, "http": 8080}
_KINDS = {"socks5": "socks5", "socks5h": "socks5", "http": "http"}
_VARIABLES = ("ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy")
_EXAMPLE = "write one such as 'socks5://192.0.2.1:1080' or 'http://user:password@192.0.2.1:8080'."


class ProxyUrl(str):
    """The URL of a proxy. It is shown without the credentials; as text it has them.

    Example:
        >>> ProxyUrl("http://me:secret@192.0.2.1:8080")
        'http://***@192.0.2.1:8080'
    """

    __slots__ = ()

    def __str__(self) -> str:
        scheme, _, rest = str.__str__(self).partition("://")
        credentials, at, place = rest.rpartition("@")
        return f"{scheme}://{'***' if credentials else ''}{at}{place}"

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


class Proxy(NamedTuple):
    """The parts of a URL."""

    kind: str
    host: str
    port: int
    user: bytes
    password: bytes


def proxy(value: object, environment: Mapping[str, str] = os.environ) -> ProxyUrl | None:
    """Checks the setting `proxy`.

    Args:
        value: A URL, `host` for that of the environment, `@FILE` for the first line of a file, or None.
        environment: Where `host` is looked up.

    Returns:
        The URL, None for none.

    Raises:
        ConfigError: It is none, or nothing is set where it is looked up.

    Example:
        >>> proxy("socks5://192.0.2.1:1080")
        'socks5://192.0.2.1:1080'
        >>> proxy("host", {"HTTPS_PROXY": "http://me:secret@192.0.2.1:3128"})
        'http://***@192.0.2.1:3128'
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ConfigError(f"`proxy` {value!r} is not a URL: {_EXAMPLE}")
    text = str.__str__(value)
    if text == "host":
        text = next((environment[name] for name in _VARIABLES if environment.get(name)), "")
        if not text:
            raise ConfigError(
                f"`proxy` 'host' finds no proxy of the host: set ALL_PROXY or HTTPS_PROXY, or {_EXAMPLE}"
            )
    elif text.startswith("@"):
        text = _first_line(text[1:])
    url = ProxyUrl(text)
    parts(url)
    return url


def _first_line(name: str) -> str:
    try:
        with open(name, encoding="utf-8") as file:
            return file.readline(4096).strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"`proxy` file {name!r} cannot be read ({why}): write a URL to it.") from None


def parts(url: ProxyUrl) -> Proxy:
    """Takes a URL apart.

    Args:
        url: The URL.

    Returns:
        Its parts.

    Raises:
        ConfigError: It is not the URL of a proxy that guestnet can use. The message hides credentials.

    Example:
        >>> parts(ProxyUrl("socks5://me:s%40cret@[2001:db8::1]"))
        Proxy(kind='socks5', host='2001:db8::1', port=1080, user=b'me', password=b's@cret')
    """
    wrong = ConfigError(f"`proxy` {url!r} is not the URL of a proxy: {_EXAMPLE}")
    try:
        split = urlsplit(str.__str__(url))
        host, port = split.hostname, split.port
        user, password = (unquote_to_bytes(part or "") for part in (split.username, split.password))
    except (ValueError, UnicodeError):
        raise wrong from None
    if split.scheme == "https":
        raise ConfigError(
            f"`proxy` {url!r} is spoken to over TLS, which guestnet does not do: run one that takes http:// "
            "on this host, such as stunnel in front of it."
        )
    kind = _KINDS.get(split.scheme)
    if kind is None or not host or port == 0 or split.path not in ("", "/") or split.query or split.fragment:
        raise wrong
    if not host.isascii() or not host.isprintable():
        raise wrong
    if (password and not user) or (user and not password):
        raise ConfigError(f"`proxy` {url!r} has half of its credentials: write user:password@.")
    if max(len(user), len(password)) > _CREDENTIAL_LONGEST or b":" in user:
        raise ConfigError(
            f"`proxy` {url!r} has credentials that no proxy takes: a name has no colon, and each at most "
            f"{_CREDENTIAL_LONGEST} bytes."
        )
    return Proxy(kind, host, port or _PORTS[kind], user, password)


def resolved(url: ProxyUrl) -> tuple[str, IPv4Address | IPv6Address, int, bytes, bytes]:
    """Looks up where a proxy is, with the resolver of the host.

    Args:
        url: The URL.

    Returns:
        What it speaks, its address and port, and the credentials.

    Raises:
        ConfigError: Its name has no address.

    Example:
        >>> resolved(ProxyUrl("http://192.0.2.1"))
        ('http', IPv4Address('192.0.2.1'), 8080, b'', b'')
    """
    kind, host, port, user, password = parts(url)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        address = ip_address(found[0][4][0])
    except (OSError, UnicodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no address"
        raise ConfigError(f"`proxy` {url!r} is not found ({why}): write its address instead.") from None
    return kind, address, port, user, password
