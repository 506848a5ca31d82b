#!/usr/bin/env python3
"""Writes the committed seed corpora: an honest frame of each kind, so that fuzzing starts past headers."""

from __future__ import annotations

import ipaddress
import struct
from pathlib import Path

HERE = Path(__file__).resolve().parent
GUEST, GATEWAY = bytes.fromhex("5294ef000002"), bytes.fromhex("5294ef000001")
GUEST4, GATEWAY4, OUTSIDE4 = (
    ipaddress.ip_address(a).packed for a in ("192.168.64.2", "192.168.64.1", "203.0.113.2")
)
OTHER = bytes.fromhex("5294ef000003")
LOCAL6, OTHER6 = (ipaddress.ip_address(a).packed for a in ("fe80::2", "fe80::3"))
GUEST6, OUTSIDE6 = (ipaddress.ip_address(a).packed for a in ("fd00::2", "2001:db8::2"))


def checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ether(kind: int, payload: bytes, dst: bytes = GATEWAY) -> bytes:
    return dst + GUEST + struct.pack("!H", kind) + payload


def ipv4(
    proto: int,
    payload: bytes,
    dst: bytes = OUTSIDE4,
    frag: int = 0,
    options: bytes = b"",
    ident: int = 7,
    ttl: int = 64,
) -> bytes:
    ihl = 5 + len(options) // 4
    head = (
        struct.pack("!BBHHHBBH", 0x40 | ihl, 0, ihl * 4 + len(payload), ident, frag, ttl, proto, 0)
        + GUEST4
        + dst
        + options
    )
    return ether(0x0800, head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload)


def with_sum(proto: int, segment: bytes, at: int, src: bytes = GUEST4, dst: bytes = OUTSIDE4) -> bytes:
    pseudo = src + dst + struct.pack("!II", len(segment), proto)
    return segment[:at] + struct.pack("!H", checksum(pseudo + segment)) + segment[at + 2 :]


def tcp(
    flags: int, payload: bytes = b"", options: bytes = b"", port: int = 80, seq: int = 1000, ack: int = 0
) -> bytes:
    head = struct.pack("!HHIIBBHHH", 40000, port, seq, ack, (5 + len(options) // 4) << 4, flags, 64240, 0, 0)
    return ipv4(6, with_sum(6, head + options + payload, 16))


def udp(port: int, payload: bytes, dst: bytes = OUTSIDE4) -> bytes:
    return ipv4(
        17, with_sum(17, struct.pack("!HHHH", 40001, port, 8 + len(payload), 0) + payload, 6, dst=dst), dst
    )


def echo(dst: bytes = OUTSIDE4, ttl: int = 64) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, 99, 1) + bytes(range(56))
    return ipv4(1, body[:2] + struct.pack("!H", checksum(body)) + body[4:], dst, ttl=ttl)


def arp(target: bytes) -> bytes:
    return ether(
        0x0806, struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + GUEST + GUEST4 + bytes(6) + target, b"\xff" * 6
    )


def ipv6_udp() -> bytes:
    segment = with_sum(17, struct.pack("!HHHH", 40001, 53, 12, 0) + b"abcd", 6, GUEST6, OUTSIDE6)
    return ether(0x86DD, struct.pack("!IHBB", 6 << 28, len(segment), 17, 64) + GUEST6 + OUTSIDE6 + segment)


def ipv6(next_header: int, payload: bytes, src: bytes = LOCAL6, dst: bytes = OTHER6) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(payload), next_header, 255) + src + dst
    return ether(0x86DD, head + payload, OTHER)


def neighbour(kind: int, target: bytes, option: int) -> bytes:
    return ipv6(58, struct.pack("!BBHI", kind, 0, 0, 0) + target + bytes([option, 1]) + GUEST)


def wrapped(headers: int, message: bytes) -> bytes:
    """An ICMPv6 message behind so many destination options."""
    chain = b"".join(bytes([60 if i + 1 < headers else 58, 0, 1, 4, 0, 0, 0, 0]) for i in range(headers))
    return ipv6(60, chain + message)


