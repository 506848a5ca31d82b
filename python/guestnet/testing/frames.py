"""Ethernet, ARP, IPv4, UDP and TCP for an in-memory guest, built and parsed with `struct`."""

from __future__ import annotations

import struct
from dataclasses import dataclass

BROADCAST = b"\xff" * 6
ETH_IPV4, ETH_ARP = 0x0800, 0x0806
ICMP, TCP, UDP = 1, 6, 17
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def ethernet(dst: bytes, src: bytes, kind: int, payload: bytes) -> bytes:
    """An Ethernet frame."""
    return dst + src + struct.pack("!H", kind) + payload


def arp(operation: int, mac: bytes, address: bytes, target_mac: bytes, target: bytes) -> bytes:
    """An ARP message: operation 1 is a request, 2 a reply."""
    return struct.pack("!HHBBH6s4s6s4s", 1, ETH_IPV4, 6, 4, operation, mac, address, target_mac, target)


def ipv4(src: bytes, dst: bytes, protocol: int, payload: bytes) -> bytes:
    """An IPv4 packet without options that must not be fragmented."""
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0, src, dst)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def _sum_with_pseudo(src: bytes, dst: bytes, protocol: int, segment: bytes) -> int:
    return checksum(src + dst + struct.pack("!HH", protocol, len(segment)) + segment)


def udp(src: bytes, dst: bytes, src_port: int, dst_port: int, payload: bytes) -> bytes:
    """A UDP datagram in its IPv4 packet."""
    head = struct.pack("!HHHH", src_port, dst_port, 8 + len(payload), 0)
    total = _sum_with_pseudo(src, dst, UDP, head + payload) or 0xFFFF
    return ipv4(src, dst, UDP, head[:6] + struct.pack("!H", total) + payload)


def echo(src: bytes, dst: bytes, kind: int, identity: int, sequence: int, payload: bytes) -> bytes:
    """An ICMP echo request (kind 8) or reply (kind 0) in its IPv4 packet."""
    message = struct.pack("!BBHHH", kind, 0, 0, identity, sequence) + payload
    return ipv4(src, dst, ICMP, message[:2] + struct.pack("!H", checksum(message)) + message[4:])


def parse_icmp(packet: Packet) -> tuple[int, int, int, int, bytes] | None:
    """Type, code, identity, sequence number and payload; None when malformed."""
    if len(packet.payload) < 8 or checksum(packet.payload):
        return None
    kind, code, _, identity, sequence = struct.unpack_from("!BBHHH", packet.payload)
    return kind, code, identity, sequence, packet.payload[8:]


@dataclass(frozen=True)
class Segment:
    """A TCP segment, without the options that the guest does not use."""

    src_port: int
    dst_port: int
    seq: int
    ack: int
    flags: int
    window: int
    payload: bytes = b""


def tcp(src: bytes, dst: bytes, segment: Segment, mss: int = 0) -> bytes:
    """A TCP segment in its IPv4 packet; `mss` is offered when it is not 0."""
    options = struct.pack("!BBH", 2, 4, mss) if mss else b""
    head = struct.pack(
        "!HHIIBBHHH",
        segment.src_port,
        segment.dst_port,
        segment.seq,
        segment.ack,
        (20 + len(options)) << 2,
        segment.flags,
        segment.window,
        0,
        0,
    )
    head += options
    total = _sum_with_pseudo(src, dst, TCP, head + segment.payload)
    return ipv4(src, dst, TCP, head[:16] + struct.pack("!H", total) + head[18:] + segment.payload)


@dataclass(frozen=True)
class Packet:
    """A parsed IPv4 packet."""

    src: bytes
    dst: bytes
    protocol: int
    payload: bytes


def parse_ipv4(data: bytes) -> Packet | None:
    """The packet, None if it is incomplete or its checksum is wrong."""
    if len(data) < 20 or data[0] >> 4 != 4:
        return None
    head, length = (data[0] & 15) * 4, struct.unpack_from("!H", data, 2)[0]
    if head < 20 or not head <= length <= len(data) or checksum(data[:head]):
        return None
    return Packet(data[12:16], data[16:20], data[9], data[head:length])


def parse_ipv4_head(data: bytes) -> Packet | None:
    """The start of a packet, as an ICMP error quotes it."""
    if len(data) < 28 or data[0] >> 4 != 4 or (head := (data[0] & 15) * 4) < 20 or len(data) < head + 8:
        return None
    return Packet(data[12:16], data[16:20], data[9], data[head:])


def parse_udp(packet: Packet) -> tuple[int, int, bytes] | None:
    """Ports and payload, None when malformed."""
    if len(packet.payload) < 8:
        return None
    src_port, dst_port, length, total = struct.unpack_from("!HHHH", packet.payload)
    if not 8 <= length <= len(packet.payload):
        return None
    datagram = packet.payload[:length]
    if total and _sum_with_pseudo(packet.src, packet.dst, UDP, datagram):
        return None
    return src_port, dst_port, datagram[8:]


def parse_tcp(packet: Packet) -> Segment | None:
    """The segment, None when malformed."""
    if len(packet.payload) < 20 or _sum_with_pseudo(packet.src, packet.dst, TCP, packet.payload):
        return None
    src_port, dst_port, seq, ack, offset, flags, window = struct.unpack_from("!HHIIBBH", packet.payload)
    head = (offset >> 4) * 4
    if not 20 <= head <= len(packet.payload):
        return None
    return Segment(src_port, dst_port, seq, ack, flags, window, packet.payload[head:])
