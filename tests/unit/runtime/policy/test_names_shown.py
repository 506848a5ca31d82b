"""Names that conversations show, through real packet threads: what passes, and what a guest is told."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest
from guestnet import FlowClosed, FlowDenied, NatConfig, NatNetwork, Policy, Rule
from guestnet.testing.guest import Guest
from guestnet.testing.tcp import Connection

from ..conftest import PATIENCE, Events, add_memory_guest

LOOPBACK = "192.168.64.254"
POLICY = Policy("allow", [Rule("deny", "bad.example", label="not this one")])


class Server:
    """A server on this host that keeps what each client sent, and answers when it has `enough`."""

    def __init__(self, enough: bytes, answer: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.port = self._listener.getsockname()[1]
        self.received: list[bytes] = []
        self._enough, self._answer = enough, answer
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                client.settimeout(PATIENCE)
                data = b""
                try:
                    while chunk := client.recv(65536):
                        data += chunk
                        if data.endswith(self._enough):
                            client.sendall(self._answer)
                except OSError:
                    pass
                self.received.append(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE)


@pytest.fixture
def network() -> Iterator[NatNetwork]:
    config = NatConfig(dhcp=False, dns=False, host_loopback=True, policy=POLICY)
    with NatNetwork(config) as network:
        yield network


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(b"\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
    yield made
    made.close()


def request(host: str) -> bytes:
    return f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def client_hello(name: str) -> bytes:
    """The first flight of this Python's own TLS client."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def read_all(connection: Connection) -> bytes:
    data = b""
    while more := connection.recv(65536):
        data += more
    return data


def test_a_refused_request_gets_403_and_the_server_none_of_it(network: NatNetwork, server: Server) -> None:
    guest = add_memory_guest(network, "vm1")
    seen = Events(network, flows=True)
    connection = guest.connect(LOOPBACK, server.port)
    connection.send(request("bad.example"))
    head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 ")
    assert json.loads(body) == {
        "error": "denied",
        "rule": "not this one",
        "reason": "policy",
        "destination": f"{LOOPBACK}:{server.port}",
        "name": "bad.example",
    }
    connection.close()
    denial = seen.next(FlowDenied)
    assert (denial.rule, denial.shown, denial.reason) == ("not this one", "bad.example", "policy")
    assert seen.next(FlowClosed).shown == "bad.example"
    server.close()
    assert server.received == [b""]


def test_requests_pass_until_one_is_refused_behind_their_answers(network: NatNetwork, server: Server) -> None:
    guest = add_memory_guest(network, "vm1")
    connection = guest.connect(LOOPBACK, server.port)
    connection.send(request("good.example") + request("bad.example"))
    answers = read_all(connection)
    good, _, rest = answers.partition(b"hi")
    assert good.startswith(b"HTTP/1.1 200 ")
    assert rest.startswith(b"HTTP/1.1 403 ")
    connection.close()
    server.close()
    assert server.received == [request("good.example")]


def test_tls_gets_the_alert_access_denied(network: NatNetwork, server: Server) -> None:
    guest = add_memory_guest(network, "vm1")
    connection = guest.connect(LOOPBACK, server.port)
    for byte in client_hello("bad.example"):
        connection.send(bytes((byte,)))
    assert read_all(connection) == bytes((21, 3, 3, 0, 2, 2, 49))
    connection.close()
    server.close()
    assert server.received == [b""]


def test_what_is_allowed_and_what_shows_no_name_passes(network: NatNetwork, server: Server) -> None:
    guest: Guest = add_memory_guest(network, "vm1")
    for first in (request("good.example"), b"EHLO me\r\n\r\n"):
        connection = guest.connect(LOOPBACK, server.port)
        connection.send(first)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.close()
        assert read_all(connection).endswith(b"hi")
    connection = guest.connect(LOOPBACK, server.port)
    hello = client_hello("good.example")
    connection.send(hello)
    connection.close()
    assert read_all(connection) == b""
    server.close()
    assert server.received == [request("good.example"), b"EHLO me\r\n\r\n", hello]
