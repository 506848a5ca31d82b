"""ForwardSpec: what to publish, and its grammar (Docker's, with a guest in addition).

    [HOST_IP:]HOST_PORT[-END]:[GUEST:]GUEST_PORT[-END][/tcp|/udp]
    [[HOST_IP:]:]GUEST_PORT[/tcp|/udp]

Without HOST_PORT the kernel chooses a free port. Without HOST_IP the port is opened on every address of the
host, IPv4 and IPv6.

The module is imported before `guestnet run` forks: it is small, and starts no thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from guestnet.errors import ConfigError, UnsupportedError
from guestnet.model.frozen_record import FrozenRecord

PORT_HIGHEST = 65535
_EVERYWHERE = IPv4Address("0.0.0.0")
_GRAMMAR = "[HOST_IP:]PORT[-END]:[GUEST:]PORT[-END][/tcp|/udp], such as 8080:80 or 127.0.0.1:53:vm1:53/udp"
_NO_PORT = ""
"""Stands for port 0, which the kernel replaces by a free one."""


class ForwardSpec(FrozenRecord, kw_only=False):
    """A range of ports of the host, often of one port, that leads to ports of a guest.

    Args:
        host_ports: A port, or a range of ports, of the host. 0: the kernel chooses.
        guest_ports: As many ports of the guest.
        protocol: "tcp" or "udp".
        host_ip: An address of the host; None for every address.
        guest: The id, the host name or the address of an endpoint; None for the only endpoint.

    Raises:
        ConfigError: A value is wrong.
        TypeError: A value is not a port, an address or a name.

    Example:
        >>> print(ForwardSpec(8080, 80, host_ip="127.0.0.1", guest="vm1"))
        127.0.0.1:8080/tcp -> vm1:80
        >>> ForwardSpec.parse("8000-8009:80-89/udp").guest_ports
        range(80, 90)
    """

    host_ports: range
    guest_ports: range
    protocol: str = "tcp"
    host_ip: IPv4Address | IPv6Address | None = None
    """None: every address of the host."""
    guest: str | None = None
    """An endpoint's id or an address; None: the only endpoint."""

    if TYPE_CHECKING:

        def __init__(
            self,
            host_ports: range | int,
            guest_ports: range | int,
            protocol: str = "tcp",
            host_ip: IPv4Address | IPv6Address | str | None = None,
            guest: str | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "host_ports", _checked_ports("host_ports", self.host_ports, lowest=0))
        object.__setattr__(self, "guest_ports", _checked_ports("guest_ports", self.guest_ports, lowest=1))
        object.__setattr__(self, "host_ip", _checked_address(self.host_ip))
        if self.guest is not None and not isinstance(self.guest, str):
            raise TypeError(
                f"guest {self.guest!r} is not text: give an endpoint's id, or an address as text."
            )
        if len(self.host_ports) != len(self.guest_ports):
            raise ConfigError(
                f"{_ports(self.host_ports)} and {_ports(self.guest_ports)} are not equally many ports: "
                "write ranges of the same length."
            )
        if self.protocol not in ("tcp", "udp"):
            raise ConfigError(f"{self.protocol!r} is not a protocol of ports: write tcp or udp.")

    @classmethod
    def parse(cls, text: str) -> ForwardSpec:
        """Reads a published port in the grammar of this module.

        Args:
            text: Such as "8080:80" or "127.0.0.1:53:vm1:53/udp".

        Returns:
            The specification.

        Raises:
            ConfigError: The text is wrong. The message says what to write.
        """
        body, slash, protocol = text.strip().rpartition("/")
        if not slash:
            body, protocol = protocol, "tcp"
        parts = _split(text, body)
        if len(parts) > 4:
            remedy = (
                "an IPv6 address needs brackets, as in [::1]:8080:80" if body.count(":") > 3 else _GRAMMAR
            )
            raise _wrong(text, remedy)
        if len(parts) == 1:
            parts.insert(0, _NO_PORT)
        guest_ports = _range(text, parts.pop(), lowest=1)
        guest, host_ip = None, None
        # Two parts may stand before the guest's port or between: the host's port is the one that is a port.
        if len(parts) == 3:
            host_ip, host, guest = parts
        elif len(parts) == 1:
            (host,) = parts
        elif _looks_like_ports(parts[0]) or (parts[0] == "" and not _looks_like_ports(parts[1] or "0")):
            host, guest = parts
        else:
            host_ip, host = parts
        if host == _NO_PORT and len(guest_ports) > 1:
            raise _wrong(
                text,
                f"a range needs ports of the host too, write {_ports(guest_ports)}:{_ports(guest_ports)}",
            )
        try:
            return cls(
                _range(text, host, lowest=0),
                guest_ports,
                protocol.lower(),
                None if host_ip is None else _host_ip(text, host_ip),
                None if guest is None else _guest(text, guest),
            )
        except ConfigError as error:
            if str(error).startswith("The published port"):
                raise
            raise _wrong(text, str(error).rstrip(".")) from None

    @classmethod
    def of(cls, spec: object) -> ForwardSpec:
        """Returns a specification as it is, or reads text.

        Args:
            spec: A `ForwardSpec`, or text in the grammar of this module.

        Returns:
            The specification.

        Raises:
            ConfigError: The text is wrong.
            TypeError: It is neither text nor a `ForwardSpec`.
        """
        if isinstance(spec, ForwardSpec):
            return spec
        if isinstance(spec, str):
            return cls.parse(spec)
        raise TypeError(f"{spec!r} is neither text nor a ForwardSpec: write {_GRAMMAR}.")

    def __str__(self) -> str:
        return show(self, self.host_ports)

    @property
    def text(self) -> str:
        """The specification in the grammar of this module: `ForwardSpec.parse` reads it back.

        >>> ForwardSpec.parse("127.0.0.1:8080:web:80").text
        '127.0.0.1:8080:web:80/tcp'
        """
        parts = [_ports(self.host_ports)]
        if self.host_ip is not None:
            parts.insert(0, f"[{self.host_ip}]" if self.host_ip.version == 6 else str(self.host_ip))
        if self.guest is not None:
            parts.append(f"[{self.guest}]" if ":" in self.guest else self.guest)
        return f"{':'.join([*parts, _ports(self.guest_ports)])}/{self.protocol}"

    @property
    def guest_address(self) -> IPv4Address | None:
        """The address of the guest, None when the guest is named otherwise."""
        try:
            address = ip_address(self.guest or "")
        except ValueError:
            return None
        if isinstance(address, IPv6Address):
            raise UnsupportedError(f"Ports of IPv6 guests ({address}) cannot be published yet: use IPv4.")
        return address