ADVERTISEMENT = struct.pack("!BBHI", 134, 0, 0, 0) + bytes(8)
SYN_OPTIONS = bytes.fromhex("020405b40402080a00000001000000000103030a")
FRAMES = {
    "arp": arp(GATEWAY4),
    "syn": tcp(0x02, options=SYN_OPTIONS),
    "syn_gateway_dns": tcp(0x02, options=SYN_OPTIONS, port=53),
    "ack_data": tcp(0x18, b"GET / HTTP/1.0\r\n\r\n", seq=1001, ack=1),
    "fin": tcp(0x11, seq=1019, ack=1),
    "rst": tcp(0x04, seq=1001),
    "udp": udp(9999, b"hello"),
    "dns": udp(53, bytes.fromhex("1234010000010000000000000161026d65000001 0001".replace(" ", "")), GATEWAY4),
    "echo": echo(),
    "echo_gateway": echo(GATEWAY4),
    "echo_ttl_1": echo(ttl=1),
    "fragment_first": ipv4(17, struct.pack("!HHHH", 40001, 9999, 24, 0) + bytes(8), frag=0x2000),
    "fragment_last": ipv4(17, bytes(8), frag=2),
    "ip_options": ipv4(17, struct.pack("!HHHH", 1, 2, 8, 0), options=bytes.fromhex("94040000")),
    "vlan": ether(0x8100, b"\0\1\x08\0" + bytes(46)),
    "ipv6_udp": ipv6_udp(),
    "ndp_solicitation": neighbour(135, OTHER6, 1),
    "ndp_advertisement": neighbour(136, LOCAL6, 2),
    "ndp_router": wrapped(2, ADVERTISEMENT),
    "ndp_router_deep": wrapped(9, ADVERTISEMENT),
    "ndp_router_fragment": ipv6(44, bytes([58, 0, 0, 1, 0, 0, 0, 9]) + ADVERTISEMENT),
    "udp_to_nobody": udp(0, b"x", bytes(4)),
    "broadcast": ether(0x0800, udp(67, bytes(40), b"\xff" * 4)[14:], b"\xff" * 6),
    "tcp_to_guest": ether(0x0800, tcp(0x10, bytes(1400))[14:], OTHER),
}


def write(target: str, name: str, data: bytes) -> None:
    path = HERE / "corpus" / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def raw(frame: bytes, flags: int = 0) -> bytes:
    """A step of core_frames: a frame from port 0."""
    return struct.pack("!BBH", 0, flags, len(frame)) + frame


def answer(flags: int, length: int = 0, which: int = 0) -> bytes:
    """A step: the segment that continues the conversation, nothing off."""
    return struct.pack("!BBBHbbH", 4, which, flags, length, 0, 0, 64240)


CONNECTED = bytes([7, 0, 0])
REFUSED = bytes([7, 0, 1])
BATCH_END = bytes([14])


def sock(what: int, length: int = 0) -> bytes:
    """A step on the first TCP socket: 1 data, 2 end, 4 room, 8 room for all."""
    return struct.pack("!BBBH", 8, 0, what, length)


def wait(ms: int) -> bytes:
    return struct.pack("!BH", 13, ms)


def names(what: int, n: int) -> bytes:
    """A step about names: 0 a guest asks, 2 a server answers, 4 an answer to keep, 6 the service speaks."""
    return struct.pack("!BBHBB", 15, 4 | what << 3, 0, n, 0)


def datagram(what: int, length: int) -> bytes:
    return struct.pack("!BBBBH", 10, 0, what, 0, length)


def opening(what: int, bits: int, seq: int) -> bytes:
    """A step: a guest opens a connection with options; 16: the host takes it at once."""
    return struct.pack("!BBBHH", 16, what, 0, bits, seq)


