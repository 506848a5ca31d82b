"""The in-memory guest against another of its kind, over a wire that may lose frames."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface

import pytest
from guestnet.testing import frames, messages
from guestnet.testing.guest import Guest, GuestError
from guestnet.testing.tcp import Connection


class Wire:
    """Two guests joined by a thread that carries frames, as a network's control thread would."""

    def __init__(self, loss: float = 0.0) -> None:
        self._frames: queue.Queue[tuple[int, bytes] | None] = queue.Queue()
        self._random = random.Random(1)
        self._loss = loss
        self.guests = [
            Guest(bytes([2, 0, 0, 0, 0, n]), lambda f, n=n: self._frames.put((n, f))) for n in (0, 1)
        ]
        for number, guest in enumerate(self.guests):
            guest.address = IPv4Interface(f"10.0.0.{number + 1}/24")
            guest.router = IPv4Address("10.0.0.254")
        self._thread = threading.Thread(target=self._carry)
        self._thread.start()

    def _carry(self) -> None:
        while (item := self._frames.get()) is not None:
            sender, frame = item
            if self._random.random() >= self._loss or frame[12:14] == b"\x08\x06":
                self.guests[1 - sender].receive(frame)

    def close(self) -> None:
        self._frames.put(None)
        self._thread.join()


@pytest.fixture(params=[0.0, 0.02], ids=["perfect", "lossy"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    made = Wire(request.param)
    yield made
    made.close()


def test_echo_with_half_close(wire: Wire) -> None:
    one, two = wire.guests
    data = random.Random(2).randbytes(300_000)

    def echo(connection: Connection) -> None:
        received = b""
        while more := connection.recv(65536):
            received += more
        connection.send(received)
        connection.close()

    two.serve(7, echo)
    connection = one.connect("10.0.0.2", 7)
    connection.send(data)
    connection.close()
    back = b""
    while more := connection.recv(65536):
        back += more
    assert back == data


def test_refused() -> None:
    wire = Wire()
    try:
        with pytest.raises(GuestError, match="refused"):
            wire.guests[0].connect("10.0.0.2", 9)
    finally:
        wire.close()


def test_ping() -> None:
    wire = Wire()
    try:
        assert wire.guests[0].ping("10.0.0.2") < 5
        with pytest.raises(GuestError, match=r"10\.0\.0\.9"):
            wire.guests[0].ping("10.0.0.9", patience=0.1)
    finally:
        wire.close()


def test_dhcp_messages_fit_each_other() -> None:
    query = messages.dhcp_message(b"abcd", bytes(6), messages.DISCOVER)
    assert messages.dhcp_answer(query, b"abcd") is None
    options = b"\x35\x01\x02\x01\x04\xff\xff\xff\0\x03\x04\x0a\0\0\x01\x33\x04\0\0\x0e\x10\xff"
    answer = messages.dhcp_answer(b"\x02" + query[1:16] + b"\x0a\0\0\x05" + query[20:240] + options, b"abcd")
    assert answer is not None
    assert (answer.kind, str(answer.interface), str(answer.router)) == (2, "10.0.0.5/24", "10.0.0.1")
    assert answer.lease_seconds == 3600
    assert answer.name_server is None


def test_dns_messages() -> None:
    query = messages.dns_query(7, "web.example")
    answer = (
        query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + query[12:] + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\1"
    )
    assert messages.dns_addresses(answer, 7) == [IPv4Address("192.0.2.1")]
    assert messages.dns_addresses(answer, 8) is None
    assert messages.dns_addresses(query, 7) is None


@pytest.mark.parametrize("size", range(0, 60, 7))
def test_truncated_packets_are_no_packets(size: int) -> None:
    packet = frames.udp(bytes(4), bytes(4), 1, 2, b"x" * 40)
    assert frames.parse_ipv4(packet[:size]) is None
    assert frames.parse_ipv4(packet) is not None
