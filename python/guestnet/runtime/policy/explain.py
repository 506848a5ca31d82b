"""A page that tells a guest what it may do: `http://policy.guestnet.internal/`.

Theory of operation:

- The page is a TCP service of the gateway. The data plane relays each connection to a unix socket and names
  the guest's port in the name of its own end, so a guest sees its own rules and denials and nobody else's.
- `GET /` answers JSON: the rules in their order, and the recent denials. Other paths get 404, other methods
  405.
- Bounds: a connection carries one request of 8 KiB within five seconds. A guest has four connections at a
  time; others are closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

HTTP_PORT = 80
_HEAD_MOST = 8192
_SECONDS = 5.0
_OF_GUEST = 4
_BACKLOG = 64
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
}


class ExplainPage:
    """The page of one network. Its methods run in the control thread.

    Args:
        describe: What to tell the guest on a port; None for a port without a guest.
    """

    def __init__(self, describe: Callable[[int], dict[str, Any] | None]) -> None:
        self._describe = describe
        self._open: Counter[int] = Counter()
        self._server: asyncio.Server | None = None

    async def open(self) -> str:
        """Begins to serve.

        Returns:
            The name of the unix socket, in the abstract namespace, with a NUL in front.

        Raises:
            OSError: The socket cannot be made.
        """
        name = f"\0guestnet-policy-{os.getpid()}-{secrets.token_hex(8)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.bind(name)
            self._server = await asyncio.start_unix_server(
                self._serve, sock=sock, limit=_HEAD_MOST, backlog=_BACKLOG
            )
        except BaseException:
            sock.close()
            raise
        return name

    def close(self) -> None:
        """Ends the service."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        port = peer_port(writer.get_extra_info("socket"))
        if port is None or self._open[port] >= _OF_GUEST:
            writer.close()
            return
        self._open[port] += 1
        try:
            async with asyncio.timeout(_SECONDS):
                writer.write(await self._answer(reader, port))
                await writer.drain()
        except (TimeoutError, OSError):
            pass
        finally:
            self._open[port] -= 1
            if not self._open[port]:
                del self._open[port]
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), _SECONDS)

    async def _answer(self, reader: asyncio.StreamReader, port: int) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return _response(400, {"error": "bad_request"})
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(400, {"error": "bad_request"})
        if words[0] not in (b"GET", b"HEAD"):
            return _response(405, {"error": "method_not_allowed"})
        told = self._describe(port) if words[1].split(b"?")[0] == b"/" else None
        if told is None:
            return _response(404, {"error": "not_found"})
        answer = _response(200, told)
        return answer if words[0] == b"GET" else answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def peer_port(sock: socket.socket) -> int | None:
    """The port of the guest whose connection the data plane relays to this socket.

    Args:
        sock: The accepted socket.

    Returns:
        The port; None where the other end is not the data plane's.
    """
    name = sock.getpeername()
    text = name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
    parts = text.split("/")
    if len(parts) != 3 or parts[0] != "\0guestnet" or not parts[1].isdecimal():
        return None
    # Any program of the host can bind such a name, so the kernel is asked who connected.
    pid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return int(parts[1]) if pid == os.getpid() else None


def _response(status: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body, indent=1).encode() + b"\n"
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data
