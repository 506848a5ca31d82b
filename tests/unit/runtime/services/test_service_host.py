"""Datagrams and connections of guests reach the gateway's services and their answers come back. The services
are played by the test; their own tests are beside them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from types import SimpleNamespace
from typing import Any

import dns.rcode
import dns.rdatatype
import dns.reversename
import pytest
from guestnet import ConfigError, NatConfig, NatNetwork
from guestnet.model.events import LeaseReleased, LeaseTaken
from guestnet.model.ipam import parse_mac
from guestnet.runtime.services import service_host
from guestnet.services.dns.labels import to_labels
from guestnet.services.dns.resolvers import Resolvers
from guestnet.services.dns.server import Answer
from guestnet.testing import messages
from guestnet.testing.guest import Guest, GuestError

from ..conftest import PATIENCE, AddGuest, Events, add_memory_guest, fetch, until


@dataclass
class Reply:
    payload: bytes
    dst_ip: IPv4Address
    dst_port: int
    dst_mac: bytes
    broadcast: bool = True


class Dhcp:
    """Offers and acknowledges the endpoint's address, and nothing else."""

    def __init__(self, network: NatNetwork) -> None:
        self._registry = network._registry
        self.on_lease: Any = None
        self.on_release: Any = None
        self.seen: list[tuple[str, bytes]] = []
        self.gone: list[str] = []

    def remove_endpoint(self, endpoint_id: str) -> None:
        self.gone.append(endpoint_id)

    def expire(self, now: float) -> None:
        assert now > 0
        self.gone.append("expired")

    def handle(self, payload: bytes, *, endpoint_id: str, mac: bytes, now: float) -> Reply | None:
        assert now > 0
        self.seen.append((endpoint_id, mac))
        if b"\x35\x01" not in payload:
            return None
        address = self._registry.address_for(endpoint_id, mac)
        assert address is not None
        kind = {1: 2, 3: 5}[payload[payload.index(b"\x35\x01") + 2]]
        if kind == 5:
            self.on_lease(SimpleNamespace(endpoint_id=endpoint_id, mac=mac, ip=address, hostname="told"))
        options = bytes([53, 1, kind, 1, 4, 255, 255, 255, 0, 3, 4, 192, 168, 64, 1, 6, 4, 192, 168, 64, 1])
        options += b"\x36\x04\xc0\xa8\x40\x01\x33\x04\0\0\x0e\x10\xff"
        head = b"\x02\x01\x06\0" + payload[4:12] + bytes(4) + address.packed + bytes(8) + payload[28:236]
        return Reply(head + b"\x63\x82\x53\x63" + options, IPv4Address("255.255.255.255"), 68, b"\xff" * 6)


