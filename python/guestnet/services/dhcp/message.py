"""DHCP messages as bytes: RFC 2131 section 2, RFC 2132, and long options by RFC 3396.

Theory of operation: the parser refuses what is ambiguous, with a reason, and raises nothing but `Refused`.
One thread answers all guests, so a message is bounded in bytes and options: parsing one that fills a datagram
would take as long as answering a hundred.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address

MAGIC = b"\x63\x82\x53\x63"
HEADER = struct.Struct("!BBBBIHHIIII16s64s128s")
OPTIONS_AT = HEADER.size + len(MAGIC)
SMALLEST = 300
"""Bytes of the shortest answer: old clients drop shorter ones (RFC 1542 section 2.1)."""
BROADCAST = 0x8000
"""The flag of a client that cannot receive unicast yet."""
NOWHERE = IPv4Address(0)
LONGEST = 1500
"""Bytes of the longest message of a client: what an Ethernet frame carries. Clients send 300 to 600."""
_OPTIONS = 128
_SNAME, _FILE = 64, 128
_PAD, _END, _OVERLOAD = 0, 255, 52
_IN_FILE, _IN_SNAME = 1, 2
_CHUNK = 255
_LENGTHS = {50: 4, 51: 4, 53: 1, 54: 4, 57: 2}
"""Options that the server reads and that have a fixed length."""


class MessageType(IntEnum):
    """The values of option 53."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class DhcpRefusal(StrEnum):
    """Why a message gets no answer."""

    TOO_SHORT = "too_short"
    """Not even a BOOTP header (RFC 951: 236 bytes)."""
    TOO_LONG = "too_long"
    """Longer than the messages of any client."""
    NOT_A_REQUEST = "not_a_request"
    """A server's message, from a guest."""
    BAD_HARDWARE = "bad_hardware"
    """Not Ethernet, or not the address of one station."""
    MAC_MISMATCH = "mac_mismatch"
    """The client's hardware address is not the source of the frame: one guest speaks for another."""
    RELAYED = "relayed"
    """From a relay agent: a network is one segment."""
    BAD_OPTIONS = "bad_options"
    """Options that are cut off, or have the wrong length."""
    BAD_TYPE = "bad_type"
    """Option 53 has a value that no client sends."""
    CONTRADICTION = "contradiction"
    """Addresses that contradict the type of the message (RFC 2131 table 5)."""
    OTHER_SERVER = "other_server"
    """Meant for another server."""
    NO_ADDRESS = "no_address"
    """No address is free, or the endpoint has as many as it may."""
    NOT_LEASED = "not_leased"
    """The client releases or declines an address that it does not hold."""
    TOO_MANY_DECLINED = "too_many_declined"
    """The endpoint has declined so many addresses that it gets no other for a while."""


class Refused(Exception):
    """A message that gets no answer."""

    def __init__(self, reason: DhcpRefusal) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Message:
    """One message, with the field names of RFC 2131. `options` is None for BOOTP without the magic cookie."""

    op: int
    xid: int
    chaddr: bytes
    secs: int = 0
    flags: int = 0
    ciaddr: IPv4Address = NOWHERE
    yiaddr: IPv4Address = NOWHERE
    siaddr: IPv4Address = NOWHERE
    giaddr: IPv4Address = NOWHERE
    htype: int = 1
    hops: int = 0
    options: dict[int, bytes] | None = field(default_factory=dict)

    def address(self, code: int) -> IPv4Address | None:
        """Returns an option that is one address."""
        value = (self.options or {}).get(code)
        return None if value is None else IPv4Address(value)


def parse(data: bytes) -> Message:
    """Parses a message. Raises `Refused`."""
    if len(data) < HEADER.size:
        raise Refused(DhcpRefusal.TOO_SHORT)
    if len(data) > LONGEST:
        raise Refused(DhcpRefusal.TOO_LONG)
    op, htype, hlen, hops, xid, secs, flags, ci, yi, si, gi, chaddr, sname, file = HEADER.unpack_from(data)
    if hlen > len(chaddr):
        raise Refused(DhcpRefusal.BAD_HARDWARE)
    options = None
    if data[HEADER.size : OPTIONS_AT] == MAGIC:
        options = _read_options(data[OPTIONS_AT:], file, sname)
    return Message(
        op=op,
        xid=xid,
        chaddr=chaddr[:hlen],
        secs=secs,
        flags=flags,
        ciaddr=IPv4Address(ci),
        yiaddr=IPv4Address(yi),
        siaddr=IPv4Address(si),
        giaddr=IPv4Address(gi),
        htype=htype,
        hops=hops,
        options=options,
    )


