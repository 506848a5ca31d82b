"""udp.py ADDRESS PORT [COUNT [SIZE]]: sends COUNT datagrams one by one, each again until its answer comes (5
times at most), and prints how many were answered and from where the last answer came."""

import socket
import sys

address, port = sys.argv[1], int(sys.argv[2])
count = int(sys.argv[3]) if len(sys.argv) > 3 else 1
size = int(sys.argv[4]) if len(sys.argv) > 4 else 32
answered, source = 0, None
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.settimeout(1)
    for i in range(count):
        body = b"%08d" % i + bytes(size - 8)
        for _ in range(5):
            s.sendto(body, (address, port))
            try:
                answer, source = s.recvfrom(65536)
            except TimeoutError:
                continue
            if answer == body:
                answered += 1
                break
print(f"answered {answered} from {source[0] if source else None}")
