"""The servers of the outside, one process: `python -m lab.servers BLOB` in the namespace *out*.

BLOB is a file of random bytes for throughput with proof. Prints "ready" when all of them listen.

    80    HTTP/1.1: GET / a page, /peer the client's address, /blob the file; PUT anything: its sha256, length
    7     TCP and UDP echo
    9007  TCP: reads to the end of input, then answers "COUNT SHA256" (so the answer follows the client's FIN)
    9008  TCP: says "bye", ends its own direction, still reads; then GET /read-after-bye tells how much
    9009  TCP: resets the connection after the first byte
    9010  UDP: answers from port 9011
    53    DNS: the zone example.test
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset
import dns.zone

ZONE = """
$ORIGIN example.test.
$TTL 60
@          SOA   ns admin 1 3600 600 86400 60
@          NS    ns
ns         A     203.0.113.2
www        A     203.0.113.2
www        AAAA  2001:db8:113::2
second     A     203.0.113.3
far        A     198.51.100.2
alias      CNAME www
text       TXT   "hello from outside" "second string"
mail       MX    10 www
_sip._tcp  SRV   10 20 5060 www
odd        CAA   0 issue "ca.example.test"
odd        TYPE65400 \\# 4 01020304
"""
BIG = [f'"{i:03} {"x" * 180}"' for i in range(40)]
"""big.example.test TXT: over 7 kB, so UDP answers are truncated and TCP is needed."""

read_after_bye = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    blob: Path

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, text: str, status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/":
            self._answer("a page from outside\n")
        elif self.path == "/peer":
            self._answer(json.dumps(self.client_address[:2]))
        elif self.path == "/read-after-bye":
            self._answer(str(read_after_bye))
        elif self.path == "/blob":
            with self.blob.open("rb") as f:
                self.send_response(200)
                self.send_header("Content-Length", str(self.blob.stat().st_size))
                self.end_headers()
                self.wfile.flush()
                self.connection.sendfile(f)
        else:
            self._answer("no such page\n", 404)

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        total, digest = left, hashlib.sha256()
        while left:
            chunk = self.rfile.read(min(left, 1 << 20))
            if not chunk:
                return
            digest.update(chunk)
            left -= len(chunk)
        self._answer(f"{digest.hexdigest()} {total}\n")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 4096
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    digest, total = hashlib.sha256(), 0
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            digest.update(data)
            total += len(data)
        writer.write(f"{total} {digest.hexdigest()}\n".encode())
        await writer.drain()
        writer.close()


async def bye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    global read_after_bye  # noqa: PLW0603
    writer.write(b"bye\n")
    writer.write_eof()
    total = 0
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            total += len(data)
    read_after_bye = total
    writer.close()


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class UdpEcho(asyncio.DatagramProtocol):
    def __init__(self, answer_from: socket.socket | None = None) -> None:
        self.answer_from = answer_from

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self.answer_from is not None:
            self.answer_from.sendto(data, addr)
        else:
            self.transport.sendto(data, addr)


class Names:
    """Answers for the zone: NXDOMAIN inside it, REFUSED outside, TC where the buffer is too small."""

    def __init__(self) -> None:
        text = ZONE + "\n".join(f"big TXT {t}" for t in BIG) + "\n"
        self.zone = dns.zone.from_text(text, relativize=False, check_origin=True)
        assert self.zone.origin is not None
        self.origin: dns.name.Name = self.zone.origin

    def answer(self, wire: bytes, limit: int | None) -> bytes:
        query = dns.message.from_wire(wire)
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.RA
        question = query.question[0]
        name = question.name
        if not name.is_subdomain(self.origin):
            reply.set_rcode(dns.rcode.REFUSED)
        elif self.zone.get_node(name) is None:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        else:
            reply.flags |= dns.flags.AA
            alias = self.zone.get_rrset(name, dns.rdatatype.CNAME)
            if alias is not None:
                reply.answer.append(alias)
                name = alias[0].target  # type: ignore[attr-defined]
            found = self.zone.get_rrset(name, question.rdtype)
            if found is not None:
                reply.answer.append(found)
        wire = reply.to_wire(max_size=65535)
        if limit is not None and len(wire) > (query.payload if query.edns >= 0 else 512):
            reply.answer.clear()
            reply.flags |= dns.flags.TC
            wire = reply.to_wire()
        return wire


class UdpNames(UdpEcho):
    def __init__(self, names: Names) -> None:
        super().__init__()
        self.names = names

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        with contextlib.suppress(dns.exception.DNSException):
            self.transport.sendto(self.names.answer(data, 512), addr)


async def tcp_names(names: Names, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, dns.exception.DNSException):
        while True:
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            answer = names.answer(await reader.readexactly(length), None)
            writer.write(struct.pack("!H", len(answer)) + answer)
            await writer.drain()
    writer.close()


async def main(blob: str) -> None:
    Handler.blob = Path(blob)
    http = Server(("::", 80), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    loop = asyncio.get_running_loop()
    for port, handler in ((7, echo), (9007, count), (9008, bye), (9009, reset)):
        await asyncio.start_server(handler, ["0.0.0.0", "::"], port, backlog=4096)
    names = Names()
    await asyncio.start_server(lambda r, w: tcp_names(names, r, w), "0.0.0.0", 53)
    other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    other.bind(("0.0.0.0", 9011))
    # One socket for each address, so that an answer leaves from where the question went.
    for address in ("203.0.113.2", "203.0.113.3", "127.0.0.1"):
        await loop.create_datagram_endpoint(UdpEcho, (address, 7))
        await loop.create_datagram_endpoint(lambda: UdpNames(names), (address, 53))
    await loop.create_datagram_endpoint(lambda: UdpEcho(other), ("0.0.0.0", 9010))
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
