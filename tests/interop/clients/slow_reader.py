"""slow_reader.py ADDRESS BYTES: fetches /blob with the smallest buffer there is, the first BYTES one at a
time, and prints the digest of the first BYTES and the next 100,000."""

import hashlib
import socket
import sys


def main(address: str, slowly: int) -> None:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sock.connect((address, 80))
    sock.sendall(b"GET /blob HTTP/1.1\r\nHost: x\r\n\r\n")
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    body = b""
    while len(body) < slowly:
        body += sock.recv(1)
    while len(body) < slowly + 100_000:
        body += sock.recv(slowly + 100_000 - len(body))
    print(hashlib.sha256(body).hexdigest())


main(sys.argv[1], int(sys.argv[2]))
