"""Which name servers to ask: those that were configured, or the host's of resolv.conf(5)."""

from __future__ import annotations

import logging
import os
import socket
from ipaddress import ip_address

from guestnet.errors import ConfigError
from guestnet.model.frozen_record import FrozenRecord

_log = logging.getLogger("guestnet")

PORT = 53
_LARGEST_FILE = 65536
_MOST = 6
_TIMEOUT, _TIMEOUT_LONGEST = 2.0, 10.0
"""Seconds for each try. resolv.conf(5) has 5, but a guest's own resolver waits no longer for all of them."""
_ATTEMPTS, _ATTEMPTS_MOST = 2, 5


class Resolver(FrozenRecord, kw_only=False):
    """A name server."""

    host: str
    port: int = PORT

    def text(self) -> str | None:
        """Address and port, as `192.0.2.53:53` or `[2001:db8::53]:53`; None when its interface is missing."""
        host, _, interface = self.host.partition("%")
        if ":" not in host:
            return f"{host}:{self.port}"
        if not interface:
            return f"[{host}]:{self.port}"
        try:
            index = int(interface) if interface.isdigit() else socket.if_nametoindex(interface)
        except OSError:
            return None
        return f"[{host}%{index}]:{self.port}"


_LOCAL = Resolver("127.0.0.1")
NOT_NAMED = (_LOCAL,)
"""Asked where resolv.conf names no server, or cannot be read (resolv.conf(5))."""
_UNSPECIFIED = {"0.0.0.0": _LOCAL, "::": Resolver("::1")}
"""What a socket that is connected to these reaches."""


class Resolvers(FrozenRecord, kw_only=False):
    """Name servers and how to ask them. `timeout` in seconds for each try, `attempts`: tries of each."""

    servers: tuple[Resolver, ...] = ()
    timeout: float = _TIMEOUT
    attempts: int = _ATTEMPTS
    rotate: bool = False
    use_tcp: bool = False


def parse_resolver(text: str) -> Resolver:
    """A server as in `DnsConfig.resolvers`. Raises ConfigError."""
    host, port = text, str(PORT)
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":") or str(PORT)
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    try:
        address = ip_address(host)
        if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError
        if address.is_unspecified or address.is_multicast:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"The resolver {text!r} is not a name server's address: write one such as 192.0.2.53."
        ) from None
    return Resolver(host, int(port))


def parse_resolv_conf(text: str) -> Resolvers:
    """What the file says, as far as it is understood: a bad line must not take names from guests."""
    servers: list[Resolver] = []
    options: dict[str, str] = {}
    for line in text.splitlines():
        words = line.split()
        if not words or words[0][0] in "#;":
            continue
        if words[0] == "nameserver" and len(words) > 1:
            try:
                # The port is always 53 here, and a colon part of the address.
                server = _UNSPECIFIED.get(words[1]) or parse_resolver(f"[{words[1]}]")
            except ConfigError:
                _log.warning("resolv.conf: %s is not a name server's address, skipped", ascii(words[1]))
                continue
            if server not in servers and len(servers) < _MOST:
                servers.append(server)
        elif words[0] == "options":
            options.update((name, value) for name, _, value in (word.partition(":") for word in words[1:]))
    timeout = _bounded(options.get("timeout"), 1, _TIMEOUT_LONGEST, _TIMEOUT)
    attempts = _bounded(options.get("attempts"), 1, _ATTEMPTS_MOST, _ATTEMPTS)
    return Resolvers(
        tuple(servers) or NOT_NAMED, timeout, int(attempts), "rotate" in options, "use-vc" in options
    )


def _bounded(text: str | None, lowest: float, highest: float, usual: float) -> float:
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 6:
        return usual
    return min(max(float(text), lowest), highest)


class ResolverSource:
    """Gives the servers to ask now."""

    def __init__(self, configured: tuple[str, ...] | None, path: str) -> None:
        self._path = path
        self._seen: object = None
        self._fixed = configured is not None
        self._current = Resolvers(tuple(map(parse_resolver, configured or ())))

    def current(self) -> Resolvers:
        """The servers. One stat(2) tells whether the file is to be read again; the same object if not."""
        if self._fixed:
            return self._current
        try:
            status = os.stat(self._path)
        except OSError:
            stamp: object = ()
        else:
            stamp = (status.st_mtime_ns, status.st_ino, status.st_dev, status.st_size)
        if stamp != self._seen:
            self._seen = stamp
            self._current = self._read()
        return self._current

    def _read(self) -> Resolvers:
        try:
            with open(self._path, "rb") as file:
                text = file.read(_LARGEST_FILE).decode("utf-8", "replace")
        except OSError as error:
            _log.warning(
                "%s cannot be read (%s): the name server of this host itself is asked",
                self._path,
                error.strerror,
            )
            return Resolvers(NOT_NAMED)
        return parse_resolv_conf(text)
