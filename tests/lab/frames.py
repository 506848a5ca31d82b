"""Frames as a guest's driver would make them, byte by byte, for clients of the attachments."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

BROADCAST = b"\xff" * 6
GATEWAY4 = "192.168.64.1"


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ether(src: bytes, dst: bytes, kind: int, payload: bytes) -> bytes:
    return dst + src + struct.pack("!H", kind) + payload


def arp(src: bytes, sender: str, target: str) -> bytes:
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + src + packed(sender) + bytes(6) + packed(target)
    return ether(src, BROADCAST, 0x0806, body)


def ipv4(src_mac: bytes, dst_mac: bytes, src: str, dst: str, proto: int, payload: bytes) -> bytes:
    head = (
        struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, proto, 0) + packed(src) + packed(dst)
    )
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return ether(src_mac, dst_mac, 0x0800, head + payload)


def udp(src_mac: bytes, dst_mac: bytes, src: str, dst: str, ports: tuple[int, int], payload: bytes) -> bytes:
    return ipv4(src_mac, dst_mac, src, dst, 17, struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload)


def syn(src_mac: bytes, dst_mac: bytes, src: str, dst: str, ports: tuple[int, int], seq: int = 1) -> bytes:
    head = struct.pack("!HHIIBBHHH", *ports, seq, 0, 5 << 4, 2, 64240, 0, 0)
    pseudo = packed(src) + packed(dst) + struct.pack("!HH", 6, len(head))
    head = head[:16] + struct.pack("!H", checksum(pseudo + head)) + head[18:]
    return ipv4(src_mac, dst_mac, src, dst, 6, head)


def echo(src_mac: bytes, dst_mac: bytes, src: str, dst: str, number: int = 1) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, 77, number) + bytes(range(48))
    return ipv4(src_mac, dst_mac, src, dst, 1, body[:2] + struct.pack("!H", checksum(body)) + body[4:])


def discover(src: bytes, xid: int = 7) -> bytes:
    """DHCPDISCOVER (RFC 2131)."""
    body = struct.pack("!BBBBIHH", 1, 1, 6, 0, xid, 0, 0x8000) + bytes(16) + src + bytes(10 + 192)
    body += bytes.fromhex("63825363") + b"\x35\x01\x01\xff"
    return udp(src, BROADCAST, "0.0.0.0", "255.255.255.255", (68, 67), body)


@dataclass(frozen=True)
class Seen:
    """What a guest understands of a frame that came to it."""

    dst: bytes
    src: bytes
    kind: int
    payload: bytes

    @classmethod
    def of(cls, frame: bytes) -> Seen:
        assert len(frame) >= 14, frame
        return cls(frame[:6], frame[6:12], int.from_bytes(frame[12:14], "big"), frame[14:])

    @property
    def arp_reply_from(self) -> str | None:
        if self.kind == 0x0806 and self.payload[6:8] == b"\0\2":
            return str(ipaddress.ip_address(self.payload[14:18]))
        return None

    @property
    def echo_reply(self) -> int | None:
        """The sequence number of an ICMP echo reply."""
        if self.kind == 0x0800 and self.payload[9] == 1 and self.payload[20] == 0:
            return int.from_bytes(self.payload[26:28], "big")
        return None

    @property
    def offered(self) -> str | None:
        """The address that a DHCP offer names."""
        if self.kind == 0x0800 and self.payload[9] == 17 and self.payload[20:24] == b"\0\x43\0\x44":
            return str(ipaddress.ip_address(self.payload[28 + 16 : 28 + 20]))
        return None