class Dns:
    """Knows one address for every name."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, int]] = []
        self.changed: Any = None
        self._servers = Resolvers()

    def lookup(self, name: bytes, kind: int) -> Answer:
        self.asked.append((name, kind))
        if b"broken" in name:
            raise ZeroDivisionError
        return Answer(0, ((name, 1, 60, bytes((192, 0, 2, 7))),))

    def set_forwarding(self, on: bool) -> None:
        assert on

    def own_names(self) -> list[bytes]:
        return [b"\0"]

    def name_servers(self) -> Resolvers:
        return self._servers


class Served:
    def __init__(self, **values: Any) -> None:
        self.network = NatNetwork(NatConfig(**values))
        self.dhcp, self.dns = Dhcp(self.network), Dns()
        self.network.services._dhcp = self.dhcp  # type: ignore[assignment]
        self.network.services._dns = self.dns  # type: ignore[assignment]


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    with made.network:
        yield made


@pytest.fixture
def network(served: Served) -> NatNetwork:
    return served.network


def test_a_lease_by_frames(served: Served, network: NatNetwork) -> None:
    events = Events(network)
    network.create_endpoint("vm1")
    # The guest has a MAC of its own, and not the one that was generated.
    guest = Guest(parse_mac("02:00:00:00:00:77"), lambda frame: attachment.send(frame))  # noqa: PLW0108
    attachment = network.attach("vm1", "memory", on_frame=guest.receive)
    got = guest.lease()
    assert got.interface == IPv4Interface("192.168.64.2/24")
    lease = events.next(LeaseTaken)
    assert (lease.endpoint, str(lease.ip)) == ("vm1", "192.168.64.2")
    assert lease.mac == "02:00:00:00:00:77"
    endpoint = network.get_endpoint("vm1")
    assert endpoint is not None
    assert (endpoint.mac, endpoint.hostname) == ("02:00:00:00:00:77", "told")
    assert network.services.dhcp is served.dhcp
    assert guest.ping("192.168.64.1") < PATIENCE
    # The published port finds the guest behind its own MAC.
    guest.serve(80, lambda connection: (connection.send(b"here"), connection.close()))
    assert fetch(network.publish("127.0.0.1:0:80").host_port) == b"here"


def test_a_release_is_told(served: Served, network: NatNetwork) -> None:
    events = Events(network)
    add_memory_guest(network, "vm1")
    lease = SimpleNamespace(endpoint_id="vm1", mac=bytes(6), ip=IPv4Address("192.168.64.2"))
    served.dhcp.on_release(lease)
    assert str(events.next(LeaseReleased).ip) == "192.168.64.2"


def test_leases_end_with_their_endpoint(served: Served, network: NatNetwork) -> None:
    network.create_endpoint("vm1")
    network.maintenance()
    network.remove_endpoint("vm1")
    assert served.dhcp.gone == ["expired", "vm1"]


def lease_one(network: NatNetwork) -> None:
    events = Events(network)
    network.create_endpoint("vm1", mac="02:00:00:00:00:77")
    guest = Guest(parse_mac("02:00:00:00:00:77"), lambda frame: attachment.send(frame))  # noqa: PLW0108
    attachment = network.attach("vm1", "memory", on_frame=guest.receive)
    assert guest.lease().interface == IPv4Interface("192.168.64.2/24")
    assert events.next(LeaseTaken).endpoint == "vm1"


def test_the_first_guest_that_asks_has_the_dhcp_server_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_host, "_IDLE_SECONDS", 3600.0)
    with NatNetwork() as network:
        network.maintenance()
        assert network.services.made_dhcp is None
        lease_one(network)
        assert network.services.made_dhcp is network.services.dhcp


def test_a_dhcp_server_that_the_program_asks_for_is_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_host, "_IDLE_SECONDS", 3600.0)
    with NatNetwork() as network:
        assert network.services.dhcp.leases() == []
        lease_one(network)
        assert [one.endpoint_id for one in network.services.dhcp.leases()] == ["vm1"]


def test_a_network_that_stays_makes_its_dhcp_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_host, "_IDLE_SECONDS", 0.0)
    with NatNetwork() as network:
        until(lambda: network.services.made_dhcp, "the DHCP server")
        lease_one(network)
        server = network.services.dhcp
    network.start()
    assert network.services.made_dhcp is server
    network.stop()


def test_dns_over_udp(served: Served, add_guest: AddGuest) -> None:
    guest = add_guest("vm1")
    guest.name_server = IPv4Address("192.168.64.1")
    assert str(guest.resolve("web.example")) == "192.0.2.7"
    assert served.dns.asked == [(b"\3web\7example\0", 1)]


def test_dns_over_tcp(served: Served, add_guest: AddGuest) -> None:
    connection = add_guest("vm1").connect("192.168.64.1", 53)
    query = messages.dns_query(5, "web.example")
    connection.send(struct.pack("!H", len(query)) + query)
    answer = connection.recv(512)
    assert messages.dns_addresses(answer[2:], 5) == [IPv4Address("192.0.2.7")]
    assert served.dns.asked == [(b"\3web\7example\0", 1)]


def test_a_defect_of_the_authority_fails_one_question(served: Served, add_guest: AddGuest) -> None:
    guest = add_guest("vm1")
    guest.name_server = IPv4Address("192.168.64.1")
    with pytest.raises(GuestError):
        guest.resolve("broken.example")
    assert str(guest.resolve("web.example")) == "192.0.2.7"


def test_malformed_datagrams_do_no_harm(served: Served, add_guest: AddGuest) -> None:
    guest = add_guest("vm1")
    guest.send_udp("192.168.64.1", 67, 68, b"")
    guest.send_udp("192.168.64.1", 67, 68, bytes(2000))
    guest.name_server = IPv4Address("192.168.64.1")
    assert str(guest.resolve("web.example")) == "192.0.2.7"


def test_services_that_are_off() -> None:
    network = NatNetwork(NatConfig(dhcp=False, dns=False))
    with pytest.raises(ConfigError, match="dhcp=True"):
        _ = network.services.dhcp
    with pytest.raises(ConfigError, match="dns=True"):
        _ = network.services.dns
    assert repr(network.services) == "<Services none>"
    assert repr(NatNetwork().services) == "<Services dhcp dns>"


@pytest.mark.parametrize(
    ("address", "rcode", "name"),
    [
        ("192.168.64.1", dns.rcode.NOERROR, "gateway.guestnet.internal."),
        ("192.168.64.2", dns.rcode.NOERROR, "vm1.guestnet.internal."),
        ("192.168.64.77", dns.rcode.NXDOMAIN, None),
    ],
)
def test_addresses_of_the_network_are_not_asked_of_others(address: str, rcode: int, name: str | None) -> None:
    network = NatNetwork(NatConfig(resolvers=()))
    network.create_endpoint("vm1")
    question = dns.reversename.from_address(address).to_wire()
    assert question is not None
    answer = network.services.dns.lookup(question, dns.rdatatype.PTR)
    assert answer is not None
    assert answer.rcode == rcode
    assert [data for *_, data in answer.answers] == ([] if name is None else [to_labels(name)])
