"""Captures as files, read as a stream: pcap (both byte orders, micro- and nanoseconds) and pcapng.

Theory of operation: a `Chunk` is some megabytes of a file, with the places of the complete packets in it. A
caller that changes packets in place and writes the bytes of the chunk gets a capture of the same format.
Every block and option that this module does not know is kept. Formats: draft-ietf-opsawg-pcap,
draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from guestnet.errors import ConfigError

CHUNK = 4 << 20
TIME_END = 1 << 63
"""Nanoseconds since 1970, until the year 2262."""
PACKET_LONGEST = 16 << 20
"""Bytes of the longest record that is believed."""
ETHERNET, RAW, LOOP, SLL, IPV4, SLL2, NULL = 1, 101, 108, 113, 228, 276, 0
_RAW_OTHERS = (12, 14)
"""What some systems write for raw IP."""
_PCAP = {0xA1B2C3D4: 1000, 0xA1B23C4D: 1}
"""Magic numbers of pcap, with the nanoseconds of the fraction's unit."""
_SECTION, _INTERFACE, _OLD_PACKET, _SIMPLE, _PACKET = 0x0A0D0D0A, 1, 2, 3, 6
_ORDER = 0x1A2B3C4D
_TSRESOL, _TSOFFSET = 9, 14
_TAGS = (b"\x81\x00", b"\x88\xa8")
_SHORTEST = {_SECTION: 28, _INTERFACE: 20, _OLD_PACKET: 32, _SIMPLE: 16, _PACKET: 32}


class CaptureError(ConfigError):
    """A file is not a capture, or it ends or contradicts itself in the middle."""


class Packet(NamedTuple):
    """Where a packet is in its chunk."""

    start: int
    """Of its record or block, which goes on to `end`."""
    end: int
    at: int
    """Of its first byte."""
    length: int
    """Bytes that were captured."""
    time: int
    """Nanoseconds since 1970, 0 where the file does not say."""
    link: int
    """Link type, as in https://www.tcpdump.org/linktypes.html."""
    interface: int


@dataclass
class Chunk:
    """A part of a file: whole records, `used` bytes of `data`."""

    data: bytearray
    used: int
    packets: list[Packet]


class _Interface(NamedTuple):
    link: int
    unit: tuple[int, int]
    """Nanoseconds of a tick, as a fraction."""
    offset: int


