"""IPv4 packets by hand, with all checksums, and a check of all checksums."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

ICMP, TCP, UDP = 1, 6, 17


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packed(address: str) -> bytes:
    return IPv4Address(address).packed


def ipv4(src: str, dst: str, proto: int, payload: bytes, *, ttl: int = 64, df: bool = True) -> bytearray:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, 0x4000 if df else 0, ttl, proto, 0)
    head += packed(src) + packed(dst)
    return bytearray(head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload)


def _sum(src: str, dst: str, proto: int, segment: bytes, at: int) -> bytes:
    pseudo = packed(src) + packed(dst) + struct.pack("!BBH", 0, proto, len(segment))
    value = checksum(pseudo + segment) or (0xFFFF if proto == UDP else 0)
    return segment[:at] + struct.pack("!H", value) + segment[at + 2 :]


def udp(src: tuple[str, int], dst: tuple[str, int], data: bytes = b"data", **ip: int) -> bytearray:
    segment = struct.pack("!HHHH", src[1], dst[1], 8 + len(data), 0) + data
    return ipv4(src[0], dst[0], UDP, _sum(src[0], dst[0], UDP, segment, 6), **ip)


def tcp(src: tuple[str, int], dst: tuple[str, int], flags: int = 2, data: bytes = b"") -> bytearray:
    segment = struct.pack("!HHIIBBHHH", src[1], dst[1], 1, 1, 0x50, flags, 1000, 0, 0) + data
    return ipv4(src[0], dst[0], TCP, _sum(src[0], dst[0], TCP, segment, 16))


def echo(src: str, dst: str, ident: int, *, reply: bool = False) -> bytearray:
    body = struct.pack("!BBHHH", 0 if reply else 8, 0, 0, ident, 1) + b"ping"
    return ipv4(src, dst, ICMP, body[:2] + struct.pack("!H", checksum(body)) + body[4:])


def source(packet: bytes) -> tuple[str, int]:
    return str(IPv4Address(bytes(packet[12:16]))), int.from_bytes(packet[20:22], "big")


def destination(packet: bytes) -> tuple[str, int]:
    return str(IPv4Address(bytes(packet[16:20]))), int.from_bytes(packet[22:24], "big")


def check(packet: bytes) -> None:
    """Every checksum by full recomputation."""
    packet = bytes(packet)
    assert checksum(packet[:20]) == 0
    if packet[9] == ICMP:
        assert checksum(packet[20:]) == 0
    elif packet[9] == TCP or packet[26:28] != b"\0\0":
        pseudo = packet[12:20] + struct.pack("!BBH", 0, packet[9], len(packet) - 20)
        assert checksum(pseudo + packet[20:]) == 0


def ethernet(packet: bytes, *, src: bytes = b"\x02guest", dst: bytes = b"\x02gatew") -> bytes:
    return dst + src + b"\x08\x00" + bytes(packet)
