"""odd_frames.py SEED: a guest that is root in its namespace sends frames whose headers, and virtio headers,
say what is not so: segments that are none, checksums to be summed beyond the packet, headers cut off.

The kernel refuses most of them; what it lets through reaches guestnet as a TAP brings it.
"""

import fcntl
import os
import random
import socket
import struct
import subprocess
import sys

from lab.frames import checksum

GATEWAY, OWN, OUTSIDE = "192.168.64.1", "192.168.64.2", "203.0.113.2"
PACKET_VNET_HDR, SIOCGIFHWADDR = 15, 0x8927
NONE, TCP4, UDP, TCP6, USO, ECN = 0, 1, 3, 4, 5, 0x80
FRAMES = 6000

rng = random.Random(int(sys.argv[1]))


def transport(proto: int, length: int) -> bytes:
    ports = struct.pack("!HH", rng.randrange(65536), rng.choice([80, 81, 0, 443, 9999]))
    if proto == socket.IPPROTO_TCP:
        offset = rng.choice([20, 20, 20, 0, 4, 60, 40]) // 4
        kind = rng.choice([2, 16, 24, 1, 0x3F, 20])
        numbers = (rng.getrandbits(32), rng.getrandbits(32), offset << 4, kind)
        return ports + struct.pack("!IIBBHHH", *numbers, 65535, 0, 0)
    if proto == socket.IPPROTO_UDP:
        return ports + struct.pack("!HH", rng.choice([(8 + length) & 0xFFFF, 0, 7, 65535]), 0)
    return bytes(8)


def packet() -> tuple[int, bytes]:
    proto = rng.choice([6, 6, 17, 1, 47])
    length = rng.choice([0, 1, 20, 100, 1400, 3000, 20000, 60000])
    inner = transport(proto, length)
    total = (20 + len(inner) + length) & 0xFFFF
    first = 0x40 | rng.choice([5, 5, 5, 5, 4, 6, 15])
    said = rng.choice([total, total, 0, 20, 65535])
    fragment = rng.choice([0, 0, 0x4000, 0x2000, 0x1FFF])
    addresses = socket.inet_aton(OWN) + socket.inet_aton(OUTSIDE)
    head = struct.pack("!BBHHHBBH", first, 0, said, 7, fragment, 64, proto, 0) + addresses
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return proto, head + inner + os.urandom(length)


def virtio(proto: int, frame: bytes) -> bytes:
    end = len(frame) & 0xFFFF
    fitting = {socket.IPPROTO_TCP: TCP4, socket.IPPROTO_UDP: USO}.get(proto, NONE)
    kind = rng.choice([fitting, fitting, NONE, TCP4, UDP, TCP6, USO, TCP4 | ECN])
    return struct.pack(
        "=BBHHHH",
        rng.choice([0, 1, 1, 1]),
        kind,
        rng.choice([54, 0, 14, 34, 65535, 20, end]),
        rng.choice([1, 8, 536, 1448, 0, 65535]),
        rng.choice([34, 34, 0, 14, 65535, end]),
        rng.choice([16, 6, 0, 2, 65535]),
    )


def main() -> None:
    subprocess.run(["ping", "-c", "1", "-W", "5", GATEWAY], stdout=subprocess.DEVNULL, check=True)
    with open("/proc/net/arp") as table:
        found = [words[3] for words in map(str.split, table) if words[0] == GATEWAY]
    gateway = bytes.fromhex(found[0].replace(":", ""))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        own = fcntl.ioctl(sock, SIOCGIFHWADDR, struct.pack("16s24x", b"eth0"))[18:24]
        sock.bind(("eth0", 0))
        sock.setsockopt(263, PACKET_VNET_HDR, 1)
        sent = 0
        for _ in range(FRAMES):
            proto, body = packet()
            frame = gateway + own + b"\x08\x00" + body
            try:
                sock.send(virtio(proto, frame) + frame)
                sent += 1
            except OSError:
                pass  # the kernel itself found it too odd
    print(f"sent {sent}")


main()
