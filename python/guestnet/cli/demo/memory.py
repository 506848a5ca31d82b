"""The demo's guest where no namespace can be made: a guest in memory, and an outside on the host's loopback.

Nothing leaves the machine here either: the servers of the outside listen on 127.0.0.1, which the guest
reaches as the host's address in its subnet.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from guestnet.cli import arguments
from guestnet.cli.demo import actions
from guestnet.cli.runner.session import ENDPOINT
from guestnet.testing.guest import Guest
from guestnet.testing.tcp import Connection

if TYPE_CHECKING:
    from guestnet.runtime.network import NatNetwork

_CHUNK = bytes(64 * 1024)


class MemoryGuest:
    """A guest that lives in this process."""

    publish_on = "127.0.0.1"
    picture = (
        "guest (in memory) -- guestnet --sockets-- 127.0.0.1 of this host\n"
        "No namespace here (`guestnet doctor` says why); no frame leaves this machine."
    )

    def __init__(self) -> None:
        mac = arguments.random_mac()
        from guestnet.model.spec import NatConfig

        config = NatConfig()
        self.mac = arguments.format_mac(mac)
        self._outside = str(config.subnet[-2])
        self.settings: dict[str, Any] = {
            "subnet": str(config.subnet),
            "mtu": 1500,
            "host_loopback": True,
            "dns_records": {"web.example": [self._outside]},
        }
        self._hardware = mac
        self._guest: Guest | None = None
        self._http = _free_port()
        self._transfers = _free_port()
        actions.serve_http(self._http, "Hello from outside", "127.0.0.1")
        actions.serve_transfers(self._transfers, "127.0.0.1")

    @property
    def guest(self) -> Guest:
        """The guest, once attached."""
        if self._guest is None:
            raise RuntimeError("the guest is not attached")
        return self._guest

    def attach(self, network: NatNetwork) -> None:
        guest = Guest(self._hardware, lambda frame: attachment.send(frame))  # noqa: PLW0108 - not there yet
        attachment = network.attach(ENDPOINT, "memory", on_frame=guest.receive)
        self._guest = guest

    def lease(self) -> str:
        got = self.guest.lease()
        return (
            f"{got.interface} for {got.lease_seconds} s, router {got.router}, name server {got.name_server}"
        )

    def resolve(self, name: str) -> str:
        return f"{name} is {self.guest.resolve(name)}"

    def fetch(self, name: str) -> str:
        address = str(self.guest.resolve(name))
        text = _get(self.guest.connect(address, self._http), name)
        return f"http://{name}:{self._http}/ says {text}"

    def serve(self, port: int, text: str) -> None:
        def handle(connection: Connection) -> None:
            connection.recv(4096)
            body = f"{text}, you are {socket.inet_ntoa(connection.peer)}".encode()
            connection.send(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            connection.close()

        self.guest.serve(port, handle)

    def fetch_from_outside(self, port: int) -> str:
        return str(actions.fetch(f"http://{self.publish_on}:{port}/")["text"])

    def transfer(self, direction: str, seconds: float) -> str:
        from guestnet.cli.demo.guests import rate

        connection = self.guest.connect(self._outside, self._transfers)
        start = time.monotonic()
        total = 0
        if direction == "up":
            connection.send(b"S")
            while time.monotonic() - start < seconds:
                connection.send(_CHUNK)
            connection.close()
            total = struct.unpack("!Q", connection.recv(8))[0]
        else:
            connection.send(b"T")
            while time.monotonic() - start < seconds and (data := connection.recv(len(_CHUNK))):
                total += len(data)
            connection.abort()
        return rate(total, time.monotonic() - start)

    def close(self) -> None:
        self._guest = None


def _get(connection: Connection, host: str) -> str:
    connection.send(f"GET / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    answer = b""
    while more := connection.recv(65536):
        answer += more
    threading.Thread(target=connection.close, daemon=True).start()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].split()
    return f"{status[1].decode() if len(status) > 1 else '?'}: {body.decode(errors='replace')}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])