def speak(what: int, choice: int, cut: int = 0) -> bytes:
    """A step under rules about names: 0 new rules, 1 a pin, 2 a QUIC datagram, 3 a line of a connection."""
    return bytes([19, what, choice, cut])


STAMPED = 1 << 11
"""In the length of an answer: it has a timestamp."""
OPEN = raw(FRAMES["arp"]) + raw(FRAMES["syn"]) + CONNECTED + answer(0x10)
STRICT = raw(FRAMES["arp"]) + speak(0, 1) + speak(1, 0, 200)
READ = STRICT + opening(16, 0x5D, 0) + answer(0x10)
PROGRAMS = {
    "tls_allowed": READ
    + speak(3, 0)
    + BATCH_END
    + sock(1, 100)
    + speak(3, 2)
    + BATCH_END
    + speak(3, 3)
    + BATCH_END
    + answer(0x11),
    "tls_twice": READ
    + speak(3, 0)
    + BATCH_END
    + speak(3, 1)
    + BATCH_END
    + sock(2)
    + BATCH_END
    + answer(0x10),
    "tls_denied": READ + speak(3, 1) + BATCH_END * 2 + answer(0x10) + answer(0x11) + wait(3000),
    "tls_slow": READ + speak(3, 0, 2 | 40) + BATCH_END + wait(10100) + BATCH_END,
    "http_pipelined": READ
    + speak(3, 54, 1)
    + BATCH_END
    + sock(1, 60)
    + answer(0x10)
    + sock(2)
    + BATCH_END * 2,
    "http_bodies": READ
    + speak(3, 6)
    + answer(0x18, 40)
    + speak(3, 7)
    + answer(0x18, 5)
    + speak(3, 9)
    + BATCH_END,
    "other_protocol": raw(FRAMES["arp"]) + speak(0, 2) + opening(16, 0x5D, 0) + answer(0x10) + speak(3, 8),
    "rules_change": READ + speak(3, 0) + BATCH_END + speak(0, 3) + wait(1) + BATCH_END,
    "quic": STRICT + speak(2, 0) + speak(2, 6) + speak(2, 2) + speak(2, 3) + speak(2, 4) + wait(10100),
    "quic_half": STRICT + speak(2, 1) + speak(2, 5) + speak(2, 1) + wait(10100) + wait(60000) * 6,
    "refused": raw(FRAMES["syn"]) + REFUSED,
    "download": OPEN + sock(1, 20000) + answer(0x10) + sock(2) + answer(0x10) + answer(0x11) + answer(0x10),
    "upload": OPEN
    + answer(0x18, 1460) * 3
    + BATCH_END
    + sock(4, 100)
    + answer(0x18, 1460)
    + sock(8)
    + answer(0x11),
    "half_close": OPEN + answer(0x11) + BATCH_END + sock(1, 300) + answer(0x10) + sock(2) + answer(0x10),
    "options": raw(FRAMES["arp"])
    + opening(16, 0x5D, 0)
    + answer(0x10, STAMPED)
    + answer(0x18, STAMPED | 700)
    + sock(1, 20000)
    + answer(0x10, STAMPED)
    + sock(2)
    + answer(0x11, STAMPED),
    "published_moves": raw(FRAMES["arp"]) + bytes([11, 0, 1, 0, 0, 18, 0x16, 11, 0, 2, 0, 0, 18, 0x07]),
    "reset_by_guest": OPEN + answer(0x14) + wait(1000),
    "reset_by_host": OPEN + sock(0x70, 1),
    "lost_ack": OPEN + sock(1, 3000) + wait(400) + wait(800) + wait(1600) + answer(0x10),
    "inbound": raw(FRAMES["arp"])
    + bytes([11, 0, 0, 0, 0])
    + answer(0x12)
    + sock(1, 100)
    + answer(0x18, 50)
    + sock(2),
    "udp": raw(FRAMES["udp"]) + datagram(0, 100) + datagram(2, 4000) + datagram(12, 1) + wait(60000) * 6,
    "udp_forward": raw(FRAMES["arp"]) + bytes([11, 1, 0, 0, 40]) + raw(FRAMES["udp"]),
    "echo": raw(FRAMES["echo"]) + datagram(8, 64) + raw(FRAMES["echo_ttl_1"]) + raw(FRAMES["echo_gateway"]),
    "fragments": raw(FRAMES["fragment_last"]) + raw(FRAMES["fragment_first"]) + wait(40000),
    "services": raw(FRAMES["dns"])
    + bytes([15, 0])
    + struct.pack("!H", 4000)
    + raw(FRAMES["syn_gateway_dns"])
    + CONNECTED,
    # The service speaks and allows to ask; a guest asks for a name of others twice; it is answered, and
    # known; one of the network's own is kept, and known; guests change; time ends all.
    "names": raw(FRAMES["arp"])
    + names(6, 0)
    + names(6, 6)
    + names(0, 1) * 2
    + names(2, 3)
    + names(0, 3)
    + names(0, 0)
    + names(4 | 8, 0)
    + names(0, 2)
    + names(6, 65)
    + names(0, 0)
    + names(0, 9)
    + wait(1000)
    + wait(60000),
    "full_port": OPEN + bytes([12, 0, 0, 100]) + sock(1, 20000) + bytes([12, 4, 0, 0]) + answer(0x10),
    "port_gone": OPEN + raw(FRAMES["udp"]) + bytes([12, 8, 0, 0]) + sock(1, 100) + bytes([12, 10, 0, 0]),
    "neighbours": raw(FRAMES["ndp_solicitation"])
    + raw(FRAMES["ndp_advertisement"])
    + raw(FRAMES["ndp_router"])
    + raw(FRAMES["ndp_router_deep"])
    + raw(FRAMES["ndp_router_fragment"]),
    # Offload requests: UDP in pieces of 500 and of 1, TCP to a guest, from each kind of port.
    "offload": raw(FRAMES["udp"], 0x24)
    + struct.pack("!H", 500)
    + raw(FRAMES["udp"], 0x24)
    + struct.pack("!H", 1)
    + raw(FRAMES["tcp_to_guest"], 0x14)
    + struct.pack("!H", 500)
    + raw(FRAMES["tcp_to_guest"], 0x54)
    + struct.pack("!H", 1),
    "floods": raw(FRAMES["arp"]) + raw(FRAMES["broadcast"]) * 3 + raw(FRAMES["broadcast"], 0x40),
    "mapping": raw(FRAMES["udp"]) + raw(FRAMES["udp_to_nobody"]) + wait(60000) * 6 + raw(FRAMES["udp"], 1),
    "rest": raw(FRAMES["ip_options"]) + raw(FRAMES["vlan"]) + raw(FRAMES["ipv6_udp"]) + raw(FRAMES["rst"]),
}


