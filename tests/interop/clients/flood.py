"""flood.py FD|burn MAC: a hostile guest.

Sends frames on the datagram socket FD as fast as it takes them: random bytes, broken headers, SYNs and
datagrams to every port of many addresses. MAC is the gateway's. With "burn" it keeps a core as busy and sends
nothing, so that a comparison sees only the network.
"""

import os
import random
import socket
import sys

from lab import frames

GATEWAY_MAC = bytes.fromhex(sys.argv[2])
MAC, OWN = bytes.fromhex("5254000000f0"), "192.168.64.3"
rng = random.Random(4)


def prepared() -> list[bytes]:
    made = []
    for i in range(4096):
        port = rng.randrange(1, 65536)
        outside = f"203.0.113.{2 + i % 2}" if i % 3 else f"198.51.100.{i % 250}"
        made.append(frames.syn(MAC, GATEWAY_MAC, OWN, outside, (1024 + i, port), i))
        made.append(frames.udp(MAC, GATEWAY_MAC, OWN, outside, (1024 + i, port), rng.randbytes(i % 1400)))
        made.append(rng.randbytes(rng.randrange(1, 1514)))
        made.append(GATEWAY_MAC + MAC + b"\x08\x00\x45" + rng.randbytes(rng.randrange(1, 1400)))
    rng.shuffle(made)
    return made


made = prepared()
print("flooding", flush=True)
if sys.argv[1] == "burn":
    while True:
        for _ in made:
            os.getppid()
else:
    sock = socket.socket(fileno=int(sys.argv[1]))
    while True:
        for frame in made:
            sock.send(frame)
