"""Destinations of rules, and the text that describes one on a command line.

>>> target = parse_target("*.debian.org:443")
>>> str(target.destination), target.ports, target.protocol
('*.debian.org', ((443, 443),), None)
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterable
from typing import NamedTuple

from guestnet.errors import PolicyError

GROUPS = (
    *("public", "private", "cgnat", "link_local", "metadata", "host", "host_loopback", "gateway"),
    *("guests", "multicast", "special"),
)
"""Groups of addresses. docs/reference/policy.md has what each of them contains."""
NAME_GROUPS = {
    "doh": (
        *("dns.google", "dns.google.com", "dns64.dns.google", "cloudflare-dns.com", "one.one.one.one"),
        *("dns.quad9.net", "dns9.quad9.net", "dns10.quad9.net", "dns11.quad9.net", "doh.opendns.com"),
        *("dns.opendns.com", "dns.umbrella.com", "doh.umbrella.com", "dns.adguard.com", "adguard-dns.com"),
        *("doh.cleanbrowsing.org", "dns.nextdns.io", "doh.dns.sb", "dns.sb", "dns.mullvad.net"),
        *("dns.switch.ch", "doh.libredns.gr", "doh.xfinity.com", "dns0.eu", "dns.alidns.com", "doh.pub"),
        *("doh.360.cn", "dns.controld.com", "freedns.controld.com", "dns.njal.la", "doh.tiar.app"),
        *("dns.digitale-gesellschaft.ch", "doh.applied-privacy.net", "dnsforge.de", "doh.ffmuc.net"),
        *("ordns.he.net", "odvr.nic.cz", "doh.dns.apple.com", "use-application-dns.net"),
    )
}
"""Groups of names, each with every name below it. "doh": well-known resolvers over HTTPS, and the name by
which browsers ask whether they may use one."""
PROTOCOLS = ("tcp", "udp", "icmp", "any")
NAME_LONGEST, LABEL_LONGEST = 253, 63
PORT_HIGHEST = 65535
Ports = tuple[tuple[int, int], ...]

_EXAMPLE = "write a name such as pypi.org, a prefix such as 10.0.0.0/8, or a group such as public"
_NUMBERS_ALONE = re.compile(r"[0-9.]+")
_PROTOCOL = re.compile(r"(.*)/([A-Za-z]+)", re.DOTALL)


def nearest(word: str, known: Iterable[str], similarity: float = 0.6) -> str:
    """A question after the word that was probably meant, or nothing.

    >>> nearest("alow", ("allow", "deny"))
    ' Did you mean allow?'
    """
    found = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=similarity)
    return f" Did you mean {found[0]}?" if found else ""


class Destination(NamedTuple):
    """Where a flow goes, as a rule says it."""

    kind: str
    """"any", "net", "group", "name" (exactly), "below" (`*.NAME`), "at_or_below" (`.NAME`), "names" (a
    group of them), "endpoints"."""
    value: str = ""
    """The prefix, group, name, or the guest's id or tag."""

    def __str__(self) -> str:
        forms = {"any": "any", "below": f"*.{self.value}", "at_or_below": f".{self.value}"}
        return forms.get(self.kind, self.value)

    @property
    def is_name(self) -> bool:
        """Whether it is about names."""
        return self.kind in ("name", "below", "at_or_below", "names")


class Target(NamedTuple):
    """A destination with ports and a protocol."""

    destination: Destination
    ports: Ports | None
    """First and last ports. None: not given; (): all."""
    protocol: str | None


def host_name(text: str) -> str | None:
    """A host name in lower case without a final dot, its labels in IDNA form. None for what is none."""
    name = text.removesuffix(".").lower()
    if not name.isascii():
        try:
            name = name.encode("idna").decode("ascii")
        except UnicodeError:
            return None
    labels = name.split(".")
    fits = all(
        0 < len(label) <= LABEL_LONGEST
        and label.replace("-", "a").replace("_", "a").isalnum()
        and "-" not in (label[0], label[-1])
        for label in labels
    )
    if not fits or len(name) > NAME_LONGEST or labels[-1].isdigit():
        return None
    return name


def parse_destination(text: object) -> Destination:
    """Reads a destination without a port.

    Args:
        text: A name, `*.NAME`, `.NAME`, an address, a prefix, a group, "doh", "any", an endpoint as
            "guest:ID", or endpoints with a tag as "tag:TAG".

    Returns:
        The destination.

    Raises:
        PolicyError: It is none of these.
    """
    if not isinstance(text, str):
        raise PolicyError(f"The destination {text!r} is not text: {_EXAMPLE}.")
    word = text.strip()
    if word in ("any", "*"):
        return Destination("any")
    if word in GROUPS:
        return Destination("group", word)
    if word in NAME_GROUPS:
        return Destination("names", word)
    kind, _, value = word.partition(":")
    if kind in ("guest", "tag") and value and not value.startswith(":"):
        return Destination("endpoints", word)
    net = _net(word)
    if net is not None:
        return Destination("net", net)
    prefix, rest = "name", word
    if word.startswith("*."):
        prefix, rest = "below", word[2:]
    elif word.startswith("."):
        prefix, rest = "at_or_below", word[1:]
    name = host_name(rest)
    if name is None or _NUMBERS_ALONE.fullmatch(word):
        raise PolicyError(
            f"{_short(text)} is no destination: {_EXAMPLE}.{nearest(word, (*GROUPS, *NAME_GROUPS))}"
        )
    # A misspelled group would be the name of a host that nobody asks for.
    if prefix == "name" and "." not in name and (meant := nearest(name, ("any", *GROUPS), 0.8)):
        raise PolicyError(f"{_short(text)} is no group, and hardly the name of a host:{meant}")
    return Destination(prefix, name)


