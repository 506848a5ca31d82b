"""latency.py ADDRESS PORT COUNT: one byte there and back, COUNT times. Prints the median in microseconds."""

import socket
import statistics
import sys
import time

with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as s:
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times = []
    for _ in range(int(sys.argv[3])):
        start = time.perf_counter_ns()
        s.sendall(b"x")
        s.recv(1)
        times.append(time.perf_counter_ns() - start)
print(statistics.median(times) / 1000)
