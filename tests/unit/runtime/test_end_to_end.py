"""A whole network in one process: guests in memory take leases, resolve names and reach what they may."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface

import pytest
from guestnet import NatConfig, NatNetwork
from guestnet.model.events import LeaseTaken
from guestnet.model.ipam import generate_mac, parse_mac
from guestnet.testing import messages
from guestnet.testing.guest import Guest, GuestError

from .conftest import Events, fetch

ALPHA = "02:00:00:00:00:0a"


@pytest.fixture
def network() -> Iterator[NatNetwork]:
    config = NatConfig(
        host_loopback=True,
        resolvers=(),
        dns_records={"web.example": "192.0.2.7", "two.example": ["192.0.2.8", "2001:db8::8"]},
        static_leases=[{"mac": ALPHA, "ip": "192.168.64.10", "name": "alpha"}],
    )
    with NatNetwork(config) as made:
        yield made


@pytest.fixture
def boot(network: NatNetwork) -> Callable[..., Guest]:
    """A guest that has got its address by DHCP."""

    def start(name: str, mac: str | None = None, **more: str) -> Guest:
        own = mac or generate_mac()
        network.create_endpoint(name, mac=mac, **more)
        guest = Guest(parse_mac(own), lambda frame: attachment.send(frame))  # noqa: PLW0108
        attachment = network.attach(name, "memory", on_frame=guest.receive)
        guest.lease()
        return guest

    return start


def test_leases(network: NatNetwork, boot: Callable[..., Guest]) -> None:
    events = Events(network)
    one, alpha = boot("vm1"), boot("alpha", ALPHA)
    assert one.address == IPv4Interface("192.168.64.2/24")
    assert alpha.address == IPv4Interface("192.168.64.10/24")
    assert one.router == one.name_server == network.gateway
    lease = events.next(LeaseTaken)
    assert (lease.endpoint, str(lease.ip)) == ("vm1", "192.168.64.2")
    held = {(x.endpoint_id, str(x.ip)) for x in network.services.dhcp.leases()}
    assert held == {("vm1", "192.168.64.2"), ("alpha", "192.168.64.10")}
    # The same client asks again and gets the same.
    assert one.lease().interface == one.address
    network.remove_endpoint("vm1")
    assert [x.endpoint_id for x in network.services.dhcp.leases()] == ["alpha"]


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("web.example", "192.0.2.7"),
        ("two.example", "192.0.2.8"),
        ("vm2", "192.168.64.3"),
        ("VM2.Guestnet.Internal", "192.168.64.3"),
        ("alias.guestnet.internal", "192.168.64.3"),
        ("alpha.guestnet.internal", "192.168.64.10"),
        ("gateway.guestnet.internal", "192.168.64.1"),
        ("host.guestnet.internal", "192.168.64.254"),
        ("host.docker.internal", "192.168.64.254"),
        ("host.containers.internal", "192.168.64.254"),
    ],
)
def test_names(boot: Callable[..., Guest], name: str, address: str) -> None:
    one = boot("vm1")
    boot("vm2", hostname="alias")
    assert one.resolve(name) == IPv4Address(address)


def test_records_come_and_go(network: NatNetwork, boot: Callable[..., Guest]) -> None:
    guest = boot("vm1")
    with pytest.raises(GuestError):
        guest.resolve("later.guestnet.internal")
    network.services.dns.add_record("later.guestnet.internal", "192.0.2.9")
    assert str(guest.resolve("later.guestnet.internal")) == "192.0.2.9"


def test_dns_over_tcp(boot: Callable[..., Guest]) -> None:
    guest = boot("vm1")
    connection = guest.connect("192.168.64.1", 53)
    for n in range(3):
        query = messages.dns_query(n, "web.example")
        connection.send(struct.pack("!H", len(query)) + query)
        answer = connection.recv(512)
        assert messages.dns_addresses(answer[2:], n) == [IPv4Address("192.0.2.7")]
    connection.close()


def test_guests_by_name_and_a_published_port(
    network: NatNetwork, boot: Callable[..., Guest], echo: int
) -> None:
    forward = network.publish("127.0.0.1:0:web:80")
    one, web = boot("vm1"), boot("web")
    web.serve(80, lambda connection: (connection.send(b"a page"), connection.close()))
    assert one.connect(str(one.resolve("web")), 80).recv(100) == b"a page"
    assert one.ping(str(one.resolve("web"))) < 5
    assert fetch(forward.host_port) == b"a page"
    connection = one.connect(str(one.resolve("host.guestnet.internal")), echo)
    connection.send(b"echo")
    assert connection.recv(100) == b"echo"


def test_without_host_loopback_nothing_of_the_host_is_reached(echo: int) -> None:
    with NatNetwork(NatConfig(resolvers=())) as network:
        endpoint = network.create_endpoint("vm1")
        guest = Guest(parse_mac(endpoint.mac), lambda frame: attachment.send(frame))  # noqa: PLW0108
        attachment = network.attach("vm1", "memory", on_frame=guest.receive)
        guest.lease()
        with pytest.raises(GuestError):
            guest.resolve("host.guestnet.internal")
        with pytest.raises(GuestError, match="refused"):
            guest.connect("192.168.64.1", echo)


def test_it_starts_again(boot: Callable[..., Guest], network: NatNetwork) -> None:
    boot("vm1")
    network.stop()
    network.start()
    endpoint = network.get_endpoint("vm1")
    assert endpoint is not None
    guest = Guest(parse_mac(endpoint.mac), lambda frame: attachment.send(frame))  # noqa: PLW0108
    attachment = network.attach("vm1", "memory", on_frame=guest.receive)
    assert guest.lease().interface == IPv4Interface("192.168.64.2/24")
    assert str(guest.resolve("web.example")) == "192.0.2.7"


def test_what_the_guest_did_not_end_does_not_look_ended(
    network: NatNetwork, boot: Callable[..., Guest]
) -> None:
    """A network that stops resets the connections that its guests have not closed; others end in order."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        guest = boot("vm1")
        opened = []
        for _ in range(2):
            connection = guest.connect("192.168.64.254", server.getsockname()[1])
            outside, _ = server.accept()
            outside.settimeout(10)
            connection.send(b"a part")
            assert outside.recv(100) == b"a part"
            opened.append((connection, outside))
        opened[0][0].close()
        assert opened[0][1].recv(100) == b""
        network.stop()
        assert opened[0][1].recv(100) == b""
        with pytest.raises(ConnectionResetError):
            opened[1][1].recv(100)
        for _, outside in opened:
            outside.close()
