"""The values of DHCP options that the server sends, and the host name that a client sends."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network

_REACH = 0x4000
"""A compression pointer has 14 bits."""
_LABEL = 63

_KEPT = frozenset(
    # Names with a meaning for other guests: one that is called wpad is asked for their proxy.
    ("wpad", "isatap", "localhost", "localdomain", "broadcasthost", "gateway", "host", "guestnet", "internal")
)
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")


def addresses(values: Iterable[IPv4Address]) -> bytes:
    """A list of addresses (options 3, 6)."""
    return b"".join(value.packed for value in values)


def seconds(value: int) -> bytes:
    """A time (options 51, 58, 59)."""
    return struct.pack("!I", value)


def search_list(domains: Iterable[str]) -> bytes:
    """Option 119: names, compressed as in DNS messages (RFC 3397 section 2)."""
    out = bytearray()
    known: dict[str, int] = {}
    for domain in domains:
        rest = domain.lower().strip(".")
        while rest and rest not in known:
            if len(out) < _REACH:
                known[rest] = len(out)
            label, _, rest = rest.partition(".")
            out += bytes((len(label),)) + label.encode("ascii")
        out += struct.pack("!H", 0xC000 | known[rest]) if rest else b"\0"
    return bytes(out)


def classless_routes(routes: Iterable[tuple[IPv4Network, IPv4Address]]) -> bytes:
    """Option 121 (RFC 3442): of each destination, only the octets that its prefix covers."""
    return b"".join(
        bytes((network.prefixlen,))
        + network.network_address.packed[: (network.prefixlen + 7) // 8]
        + router.packed
        for network, router in routes
    )


def client_name(options: dict[int, bytes]) -> str | None:
    """The host name of the client (option 12, else 81), as one label; None if it is not a valid name."""
    text = options.get(12)
    if text is None and len(full := options.get(81, b"")) > 3:
        # RFC 4702: flags, two result codes, then text or, with the E bit, labels.
        text = full[3:]
        if full[0] & 4:
            text = text[1 : 1 + text[0]]
    return host_label(text) if text else None


def host_label(text: bytes) -> str | None:
    """The first label of a name that a client gives itself; None if it is not a valid name for one."""
    try:
        label = text.rstrip(b"\0").decode("ascii").lower().split(".")[0]
    except UnicodeDecodeError:
        return None
    fits = 0 < len(label) <= _LABEL and set(label) <= _LETTERS and label[0] not in "-_" and label[-1] != "-"
    return label if fits and label not in _KEPT else None
