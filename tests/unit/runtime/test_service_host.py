"""Datagrams and connections of guests reach the gateway's services and their answers come back. The services
are played by the test; their own tests are beside them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from types import SimpleNamespace
from typing import Any

import dns.message
import dns.rcode
import dns.reversename
import pytest
from guestnet import ConfigError, NatConfig, NatNetwork
from guestnet.model.events import LeaseReleased, LeaseTaken
from guestnet.model.ipam import parse_mac
from guestnet.services.dns.server import Reply as DnsReply
from guestnet.testing import messages
from guestnet.testing.guest import Guest

from .conftest import PATIENCE, AddGuest, Events, add_memory_guest, fetch


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
    """Knows one name."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, str | None]] = []
        self.changed: Any = None
        self._server: asyncio.Server | None = None

    async def handle(self, query: bytes, *, tcp: bool, endpoint_id: str | None) -> bytes | None:
        self.asked.append((tcp, endpoint_id))
        if b"slow" in query:
            await asyncio.sleep(600)
        head = query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + query[12:]
        return head + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\7"

    def known(self, query: bytes) -> None:
        return None

    async def wait(self, query: bytes, endpoint_id: str | None) -> DnsReply:
        return DnsReply(await self.handle(query, tcp=False, endpoint_id=endpoint_id))

    def own_names(self) -> list[bytes]:
        return []

    def server(self) -> None:
        return None

    async def serve_unix(self, path: str) -> None:
        self._server = await asyncio.start_unix_server(self._connection, path)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = struct.unpack("!H", await reader.readexactly(2))[0]
        answer = await self.handle(await reader.readexactly(length), tcp=True, endpoint_id=None)
        assert answer is not None
        writer.write(struct.pack("!H", len(answer)) + answer)
        writer.close()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()


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


def test_dns_over_udp(served: Served, add_guest: AddGuest) -> None:
    guest = add_guest("vm1")
    guest.name_server = IPv4Address("192.168.64.1")
    assert str(guest.resolve("web.example")) == "192.0.2.7"
    assert served.dns.asked == [(False, "vm1")]


def test_dns_over_tcp(served: Served, add_guest: AddGuest) -> None:
    connection = add_guest("vm1").connect("192.168.64.1", 53)
    query = messages.dns_query(5, "web.example")
    connection.send(struct.pack("!H", len(query)) + query)
    answer = connection.recv(512)
    assert messages.dns_addresses(answer[2:], 5) == [IPv4Address("192.0.2.7")]
    assert served.dns.asked == [(True, None)]


def test_unanswered_questions_are_bounded(served: Served, network: NatNetwork, add_guest: AddGuest) -> None:
    guest, other = add_guest("vm1"), add_guest("vm2")
    for n in range(300):
        guest.send_udp("192.168.64.1", 53, 5000, messages.dns_query(n, "slow.example"))
    # Another guest's question is answered all the same, and stopping does not wait for the slow ones.
    other.name_server = IPv4Address("192.168.64.1")
    assert str(other.resolve("web.example")) == "192.0.2.7"
    session = network._session
    assert session is not None
    assert session._services.refused == 300 - 256


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
    query = dns.message.make_query(dns.reversename.from_address(address), "PTR")
    data = asyncio.run(network.services.dns.handle(query.to_wire(), tcp=False, endpoint_id="vm1"))
    assert data is not None
    answer = dns.message.from_wire(data)
    assert answer.rcode() == rcode
    assert [str(rdata) for rrset in answer.answer for rdata in rrset] == ([] if name is None else [name])


@pytest.mark.parametrize("hidden", [True, False])
def test_a_directory_for_sockets_is_private_and_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, hidden: bool
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("too-long" * 20)))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if not hidden:  # as on a system without /proc
        monkeypatch.delattr("os.O_PATH")
    made = Served(dhcp=False)
    with made.network:
        if hidden:
            # Whatever ends this process, nothing is left.
            assert list(tmp_path.iterdir()) == []
        else:
            (directory,) = tmp_path.iterdir()
            assert directory.stat().st_mode & 0o777 == 0o700
            assert [path.name for path in directory.iterdir()] == ["dns"]
    assert list(tmp_path.iterdir()) == []