def show(
    spec: ForwardSpec,
    host_ports: Sequence[int],
    addresses: Sequence[IPv4Address | IPv6Address] = (),
    guest: str | None = None,
) -> str:
    """What leads where, with the ports and addresses that are open and the guest that was found."""
    ports = _ports(host_ports)
    opened = addresses or (_EVERYWHERE if spec.host_ip is None else spec.host_ip,)
    where = " and ".join(f"[{one}]:{ports}" if one.version == 6 else f"{one}:{ports}" for one in opened)
    guest = spec.guest or guest or "guest"
    guest = f"[{guest}]" if ":" in guest else guest
    return f"{where}/{spec.protocol} -> {guest}:{_ports(spec.guest_ports)}"


def _wrong(text: str, what: str) -> ConfigError:
    return ConfigError(f"The published port {text!r} is not right: {what}.")


def _split(text: str, body: str) -> list[str]:
    """Parts at colons outside brackets; an IPv6 address in brackets loses them."""
    parts, at = [""], 0
    while at < len(body):
        if body[at] == "[" and parts[-1] == "":
            end = body.find("]", at)
            if end < 0 or body[end + 1 : end + 2] != ":":
                raise _wrong(
                    text, "write an IPv6 address in brackets with a colon after them, as in [::1]:8080:80"
                )
            parts[-1] = body[at + 1 : end]
            if ":" not in parts[-1]:
                raise _wrong(text, f"{parts[-1]!r} in brackets is not an IPv6 address")
            at = end + 1
        elif body[at] == ":":
            parts.append("")
            at += 1
        else:
            parts[-1] += body[at]
            at += 1
    return parts


def _looks_like_ports(part: str) -> bool:
    return part.replace("-", "", 1).isdigit()


def _range(text: str, part: str, lowest: int) -> range:
    first, dash, last = (part or "0").partition("-")
    numbers = [first, last] if dash else [first]
    if not all(number.isascii() and number.isdigit() and len(number) <= 5 for number in numbers):
        raise _wrong(text, f"{part!r} is not a port or a range of ports; write {_GRAMMAR}")
    start, end = int(numbers[0]), int(numbers[-1])
    if part == "" and lowest:
        raise _wrong(text, f"the guest's port is missing; write {_GRAMMAR}")
    if not lowest <= start <= PORT_HIGHEST or end > PORT_HIGHEST:
        raise _wrong(text, f"{part!r} is not between {lowest or 1} and {PORT_HIGHEST}")
    if end < start or (start == 0 and dash):
        raise _wrong(text, f"the range {part!r} starts after its end or at 0")
    return range(start, end + 1)


def _host_ip(text: str, part: str) -> IPv4Address | IPv6Address | None:
    if part == "":
        return None
    if part == "localhost":
        return IPv4Address("127.0.0.1")
    try:
        return ip_address(part)
    except ValueError:
        raise _wrong(text, f"{part!r} is not an address of the host") from None


def _guest(text: str, part: str) -> str | None:
    if any(c in part for c in " \t/[]"):
        raise _wrong(text, f"{part!r} is not the name or address of a guest")
    if part.lower() == "localhost":
        raise _wrong(text, f"{part!r} is no guest; leave it out where there is one guest, or write its name")
    return part or None


def _checked_ports(what: str, value: object, lowest: int) -> range:
    if isinstance(value, int) and not isinstance(value, bool):
        value = range(value, value + 1)
    if not isinstance(value, range):
        raise TypeError(f"{what} {value!r} is neither a port nor a range: write 8080, or range(8000, 8010).")
    if not value or value.step != 1 or not lowest <= value[0] <= value[-1] <= PORT_HIGHEST:
        raise ConfigError(f"{what} {value!r} are not ports from {lowest} to {PORT_HIGHEST} in a row.")
    return value


def _checked_address(value: object) -> IPv4Address | IPv6Address | None:
    if value is None or isinstance(value, IPv4Address | IPv6Address):
        return value
    if not isinstance(value, str):
        raise TypeError(f"host_ip {value!r} is not an address: give text such as '127.0.0.1'.")
    try:
        return ip_address(value)
    except ValueError:
        raise ConfigError(f"host_ip {value!r} is not an address: write one such as '127.0.0.1'.") from None


def _ports(ports: Sequence[int]) -> str:
    return str(ports[0]) if len(ports) == 1 else f"{ports[0]}-{ports[-1]}"
