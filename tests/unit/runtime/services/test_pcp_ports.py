"""Ports that guests open themselves, from the guest's datagram to a client outside, over host sockets."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import Any

import pytest
from guestnet import ConfigError, ForwardNotFound, NatConfig, NatNetwork
from guestnet.model.events import PortClosed, PortOpened
from guestnet.runtime.services import pcp_ports as under_test
from guestnet.testing.guest import Guest
from unit.services.dhcp_wire import DECLINE, RELEASE, ask, ip

from ..conftest import PATIENCE, Events, add_memory_guest, fetch, until

FIRST = 20000 + os.getpid() % 120 * 100
"""Below the ports that the kernel chooses, and not those of another run of this test."""
LAST = FIRST + 49
LOOPBACK = "127.0.0.1"
TCP, UDP = 6, 17
NO_RESOURCES, USER_EX_QUOTA, ADDRESS_MISMATCH = 8, 10, 12


class Client:
    """A guest's PCP client."""

    def __init__(self, guest: Guest, port: int = 6000) -> None:
        self.guest = guest
        self._port = port

    def ask(self, payload: bytes) -> bytes:
        self.guest._datagrams[self._port] = []
        asked = self.guest._asking(
            self._port, lambda: self.guest.send_udp("192.168.64.1", 5351, self._port, payload)
        )
        assert asked, "no answer"
        return asked[0]

    def map(self, internal: int, protocol: int = TCP, lifetime: int = 3600, **fields: Any) -> tuple[int, int]:
        """Result and external port."""
        assert self.guest.address is not None
        client = fields.get("client", self.guest.address.ip)
        head = b"\x02\x01\0\0" + struct.pack("!I", lifetime) + bytes(10) + b"\xff\xff" + client.packed
        data = b"nonce" + bytes(7) + bytes((protocol, 0, 0, 0)) + struct.pack("!HH", internal, 0)
        answer = self.ask(head + data + bytes(10) + b"\xff\xff" + bytes(4))
        return answer[3], int.from_bytes(answer[42:44], "big")


@pytest.fixture
def network() -> Iterator[NatNetwork]:
    config = NatConfig(dhcp=False, dns=False, pcp_ports=(FIRST, LAST), pcp_address=LOOPBACK)
    with NatNetwork(config) as made:
        yield made


@pytest.fixture
def guest(network: NatNetwork) -> Guest:
    return add_memory_guest(network, "vm1")


def serve(guest: Guest, port: int, text: bytes = b"a page") -> None:
    guest.serve(port, lambda connection: (connection.send(text), connection.close()))


