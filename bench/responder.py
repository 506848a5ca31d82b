"""responder.py: the server outside for latency and requests.

Port 9100 answers each byte with a byte, port 9180 each HTTP request with a small page. It does as little work
as Python allows, for all contenders alike.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast

PAGE = b"a page from outside\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n" % len(PAGE)
KEEP = HEAD + b"Connection: keep-alive\r\n\r\n" + PAGE
CLOSE = HEAD + b"Connection: close\r\n\r\n" + PAGE


class Transport(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        sock: socket.socket = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Echo(Transport):
    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Http(Transport):
    def data_received(self, data: bytes) -> None:
        # ab sends one request at a time on a connection and each in one segment.
        if b"eep-" in data:
            self.transport.write(KEEP)
        else:
            self.transport.write(CLOSE)
            self.transport.close()


async def main() -> None:
    loop = asyncio.get_running_loop()
    await loop.create_server(Echo, "0.0.0.0", 9100, backlog=4096)
    await loop.create_server(Http, "0.0.0.0", 9180, backlog=4096)
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
