"""What the demo's guest and its outside do: ordinary sockets, as any program would."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

from guestnet._linux import links

_BLOCK = bytes(256 * 1024)
_MAGIC = b"\x63\x82\x53\x63"
_DISCOVER, _OFFER, _REQUEST, _ACK = 1, 2, 3, 5
_SO_BINDTODEVICE = 25


# --- DHCP: RFC 2131, as much as a client of one lease needs
# -------------------------------------------------------


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
        address, offer = _exchange(sock, transaction, hardware, _DISCOVER, _OFFER, {})
        chosen = {50: address.packed, 54: offer[54]}
        address, options = _exchange(sock, transaction, hardware, _REQUEST, _ACK, chosen)
    prefix = IPv4Network(f"0.0.0.0/{IPv4Address(options[1])}").prefixlen
    router = IPv4Address(options[3][:4])
    links.set_address(interface, IPv4Interface((address, prefix)))
    links.set_mtu(interface, mtu)
    links.add_route(IPv4Network("0.0.0.0/0"), router)
    return {
        "address": f"{address}/{prefix}",
        "router": str(router),
        "dns": str(IPv4Address(options[6][:4])) if 6 in options else "",
        "seconds": str(struct.unpack("!I", options[51])[0]) if 51 in options else "",
    }


def _exchange(
    sock: socket.socket, transaction: bytes, mac: bytes, kind: int, wanted: int, extra: dict[int, bytes]
) -> tuple[IPv4Address, dict[int, bytes]]:
    head = struct.pack("!BBBB4sHH16s", 1, 1, 6, 0, transaction, 0, 0x8000, b"") + mac + bytes(10 + 192)
    options = {53: bytes([kind]), **extra, 55: bytes([1, 3, 6, 15, 26, 51, 119, 121])}
    body = b"".join(struct.pack("BB", code, len(value)) + value for code, value in options.items())
    packet = head + _MAGIC + body + b"\xff"
    for _ in range(5):
        sock.sendto(packet, ("255.255.255.255", 67))
        try:
            answer = sock.recv(2048)
        except TimeoutError:
            continue
        if len(answer) < 240 or answer[4:8] != transaction or answer[236:240] != _MAGIC:
            continue
        got = _options(answer[240:])
        if got.get(53) == bytes([wanted]):
            return IPv4Address(answer[16:20]), got
    raise TimeoutError("no answer from the DHCP server")


def _options(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != 255:
        if data[at] == 0:
            at += 1
            continue
        length = data[at + 1] if at + 1 < len(data) else 0
        found[data[at]] = data[at + 2 : at + 2 + length]
        at += 2 + length
    return found


# --- names, pages, transfers
# -----------------------------------------------------------------------------------------


def resolve(name: str) -> str:
    """The address of a name, as the C library finds it."""
    return str(socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])


def fetch(url: str) -> dict[str, Any]:
    """A page by HTTP."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is not in this world
    with opener.open(url, timeout=10) as answer:
        return {"status": answer.status, "text": answer.read(4096).decode()}


def serve_http(port: int, text: str) -> str:
    """Serves one page on `port`, which says who asked for it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"{text}, you are {self.client_address[0]}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the demo tells what happens."""

    server = ThreadingHTTPServer(("0.0.0.0", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return str(server.server_address[0])


def serve_transfers(port: int) -> None:
    """A TCP server for `transfer`: the client's first byte says whether it sends (S) or takes (T)."""
    server = socket.create_server(("0.0.0.0", port))

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
    """Moves bytes over one TCP connection for so long, `up` or `down`; how many, and how long it took."""
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
    """A name server that knows one name; the others do not exist."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", 53))
    wanted = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"

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
