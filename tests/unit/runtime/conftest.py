"""A network in this process, with guests in memory."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Interface
from typing import TypeVar

import pytest
from guestnet import NatConfig, NatNetwork, NetworkEvent
from guestnet.model.ipam import parse_mac
from guestnet.testing.guest import Guest

PATIENCE = 10.0
E = TypeVar("E", bound=NetworkEvent)


class Events:
    """Events of a network, in the order in which they came."""

    def __init__(self, network: NatNetwork, *, flows: bool = False) -> None:
        self.queue: queue.Queue[NetworkEvent] = queue.Queue()
        network.on_event(self.queue.put, *((NetworkEvent,) if flows else ()))

    def next(self, kind: type[E]) -> E:
        """The next one of a class; what comes before it is skipped."""
        while True:
            event = self.queue.get(timeout=PATIENCE)
            if isinstance(event, kind):
                return event


@pytest.fixture
def network() -> Iterator[NatNetwork]:
    """A running network without DHCP and DNS, whose guests reach the loopback of this host."""
    with NatNetwork(NatConfig(dhcp=False, dns=False, host_loopback=True)) as made:
        yield made


AddGuest = Callable[..., Guest]


def add_memory_guest(network: NatNetwork, name: str) -> Guest:
    """An endpoint with a guest in memory that has its address already. The endpoint may be there."""
    endpoint = network.get_endpoint(name) or network.create_endpoint(name)
    guest = Guest(parse_mac(endpoint.mac), lambda frame: attachment.send(frame))  # noqa: PLW0108
    attachment = network.attach(name, "memory", on_frame=guest.receive)
    guest.address = IPv4Interface((endpoint.ip, network.config.prefix_len))
    guest.router = network.gateway
    return guest


AddGuest = Callable[[str], Guest]


@pytest.fixture
def add_guest(network: NatNetwork) -> AddGuest:
    """Adds a guest to the network."""
    return lambda name: add_memory_guest(network, name)


def until(condition: Callable[[], object], what: str) -> None:
    """Waits for what happens in another thread."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


@pytest.fixture
def echo() -> Iterator[int]:
    """A TCP port of the host's loopback that sends back what it gets, and ends when its client ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            # A network that stops under its guest resets what the guest has not ended.
            with connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
                while data := connection.recv(65536):
                    connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def fetch(port: int, data: bytes = b"") -> bytes:
    """What a client of a published port gets."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while more := client.recv(65536):
            answer += more
        return answer