def _net(text: str) -> str | None:
    """An address or prefix as its prefix; None for other text. Raises PolicyError for one that is wrong."""
    bare = text[1:].replace("]", "", 1) if text.startswith("[") else text
    if not (":" in bare or bare[:1].isdigit()) or "%" in bare:
        return None
    try:
        return str(ipaddress.ip_network(bare))
    except ValueError as error:
        address, slash, _ = bare.partition("/")
        try:
            ipaddress.ip_address(address)
        except ValueError:
            return None
        if "host bits" in str(error):
            meant = ipaddress.ip_network(bare, strict=False)
            raise PolicyError(f"{_short(text)} is an address within a prefix: write {meant}.") from None
        what = "has a wrong prefix length" if slash else "is no prefix"
        raise PolicyError(f"{_short(text)} {what}: write one such as 10.0.0.0/8.") from None


def parse_port(text: object) -> tuple[int, int]:
    """A port, or the first and the last one of a range.

    >>> parse_port(443), parse_port("8000-8100")
    ((443, 443), (8000, 8100))
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise PolicyError(f"The port {_short(text)} is not a number: write one such as 443.")
    first, dash, last = str(text).partition("-")
    numbers = [first, last] if dash else [first]
    if not all(number.isascii() and number.isdigit() and len(number) <= 5 for number in numbers):
        raise PolicyError(f"The port {_short(text)} is not a number: write one such as 443 or 8000-8100.")
    low, high = int(numbers[0]), int(numbers[-1])
    if not 1 <= low <= PORT_HIGHEST or not 1 <= high <= PORT_HIGHEST:
        raise PolicyError(f"The port {_short(text)} is not between 1 and {PORT_HIGHEST}: choose one that is.")
    if low > high:
        raise PolicyError(f"The ports {_short(text)} start after their end: write {high}-{low}.")
    return low, high


def parse_ports(value: object) -> Ports | None:
    """The ports of a rule: None, "*" (all, as an empty tuple), one, or several."""
    if value is None:
        return None
    if value == "*":
        return ()
    if isinstance(value, int | str):
        return (parse_port(value),)
    if not isinstance(value, Iterable) or isinstance(value, bytes | dict):
        raise PolicyError(f"ports {_short(value)} is not a list: write one such as [80, 443].")
    found = tuple(parse_port(f"{one[0]}-{one[1]}") if _is_pair(one) else parse_port(one) for one in value)
    if not found:
        raise PolicyError('ports is empty, which matches nothing: leave it out, or write "*" for all ports.')
    return found


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def parse_target(text: str) -> Target:
    """Reads what `--allow` and `--deny` take: DESTINATION[:PORTS][/PROTOCOL].

    Args:
        text: Such as `pypi.org`, `*.debian.org:443`, `10.1.0.0/16:5432/tcp`, `[2001:db8::]/32:53/udp`.

    Returns:
        The destination, the ports and the protocol.

    Raises:
        PolicyError: It cannot be read.
    """
    rest, protocol = text.strip(), None
    if found := _PROTOCOL.fullmatch(rest):
        rest, protocol = found[1], found[2].lower()
        if protocol not in PROTOCOLS:
            known = ", ".join(PROTOCOLS)
            raise PolicyError(
                f"{_short(text)} names no protocol: choose among {known}.{nearest(protocol, PROTOCOLS)}"
            )
    place, ports = rest, None
    head, colon, tail = rest.rpartition(":")
    is_port = tail == "*" or tail[:1].isdigit()
    if colon and rest.startswith(("guest:", "tag:")):
        is_port = is_port and head.count(":") == 1
    elif colon and ":" in head and not rest.startswith("["):
        is_port = False  # IPv6 without brackets has no port
    elif colon and rest.startswith("["):
        is_port = is_port and "]" in head
    if colon and is_port:
        place, ports = head, parse_ports(tail)
    elif colon and not rest.startswith(("[", "guest:", "tag:")) and ":" not in head:
        raise PolicyError(f"{_short(text)} has no port behind its colon: write one such as {head}:443.")
    if protocol == "icmp" and ports:
        raise PolicyError(f"{_short(text)} names a port, which ICMP has not: leave it out.")
    return Target(parse_destination(place), ports, protocol)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"
