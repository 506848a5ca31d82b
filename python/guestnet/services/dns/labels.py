"""Domain names as labels (RFC 1035 section 3.1), and the numbers that the authority knows.

Messages are read and written by the DNS forwarder in Rust, the only codec.
"""

from __future__ import annotations

from enum import IntEnum

NAME_LONGEST, LABEL_LONGEST = 255, 63


class Type(IntEnum):
    """Types of records that the authority itself knows."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    HINFO = 13
    MX = 15
    TXT = 16
    AAAA = 28
    SRV = 33
    ANY = 255


class Rcode(IntEnum):
    """Response codes."""

    NOERROR = 0
    SERVFAIL = 2
    NXDOMAIN = 3


class Malformed(Exception):
    """Not a domain name."""


def to_labels(name: str) -> bytes:
    """A name as labels, with the final zero. Raises `Malformed`."""
    labels = name.rstrip(".").split(".") if name.rstrip(".") else []
    try:
        encoded = [label.encode("ascii") for label in labels]
    except UnicodeEncodeError:
        raise Malformed("not ASCII") from None
    if any(not 0 < len(label) <= LABEL_LONGEST for label in encoded):
        raise Malformed("an empty label, or one over 63 characters")
    out = b"".join(bytes((len(label),)) + label for label in encoded) + b"\0"
    if len(out) > NAME_LONGEST:
        raise Malformed("over 253 characters")
    return out


def labels_of(name: bytes) -> list[bytes]:
    """The labels of a well-formed name, without the last empty one."""
    labels = []
    at = 0
    while name[at]:
        labels.append(name[at + 1 : at + 1 + name[at]])
        at += 1 + name[at]
    return labels


def parents(name: bytes) -> list[bytes]:
    """The name, its parent, and so on up to the last label."""
    found = []
    at = 0
    while name[at]:
        found.append(name[at:])
        at += 1 + name[at]
    return found