def vhost_guest(features: int) -> bytes:
    """Features, choices and the memory of a guest: an honest frame in one queue, buffers in the other."""
    head = struct.pack("<I", features)[:3] + bytes([1, 0, 0, 0x14, 0x12, 0, 0])
    base, buffers, place, table = 0x1000, 0x400, 0xC00, 0xF00
    memory = bytearray(0x1000)

    def queue(at: int, descriptors: list[tuple[int, int, int, int]], heads: list[int]) -> None:
        for i, descriptor in enumerate(descriptors):
            struct.pack_into("<QIHH", memory, at + 16 * i, *descriptor)
        struct.pack_into(f"<HH{len(heads)}H", memory, at + 128, 0, len(heads), *heads)

    queue(0, [(base + buffers + 0x100 * i, 0x100, 2, 0) for i in range(8)], list(range(8)))
    frame = bytes(12) + FRAMES["udp"]
    memory[place : place + len(frame)] = frame
    struct.pack_into("<QIHH", memory, table, base + place, len(frame), 0, 0)
    chain = [(base + place, 12, 1, 1), (base + place + 12, len(frame) - 12, 0, 0), (base + table, 16, 4, 0)]
    queue(0x200, chain, [0, 2])
    # Then the same again for the second time.
    return head + bytes(memory) + bytes(memory[:0x400])