def is_refused(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


def test_mapped_port_is_reached_until_it_is_deleted(network: NatNetwork, guest: Guest) -> None:
    events = Events(network)
    serve(guest, 80)
    client = Client(guest)
    result, port = client.map(80)
    assert result == 0
    assert FIRST <= port <= LAST
    assert fetch(port) == b"a page"
    told = events.next(PortOpened)
    details = {"protocol": "tcp", "port": port, "guest": ["192.168.64.2", 80]}
    assert (told.endpoint, told.details()) == ("vm1", details)
    (forward,) = network.forwards
    assert (forward.asked_by, forward.host_port) == ("vm1", port)
    assert str(forward) == f"127.0.0.1:{port}/tcp -> 192.168.64.2:80 (opened by vm1)"
    assert [m.external_port for m in network.services.pcp.mappings()] == [port]
    assert client.map(80) == (0, port)  # renewed
    assert client.map(80, lifetime=0)[0] == 0
    with pytest.raises(ConnectionRefusedError):
        fetch(port)
    assert network.forwards == []
    assert events.next(PortClosed).details() == details


def test_mapped_port_of_udp(network: NatNetwork, guest: Guest) -> None:
    result, port = Client(guest).map(5000, UDP)
    assert result == 0
    guest._datagrams[5000] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        outside.connect((LOOPBACK, port))
        outside.send(b"hello")
        until(lambda: guest._datagrams[5000] == [b"hello"], "the datagram")
    network.remove_endpoint("vm1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        outside.settimeout(PATIENCE)
        outside.connect((LOOPBACK, port))
        outside.send(b"hello")
        with pytest.raises(ConnectionRefusedError):
            outside.recv(10)


def test_a_guest_that_speaks_for_another_is_refused(network: NatNetwork, guest: Guest) -> None:
    add_memory_guest(network, "vm2")
    assert Client(guest).map(80, client=IPv4Address("192.168.64.3"))[0] == ADDRESS_MISMATCH
    assert network.forwards == []


def test_mappings_end_with_their_endpoint(network: NatNetwork, guest: Guest) -> None:
    serve(guest, 80)
    _, port = Client(guest).map(80)
    other = add_memory_guest(network, "vm2")
    serve(other, 80, b"another")
    _, second = Client(other).map(80)
    assert (fetch(port), fetch(second)) == (b"a page", b"another")
    network.remove_endpoint("vm1")
    with pytest.raises(ConnectionRefusedError):
        fetch(port)
    assert fetch(second) == b"another"
    # Its address is another's now, and nothing of it leads there.
    third = add_memory_guest(network, "vm3")
    assert str(third.address) == "192.168.64.2/24"
    assert [forward.asked_by for forward in network.forwards] == ["vm2"]


@pytest.mark.parametrize("kind", [RELEASE, DECLINE])
def test_mappings_end_with_the_lease(kind: int) -> None:
    config = NatConfig(dns=False, pcp_ports=(FIRST, LAST), pcp_address=LOOPBACK)
    with NatNetwork(config) as network:
        events = Events(network)
        guest = add_memory_guest(network, "vm1")
        guest.lease()
        _, port = Client(guest).map(80)
        # Given back, or not usable: the endpoint has another then.
        old = "192.168.64.2"
        message = ask(kind, [(50, ip(old))], mac=guest.mac, ciaddr=old if kind == RELEASE else "0.0.0.0")
        guest.send_udp("192.168.64.1", 67, 68, message)
        assert events.next(PortClosed).port == port
        assert network.forwards == []
        until(lambda: is_refused(port), "the port to be closed")


def test_mappings_end_with_the_network(network: NatNetwork, guest: Guest) -> None:
    _, port = Client(guest).map(80)
    events = Events(network)
    network.stop()
    assert events.next(PortClosed).port == port
    assert network.services.pcp.mappings() == []
    with pytest.raises(ConnectionRefusedError):
        fetch(port)
    network.start()
    assert network.forwards == []


def test_mappings_end_in_time_without_anybody_asking(network: NatNetwork, guest: Guest) -> None:
    """The alarm is the loop's own; the clock is moved to shortly before the end."""
    pcp = network.services.pcp
    client = Client(guest)
    _, port = client.map(80, lifetime=120)
    pcp._clock = pcp._mapper._clock = lambda: time.monotonic() + 119.8
    client.ask(b"\0\0")
    until(lambda: network.forwards == [], "the end of the mapping")
    assert pcp.mappings() == []
    until(lambda: is_refused(port), "the port to be closed")
    session = network._session
    assert session is not None
    assert session._services._expiry is None, "nothing is waited for any more"


def test_maintenance_ends_what_is_over(network: NatNetwork, guest: Guest) -> None:
    pcp = network.services.pcp
    Client(guest).map(80, lifetime=120)
    pcp._mapper._clock = lambda: time.monotonic() + 121
    network.maintenance()
    assert network.forwards == []


def test_the_owner_takes_a_guest_s_port_back(network: NatNetwork, guest: Guest) -> None:
    client = Client(guest)
    client.map(80)
    (forward,) = network.forwards
    network.unpublish(forward)
    assert network.services.pcp.mappings() == []
    with pytest.raises(ForwardNotFound):
        network.unpublish(forward)
    assert client.map(80)[0] == 0


def test_ports_of_others_are_left_alone(network: NatNetwork, guest: Guest) -> None:
    with ExitStack() as taken:
        # The whole range but one is the host's own, or the network's owner's.
        for port in range(FIRST, LAST - 1):
            taken.enter_context(socket.create_server((LOOPBACK, port)))
        network.publish(f"{LOOPBACK}:{LAST - 1}:vm1:81")
        serve(guest, 80)
        assert Client(guest).map(80) == (0, LAST)
        assert fetch(LAST) == b"a page"
        assert Client(guest).map(82)[0] == NO_RESOURCES


def test_a_guest_has_no_more_than_its_share(network: NatNetwork, guest: Guest) -> None:
    client = Client(guest)
    assert {client.map(port)[0] for port in range(1, 33)} == {0}
    assert client.map(33)[0] == USER_EX_QUOTA
    assert len(network.forwards) == 32


def test_requests_that_wait_are_bounded(network: NatNetwork, guest: Guest) -> None:
    session = network._session
    assert session is not None

    async def hold(*_: object, **__: object) -> None:
        await hung

    hung = session.control.loop.create_future()
    original, network.services.pcp.handle = network.services.pcp.handle, hold  # type: ignore[method-assign]
    for _ in range(40):
        guest.send_udp("192.168.64.1", 5351, 6000, b"\0\0")
    until(lambda: session._services.refused == 24, "24 of 40 requests to be refused")
    network.services.pcp.handle = original  # type: ignore[method-assign]
    session.control.loop.call_soon_threadsafe(hung.set_result, None)
    assert Client(guest).ask(b"\0\0")[3] == 0
    assert session._services._mapping == {}


def test_nat_pmp(guest: Guest) -> None:
    serve(guest, 8080)
    client = Client(guest)
    assert client.ask(b"\0\0")[8:] == bytes((127, 0, 0, 1))
    answer = client.ask(bytes.fromhex("0002 0000 1f90 0000 00001c20"))
    port = int.from_bytes(answer[10:12], "big")
    assert (answer[:4], answer[8:10], answer[12:]) == (b"\0\x82\0\0", b"\x1f\x90", b"\0\0\x1c\x20")
    assert fetch(port) == b"a page"
    client.ask(bytes.fromhex("0002 0000 1f90 0000 00000000"))
    with pytest.raises(ConnectionRefusedError):
        fetch(port)


def test_without_it_nobody_answers() -> None:
    with NatNetwork(NatConfig(dhcp=False, dns=False)) as network:
        guest = add_memory_guest(network, "vm1")
        guest.send_udp("192.168.64.1", 5351, 6000, b"\0\0")
        guest.ping("192.168.64.1")  # what came before is done
        session = network._session
        assert session is not None
        assert session._services._mapping == {}
        with pytest.raises(ConfigError, match="pcp_ports"):
            _ = network.services.pcp
        assert "pcp" not in repr(network.services)


def test_the_address_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    routes: dict[str, str] = {}

    class Probe(socket.socket):
        def connect(self, address: Any) -> None:
            if address[0] not in routes:
                raise OSError("Network is unreachable")
            self.own = routes[address[0]]

        def getsockname(self) -> tuple[str, int]:
            return (self.own, 1)

    monkeypatch.setattr(under_test.socket, "socket", Probe)
    assert under_test.address_outside() is None
    for none in ("0.0.0.0", LOOPBACK):
        routes["192.0.2.1"] = none
        assert under_test.address_outside() is None
    # A host that has one network of a documentation for itself has a way to another.
    routes["203.0.113.1"] = "198.51.100.4"
    assert under_test.address_outside() == IPv4Address("198.51.100.4")