def _read_options(area: bytes, file: bytes, sname: bytes) -> dict[int, bytes]:
    options: dict[int, bytes] = {}
    _read_area(area, options)
    overload = options.pop(_OVERLOAD, None)
    if overload is not None:
        if len(overload) != 1 or not 1 <= overload[0] <= _IN_FILE | _IN_SNAME:
            raise Refused(DhcpRefusal.BAD_OPTIONS)
        # Options with the same code continue from one area to the next (RFC 3396 section 5).
        if overload[0] & _IN_FILE:
            _read_area(file, options)
        if overload[0] & _IN_SNAME:
            _read_area(sname, options)
        # Overloading does not nest.
        options.pop(_OVERLOAD, None)
    for code, length in _LENGTHS.items():
        if code in options and len(options[code]) != length:
            raise Refused(DhcpRefusal.BAD_OPTIONS)
    if not 1 <= len(options.get(61, b"\0")) <= _CHUNK:
        raise Refused(DhcpRefusal.BAD_OPTIONS)
    return options


def _read_area(area: bytes, into: dict[int, bytes]) -> None:
    at = count = 0
    while at < len(area):
        code = area[at]
        if code == _PAD:
            at += 1
            continue
        if code == _END:
            return
        count += 1
        if count > _OPTIONS:
            raise Refused(DhcpRefusal.BAD_OPTIONS)
        if at + 1 >= len(area) or at + 2 + area[at + 1] > len(area):
            raise Refused(DhcpRefusal.BAD_OPTIONS)
        end = at + 2 + area[at + 1]
        into[code] = into.get(code, b"") + area[at + 2 : end]
        at = end


def emit(message: Message, largest: int = 548, *, overload: bool = True) -> tuple[bytes, list[int]]:
    """Returns the bytes of a message, `largest` at most, and the codes of the options that did not fit.

    The options are placed in order: first into the options field, then, by overloading, into `file` and
    `sname`. An option that fits into none of them as a whole is split over the remaining space (RFC 3396).
    """
    options = list((message.options or {}).items())
    room = max(largest, SMALLEST) - OPTIONS_AT - 1
    file = sname = b""
    if overload and sum(len(_chunks(code, value)) for code, value in options) > room:
        (area, file, sname), left = _fill(options, [room - 3, _FILE - 1, _SNAME - 1])
        used = (_IN_FILE if file else 0) | (_IN_SNAME if sname else 0)
        area += bytes((_OVERLOAD, 1, used)) if used else b""
    else:
        (area,), left = _fill(options, [room])
    head = HEADER.pack(
        message.op,
        message.htype,
        len(message.chaddr),
        message.hops,
        message.xid,
        message.secs,
        message.flags,
        int(message.ciaddr),
        int(message.yiaddr),
        int(message.siaddr),
        int(message.giaddr),
        message.chaddr,
        sname + b"\xff" if sname else b"",
        file + b"\xff" if file else b"",
    )
    body = b"" if message.options is None else MAGIC + area + b"\xff"
    return (head + body).ljust(SMALLEST, b"\0"), left


def _chunks(code: int, value: bytes) -> bytes:
    if len(value) <= _CHUNK:
        return bytes((code, len(value))) + value
    parts = (value[at : at + _CHUNK] for at in range(0, len(value), _CHUNK))
    return b"".join(bytes((code, len(part))) + part for part in parts)


def _fill(options: list[tuple[int, bytes]], rooms: list[int]) -> tuple[list[bytes], list[int]]:
    """Returns the contents of areas of these sizes, and the codes of the options that do not fit."""
    areas, left = [b"" for _ in rooms], []
    for code, value in options:
        parts = _place(code, value, [room - len(area) for room, area in zip(rooms, areas, strict=True)])
        if parts is None:
            left.append(code)
        else:
            areas = [area + part for area, part in zip(areas, parts, strict=True)]
    return areas, left


def _place(code: int, value: bytes, free: list[int]) -> list[bytes] | None:
    """Divides an option among the areas: all of it into one if possible, else a part into each."""
    whole = _chunks(code, value)
    for number, room in enumerate(free):
        if len(whole) <= room:
            return [whole if number == at else b"" for at in range(len(free))]
    parts = []
    for room in free:
        part = b""
        while value and len(part) + 2 < room:
            take = min(_CHUNK, room - len(part) - 2)
            part += _chunks(code, value[:take])
            value = value[take:]
        parts.append(part)
    return None if value else parts
