"""What the guest and the outside of the demo do, with ordinary sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from guestnet._linux import links
from guestnet.testing import messages

_BLOCK = bytes(256 * 1024)
_SO_BINDTODEVICE = 25


def lease(interface: str, mac: str, mtu: int) -> dict[str, str]:
    """Gets an address by DHCP and configures the interface with it."""
    hardware = bytes.fromhex(mac.replace(":", ""))
    # No address yet, so no route to check the server's answers against.
    for name in (interface, "all"):
        links.write_sysctl(f"net/ipv4/conf/{name}/rp_filter", "0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, interface.encode() + b"\0")
        sock.settimeout(1.0)
        sock.bind(("0.0.0.0", 68))
        transaction = os.urandom(4)

        def exchange(kind: int, wanted: int, options: dict[int, bytes]) -> messages.DhcpAnswer:
            packet = messages.dhcp_message(transaction, hardware, kind, options)
            for _ in range(5):
                sock.sendto(packet, ("255.255.255.255", 67))
                with contextlib.suppress(TimeoutError):
                    answer = messages.dhcp_answer(sock.recv(2048), transaction)
                    if answer is not None and answer.kind == wanted:
                        return answer
            raise TimeoutError("no answer from the DHCP server")

        offer = exchange(messages.DISCOVER, messages.OFFER, {})
        got = exchange(messages.REQUEST, messages.ACK, offer.request())
    links.set_address(interface, got.interface)
    links.set_mtu(interface, mtu)
    links.add_route(IPv4Network("0.0.0.0/0"), got.router)
    return {
        "address": str(got.interface),
        "router": str(got.router),
        "dns": str(got.name_server or "none"),
        "seconds": str(got.lease_seconds),
    }


# --- names, pages, transfers
# -----------------------------------------------------------------------------------------


def resolve(name: str) -> str:
    """Resolves a name with the C library."""
    return str(socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])


def fetch(url: str) -> dict[str, Any]:
    """Fetches a page by HTTP."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is not in this world
    with opener.open(url, timeout=10) as answer:
        return {"status": answer.status, "text": answer.read(4096).decode()}


def serve_http(port: int, text: str, address: str = "0.0.0.0") -> str:
    """Serves one page on `port`. It names the client."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"{text}, you are {self.client_address[0]}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the demo tells what happens."""

    server = ThreadingHTTPServer((address, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return str(server.server_address[0])


def serve_transfers(port: int, address: str = "0.0.0.0") -> None:
    """A TCP server for `transfer`: the client's first byte says whether it sends (S) or takes (T)."""
    server = socket.create_server((address, port))

    def handle(sock: socket.socket) -> None:
        with sock:
            try:
                if sock.recv(1) == b"S":
                    total = 0
                    while count := sock.recv_into(buffer):
                        total += count
                    sock.sendall(struct.pack("!Q", total))
                else:
                    while True:
                        sock.sendall(_BLOCK)
            except OSError:
                pass  # the client has what it wanted

    buffer = bytearray(len(_BLOCK))

    def accept() -> None:
        while True:
            handle(server.accept()[0])

    threading.Thread(target=accept, daemon=True).start()


def transfer(host: str, port: int, seconds: float, direction: str) -> dict[str, float]:
    """Moves bytes over one TCP connection for some time, `up` or `down`. Returns how many, and the time."""
    total = 0
    with socket.create_connection((host, port), timeout=10) as sock:
        start = time.monotonic()
        if direction == "up":
            sock.sendall(b"S")
            while time.monotonic() - start < seconds:
                sock.sendall(_BLOCK)
            sock.shutdown(socket.SHUT_WR)
            # What arrived counts, not what was sent.
            total = struct.unpack("!Q", _exactly(sock, 8))[0]
        else:
            sock.sendall(b"T")
            buffer = bytearray(len(_BLOCK))
            while time.monotonic() - start < seconds:
                count = sock.recv_into(buffer)
                if not count:
                    raise ConnectionError("the server closed the connection")
                total += count
        return {"bytes": total, "seconds": time.monotonic() - start}


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError("the server closed the connection")
        data += more
    return data


# --- the name server of the outside
# -----------------------------------------------------------------------------------


def serve_dns(name: str, address: str) -> None:
    """A name server that knows one name."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", 53))
    wanted = messages.dns_name(name)

    def answer(query: bytes) -> bytes:
        end = query.index(0, 12) + 5
        known = query[12 : end - 4].lower() == wanted
        is_a = query[end - 4 : end] == b"\0\1\0\1"
        records = int(known and is_a)
        head = query[:2] + (b"\x85\x80" if known else b"\x85\x83") + struct.pack("!HHHH", 1, records, 0, 0)
        record = b"\xc0\x0c\0\1\0\1" + struct.pack("!IH", 60, 4) + IPv4Address(address).packed
        return head + query[12:end] + record * records

    def loop() -> None:
        while True:
            query, peer = sock.recvfrom(2048)
            if len(query) > 16 and 0 in query[12:]:
                sock.sendto(answer(query), peer)

    threading.Thread(target=loop, daemon=True).start()


ACTIONS: dict[str, Callable[..., Any]] = {
    "lease": lease,
    "resolve": resolve,
    "fetch": fetch,
    "serve_http": serve_http,
    "serve_transfers": serve_transfers,
    "serve_dns": serve_dns,
    "transfer": transfer,
}
