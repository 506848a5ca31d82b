"""Captures for tests, written by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterable

Frames = Iterable[tuple[int, bytes]]
"""Times in nanoseconds, and bytes."""


def pcap(
    frames: Frames, *, order: str = "<", nano: bool = False, link: int = 1, snaplen: int = 1 << 18
) -> bytes:
    unit = 1 if nano else 1000
    magic = 0xA1B23C4D if nano else 0xA1B2C3D4
    out = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, snaplen, link)
    for time, frame in frames:
        seconds, left = divmod(time, 10**9)
        kept = frame[:snaplen]
        out += struct.pack(order + "IIII", seconds, left // unit, len(kept), len(frame)) + kept
    return out


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    return struct.pack(order + "II", kind, len(body) + 12) + body + struct.pack(order + "I", len(body) + 12)


def pcapng(
    frames: Frames, *, order: str = "<", link: int = 1, resolution: int | None = None, snaplen: int = 1 << 18
) -> bytes:
    """`resolution` is the byte of if_tsresol; None: microseconds, unsaid."""
    out = block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)
    options = b""
    if resolution is not None:
        options = struct.pack(order + "HHB3x", 9, 1, resolution) + struct.pack(order + "HH", 0, 0)
    out += block(1, struct.pack(order + "HHI", link, 0, snaplen) + options, order)
    base, power = (2 if (resolution or 6) & 0x80 else 10), (6 if resolution is None else resolution) & 0x7F
    for time, frame in frames:
        ticks, kept = time * base**power // 10**9, frame[:snaplen]
        head = struct.pack(order + "IIIII", 0, ticks >> 32, ticks & 0xFFFFFFFF, len(kept), len(frame))
        comment = struct.pack(order + "HH4sHH", 1, 4, b"kept", 0, 0)
        out += block(6, head + kept + bytes(-len(kept) % 4) + comment, order)
    return out + block(0x40000001, b"of nobody's business", order)


def interfaces(content: bytes) -> list[tuple[str, list[bytes]]]:
    """The interfaces of a pcapng capture (little-endian): each name, and the frames seen there."""
    found: list[tuple[str, list[bytes]]] = []
    at = 0
    while at < len(content):
        kind, length = struct.unpack_from("<II", content, at)
        body = content[at + 8 : at + length - 4]
        if kind == 1:
            code, size = struct.unpack_from("<HH", body, 8)
            assert code == 2, "if_name comes first"
            found.append((body[12 : 12 + size].decode(), []))
        elif kind == 6:
            number, _, _, kept, _ = struct.unpack_from("<IIIII", body)
            found[number][1].append(body[20 : 20 + kept])
        at += length
    return found
