"""A DHCP client's side of the wire, written apart from the server's, by the tables of the RFCs."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)
MAC = bytes.fromhex("020000000007")
COOKIE = bytes((99, 130, 83, 99))
Options = list[tuple[int, bytes]]


def bootp(
    *,
    op: int = 1,
    mac: bytes = MAC,
    flags: int = 0,
    ciaddr: str = "0.0.0.0",
    giaddr: str = "0.0.0.0",
    sname: bytes = b"",
    file: bytes = b"",
    vendor: bytes = b"",
    htype: int = 1,
    hlen: int | None = None,
    xid: int = 0x12345678,
) -> bytes:
    """A message up to and with its vendor area."""
    out = bytes((op, htype, len(mac) if hlen is None else hlen, 0)) + struct.pack("!IHH", xid, 3, flags)
    out += IPv4Address(ciaddr).packed + bytes(8) + IPv4Address(giaddr).packed
    return out + mac.ljust(16, b"\0") + sname.ljust(64, b"\0") + file.ljust(128, b"\0") + vendor


def tlv(options: Options) -> bytes:
    return b"".join(bytes((code, len(value))) + value for code, value in options)


def ask(kind: int, options: Options | None = None, **fields: object) -> bytes:
    """A message of a client; `options` follow its type."""
    area = tlv([(53, bytes((kind,))), *(options or [])])
    return bootp(vendor=COOKIE + area + b"\xff", **fields)  # type: ignore[arg-type]


def ip(text: str) -> bytes:
    return IPv4Address(text).packed


@dataclass
class Said:
    """An answer. `options` in the order in which they came, those of the same code joined."""

    op: int
    xid: int
    flags: int
    ciaddr: str
    yiaddr: str
    giaddr: str
    mac: bytes
    options: dict[int, bytes]

    @property
    def kind(self) -> int:
        return self.options[53][0]

    def address(self, code: int) -> str:
        return str(IPv4Address(self.options[code]))

    def number(self, code: int) -> int:
        return int.from_bytes(self.options[code], "big")


def read(data: bytes) -> Said:
    op, htype, hlen, hops, xid, _secs, flags = struct.unpack_from("!BBBBIHH", data)
    assert (htype, hlen, hops) == (1, 6, 0)
    ciaddr, yiaddr, _siaddr, giaddr = (str(IPv4Address(data[at : at + 4])) for at in (12, 16, 20, 24))
    options: dict[int, bytes] = {}
    if data[236:240] == COOKIE:
        _area(data[240:], options)
        overload = options.get(52, b"\0")[0]
        if overload & 1:
            _area(data[108:236], options)
        if overload & 2:
            _area(data[44:108], options)
    return Said(op, xid, flags, ciaddr, yiaddr, giaddr, data[28:34], options)


def _area(area: bytes, into: dict[int, bytes]) -> None:
    at = 0
    while area[at] != 255:
        if area[at] == 0:
            at += 1
            continue
        code, length = area[at], area[at + 1]
        assert at + 2 + length < len(area), "an option beyond its area, or no end"
        into[code] = into.get(code, b"") + area[at + 2 : at + 2 + length]
        at += 2 + length
    assert not any(area[at + 1 :]), "something after the end"