def dns_answer(rcode: int, counts: tuple[int, int, int], records: bytes) -> bytes:
    head = struct.pack("!HHHHHH", 0, 0x8180 | rcode, 1, *counts)
    return head + b"\3www\2ab\0" + struct.pack("!HH", 1, 1) + records


def dns_record(kind: int, ttl: int, data: bytes, kind_of: int = 1) -> bytes:
    return struct.pack("!HHHIH", 0xC00C, kind, kind_of, ttl, len(data)) + data


DNS_ANSWERS = {
    "address": dns_answer(0, (1, 0, 0), dns_record(1, 60, OUTSIDE4)),
    "ttl_is_none": dns_answer(0, (1, 0, 0), dns_record(1, 1 << 31, OUTSIDE4)),
    "no_such_name": dns_answer(3, (0, 1, 0), dns_record(6, 300, b"\0\0" + bytes(16) + b"\0\0\0\x3c")),
    "explained": dns_answer(2, (0, 0, 1), bytes.fromhex("000029 04d0 00000000 0006 000f 0002 0016")),
}


def client_hello(name: bytes) -> bytes:
    """A ClientHello in a record."""
    server_name = struct.pack("!HHHBH", 0, len(name) + 5, len(name) + 3, 0, len(name)) + name
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    body += struct.pack("!H", len(server_name)) + server_name
    return struct.pack("!BHHBBH", 22, 0x0301, len(body) + 4, 1, 0, len(body)) + body


CONVERSATIONS = {
    "client_hello": client_hello(b"ok.example"),
    "request": b"GET / HTTP/1.1\r\nHost: ok.example\r\n\r\n",
    "chunked": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
    "two_requests": 2 * b"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab",
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
}
PROXY_REPLIES = {
    "socks5": b"\0\x05\x00\x05\x00\x00\x01\x0a\x00\x00\x01\x12\x34hello",
    "socks5_credentials": b"\x02\x05\x02\x01\x00\x05\x00\x00\x03\x04host\x00\x50hello",
    "socks5_refused": b"\0\x05\x00\x05\x05",
    "http": b"\x01HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nhello",
    "http_refused": b"\x03HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
}
RECORDED = HERE.parent / "crates" / "guestnet-wire" / "src" / "inspect" / "data"


def main() -> None:
    for name, stream in CONVERSATIONS.items():
        write("inspect", name, b"\x10" + stream)
    for recording in RECORDED.glob("*.bin"):
        write("inspect", recording.stem, b"\x10" + recording.read_bytes())
    for name, replies in PROXY_REPLIES.items():
        write("proxy", name, replies)
    for name, frame in FRAMES.items():
        write("wire_parse", name, b"\0\0" + frame)
    for name, message in DNS_ANSWERS.items():
        write("wire_parse", f"dns_answer_{name}", b"\0\x02" + message)
    for name in ("arp", "syn", "udp", "ack_data"):
        frame = FRAMES[name]
        framed = struct.pack("!I", len(frame)) + frame
        write("attachments", f"stream_{name}", b"\x14" + framed + framed)
        # virtio_net_hdr: NEEDS_CSUM from byte 34, TCPv4 or UDP segments of 500.
        offset, kind = (6, 5) if name == "udp" else (16, 1)
        write(
            "attachments",
            f"vnet_{name}",
            b"\0" + struct.pack("<BBHHHH", 1, kind, 54, 500, 34, offset) + frame,
        )
    for name, program in PROGRAMS.items():
        write("core_frames", name, program)
    for name, features in (("nothing", 0), ("everything", 0xFFFFFF)):
        write("vhost_guest", name, vhost_guest(features))


if __name__ == "__main__":
    main()