class CaptureFile:
    """Reads a capture from a binary stream, which need not be seekable.

    `name` is the name of the file in errors. Raises CaptureError, with the place in the file, for a file that
    is not a capture.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self.name = name
        self.taken = 0
        """Bytes read so far."""
        self._data = bytearray()
        self._order = "<"
        self._interfaces: list[_Interface] = []
        if not self._fill(24):
            self._refuse("is empty" if not self._data else "is too short to be a capture")
        self.is_pcapng = self._data[:4] == b"\x0a\x0d\x0d\x0a"
        if not self.is_pcapng:
            self._pcap_header()

    def _refuse(self, why: str) -> None:
        place = "" if not self.taken else f" (at byte {self.taken - len(self._data)})"
        raise CaptureError(f"{self.name} {why}{place}: give a pcap or pcapng file.")

    def _fill(self, count: int) -> bool:
        """Has at least `count` bytes ready, where the file has so many."""
        while len(self._data) < count:
            more = self._stream.read(max(count - len(self._data), 1 << 16))
            if not more:
                return False
            self._data += more
            self.taken += len(more)
        return True

    def _pcap_header(self) -> None:
        for order in "<>":
            magic, _, _, _, _, _, link = struct.unpack_from(order + "IHHiIII", self._data)
            if magic in _PCAP:
                self._order = order
                self._interfaces = [_Interface(link & 0xFFFF, (_PCAP[magic], 1), 0)]
                return
        self._refuse("is no capture")

    # ---- reading ----------------------------------------------------------------------------------------

    def chunks(self) -> Iterator[Chunk]:
        """Returns the whole file in parts of some megabytes. The first begins with the header of the file."""
        first = True
        while True:
            more = self._fill(CHUNK)
            if not self._data:
                return
            at = 24 if first and not self.is_pcapng else 0
            first = False
            packets: list[Packet] = []
            used = (self._blocks if self.is_pcapng else self._records)(at, packets)
            if not used:
                if more:
                    # A record that is longer than a chunk: at most as long as one is believed to be.
                    self._fill(len(self._data) + PACKET_LONGEST)
                    continue
                self._refuse("ends in the middle of a packet")
            chunk = Chunk(self._data, used, packets)
            self._data = self._data[used:]
            yield chunk
            if not more and not self._data:
                return

    def _records(self, at: int, packets: list[Packet]) -> int:
        """Finds the records of a pcap; returns where the first begins that is not whole."""
        data, size = self._data, len(self._data)
        unpack = struct.Struct(self._order + "IIII").unpack_from
        link, (unit, _), _ = self._interfaces[0]
        while at + 16 <= size:
            seconds, fraction, length, _original = unpack(data, at)
            if length > PACKET_LONGEST:
                self._refuse(f"has a packet of {length} bytes, which cannot be")
            end = at + 16 + length
            if end > size:
                break
            packets.append(
                Packet(at, end, at + 16, length, seconds * 1_000_000_000 + fraction * unit, link, 0)
            )
            at = end
        return at

    def _blocks(self, at: int, packets: list[Packet]) -> int:
        data, size = self._data, len(self._data)
        while at + 12 <= size:
            kind = int.from_bytes(data[at : at + 4], "little")
            if kind == _SECTION:
                order = struct.unpack_from("<I", data, at + 8)[0]
                self._order = "<" if order == _ORDER else ">"
                if struct.unpack_from(self._order + "I", data, at + 8)[0] != _ORDER:
                    self._refuse("has a section of no known byte order")
                self._interfaces = []
            kind, length = struct.unpack_from(self._order + "II", data, at)
            if length % 4 or not max(12, _SHORTEST.get(kind, 0)) <= length <= PACKET_LONGEST:
                self._refuse(f"has a block of {length} bytes, which cannot be")
            end = at + length
            if end > size:
                break
            if kind == _INTERFACE:
                self._interfaces.append(self._interface(at, end))
            elif kind in (_PACKET, _OLD_PACKET, _SIMPLE):
                packets.append(self._packet(kind, at, end))
            at = end
        return at

    def _interface(self, at: int, end: int) -> _Interface:
        link = struct.unpack_from(self._order + "H", self._data, at + 8)[0]
        unit, offset = (1000, 1), 0
        at += 16
        while at + 4 <= end - 4:
            code, length = struct.unpack_from(self._order + "HH", self._data, at)
            value = self._data[at + 4 : at + 4 + length]
            if code == 0:
                break
            if code == _TSRESOL and value:
                base, power = (2 if value[0] & 0x80 else 10), value[0] & 0x7F
                unit = (1_000_000_000, base**power)
            elif code == _TSOFFSET and len(value) == 8:
                offset = struct.unpack(self._order + "q", value)[0] * 1_000_000_000
            at += 4 + (length + 3) // 4 * 4
        return _Interface(link, unit, offset)

    def _packet(self, kind: int, at: int, end: int) -> Packet:
        number, high, low, length = 0, 0, 0, 0
        if kind == _PACKET:
            number, high, low, length = struct.unpack_from(self._order + "IIII", self._data, at + 8)
            data = at + 28
        elif kind == _OLD_PACKET:
            number, _, high, low, length = struct.unpack_from(self._order + "HHIII", self._data, at + 8)
            data = at + 28
        else:
            data = at + 12
            length = min(struct.unpack_from(self._order + "I", self._data, at + 8)[0], end - 4 - data)
        if number >= len(self._interfaces):
            self._refuse(f"has a packet of interface {number}, which it does not describe")
        if data + length > end - 4:
            self._refuse("has a packet that is longer than its block")
        link, (up, down), offset = self._interfaces[number]
        time = (high << 32 | low) * up // down + offset if kind != _SIMPLE else 0
        if not 0 <= time < TIME_END:
            self._refuse("has a packet of a time that cannot be")
        return Packet(at, end, data, length, time, link, number)

    # ---- writing ----------------------------------------------------------------------------------------

    def record(self, data: bytes, like: Packet) -> bytes:
        """Makes a record of this format for another packet, with the time and interface of `like`."""
        if not self.is_pcapng:
            seconds, left = divmod(like.time, 1_000_000_000)
            unit = self._interfaces[0].unit[0]
            return struct.pack(self._order + "IIII", seconds, left // unit, len(data), len(data)) + data
        _, (up, down), offset = self._interfaces[like.interface]
        ticks = max(0, like.time - offset) * down // up
        padded = data + bytes(-len(data) % 4)
        length = 32 + len(padded)
        head = struct.pack(
            self._order + "IIIIIII",
            _PACKET,
            length,
            like.interface,
            ticks >> 32 & 0xFFFFFFFF,
            ticks & 0xFFFFFFFF,
            len(data),
            len(data),
        )
        return head + padded + struct.pack(self._order + "I", length)


def ip_offset(data: bytearray, at: int, length: int, link: int) -> int:
    """How many bytes of link header an IPv4 packet has before it; -1 for what is none."""
    if link == ETHERNET:
        offset = 14
        while data[at + offset - 2 : at + offset] in _TAGS and offset < 22:
            offset += 4
        is_ip = data[at + offset - 2 : at + offset] == b"\x08\x00"
    elif link in (RAW, IPV4, *_RAW_OTHERS):
        offset, is_ip = 0, True
    elif link == SLL:
        offset, is_ip = 16, data[at + 14 : at + 16] == b"\x08\x00"
    elif link == SLL2:
        offset, is_ip = 20, data[at : at + 2] == b"\x08\x00"
    elif link in (NULL, LOOP):
        offset, is_ip = 4, 2 in (data[at], data[at + 3]) if length >= 4 else False
    else:
        return -1
    if not is_ip or length < offset + 20 or data[at + offset] >> 4 != 4:
        return -1
    return offset
