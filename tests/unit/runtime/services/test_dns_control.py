"""DNS of a running network: changes are seen at once, other name servers within a second; TCP is as UDP."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
from guestnet import NatConfig, NatNetwork
from guestnet.model.ipam import parse_mac
from guestnet.services.dns.resolvers import Resolver, Resolvers
from guestnet.testing.guest import Guest, GuestError
from hypothesis import given, settings
from hypothesis import strategies as st

from ..conftest import add_memory_guest, until

RECORDS = {
    "web.example": "192.0.2.7",
    "two.example": ["192.0.2.8", "2001:db8::8", "MX:10 web.example"],
    "alias.example": "CNAME:two.example",
    "many.example": [f"192.0.2.{n}" for n in range(60)],
    "*.wild.example": "TXT:any",
}


class Server:
    """A name server on loopback: an address for every name, and a count of the questions."""

    def __init__(self, address: str) -> None:
        self.address, self.asked = address, 0
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.resolver = Resolver(*self.socket.getsockname())
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while len(data := self.socket.recvfrom(65536)) and data[0]:
            self.asked += 1
            query = dns.message.from_wire(data[0])
            answer = dns.message.make_response(query, recursion_available=True)
            name = query.question[0].name
            if b"nobody" in name.labels:
                answer.set_rcode(dns.rcode.NXDOMAIN)
            elif b"broken" in name.labels:
                answer.set_rcode(dns.rcode.SERVFAIL)
            else:
                answer.answer.append(dns.rrset.from_text(name, 300, "IN", "A", self.address))
            self.socket.sendto(answer.to_wire(), data[1])

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.socket.getsockname())
        self.thread.join()
        self.socket.close()


@contextmanager
def serving(address: str) -> Iterator[Server]:
    server = Server(address)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving("192.0.2.99") as made:
        yield made


@pytest.fixture
def network(server: Server) -> Iterator[NatNetwork]:
    made = NatNetwork(NatConfig(dhcp=False, dns_records=RECORDS, resolvers=()))
    made.services.dns._source._current = Resolvers((server.resolver,))
    with made:
        yield made


def guest_of(network: NatNetwork, name: str) -> Guest:
    guest = add_memory_guest(network, name)
    guest.name_server = IPv4Address("192.168.64.1")
    return guest


def ask(guest: Guest, query: bytes) -> bytes:
    """The answer as it came."""
    port = guest._port()
    guest._datagrams[port] = []
    try:
        return guest._asking(port, lambda: guest.send_udp("192.168.64.1", 53, port, query))[0]
    finally:
        del guest._datagrams[port]


def hits(network: NatNetwork) -> int:
    """Queries answered from the cache; counters of the network are some milliseconds old, so they are asked
    for by endpoint."""
    return sum(stats.dns_hits for stats in network.endpoint_stats().values())


def asked(network: NatNetwork) -> int:
    return sum(stats.dns_asked for stats in network.endpoint_stats().values())


def stream_guest(network: NatNetwork, name: str) -> tuple[Guest, socket.socket]:
    """A guest whose frames come by a socket, beside the commands."""
    endpoint = network.create_endpoint(name)
    ours, theirs = socket.socketpair()
    network.attach(name, "stream", sock=theirs)
    theirs.close()
    lock = threading.Lock()

    def send(frame: bytes) -> None:
        with lock:
            ours.sendall(struct.pack("!I", len(frame)) + frame)

    guest = Guest(parse_mac(endpoint.mac), send)

    def read() -> None:
        with ours.makefile("rb") as file:
            while len(head := file.read(4)) == 4:
                guest.receive(file.read(struct.unpack("!I", head)[0]))

    threading.Thread(target=read, daemon=True).start()
    guest.address = IPv4Interface((endpoint.ip, 24))
    guest.router = guest.name_server = network.gateway
    return guest, ours


def test_a_changed_record_is_seen_at_once(network: NatNetwork) -> None:
    guest, end = stream_guest(network, "vm1")
    service = network.services.dns
    with end:
        for n in range(1, 100):
            service.remove_record("web.example")
            service.add_record("web.example", f"192.0.2.{n}")
            for _ in range(3):
                assert str(guest.resolve("web.example")) == f"192.0.2.{n}"
        # Of three queries two were cached.
        assert hits(network) > 99
        # A name that was somebody else's becomes ours.
        assert str(guest.resolve("www.far.example")) == "192.0.2.99"
        service.add_record("www.far.example", "192.0.2.1")
        assert str(guest.resolve("www.far.example")) == "192.0.2.1"
        end.shutdown(socket.SHUT_RDWR)


def test_guests_that_come_and_go_are_seen_at_once(network: NatNetwork) -> None:
    guest = guest_of(network, "vm1")
    for n in range(20):
        for _ in range(2):
            # A bare name that no guest has is somebody else's.
            assert str(guest.resolve("vm2")) == "192.0.2.99"
            with pytest.raises(GuestError, match="no address"):
                guest.resolve("vm2.guestnet.internal")
        endpoint = network.create_endpoint("vm2", ip=f"192.168.64.{100 + n}")
        for name in ("VM2", "vm2.guestnet.internal", "vm2.guestnet.internal"):
            assert guest.resolve(name) == endpoint.ip
        network.remove_endpoint("vm2")
    assert hits(network) > 10


def test_names_of_others_are_asked_once(network: NatNetwork, server: Server) -> None:
    one, two = guest_of(network, "vm1"), guest_of(network, "vm2")
    for n in range(20):
        for guest in (one, two, one):
            assert str(guest.resolve(f"n{n}.far.example")) == "192.0.2.99"
    assert server.asked == 20
    assert asked(network) >= 15
    assert hits(network) >= 35
    query = dns.message.make_query("broken.example", "A")
    assert dns.message.from_wire(ask(one, query.to_wire())).rcode() == dns.rcode.SERVFAIL
    query = dns.message.make_query("nobody.example", "A", use_edns=0)
    assert dns.message.from_wire(ask(one, query.to_wire())).rcode() == dns.rcode.NXDOMAIN


def test_other_name_servers_are_found_within_a_second(network: NatNetwork) -> None:
    guest = guest_of(network, "vm1")
    assert str(guest.resolve("www.far.example")) == "192.0.2.99"
    assert str(guest.resolve("www.far.example")) == "192.0.2.99"
    source = network.services.dns._source
    with serving("192.0.2.66") as other:
        source._current = Resolvers((other.resolver,))
        until(lambda: str(guest.resolve("www.far.example")) == "192.0.2.66", "the other server")
        for _ in range(50):
            assert str(guest.resolve("www.far.example")) == "192.0.2.66"
        source._current = replace(source._current, servers=())
        until(lambda: other.asked and not resolves(guest), "none at all")


def resolves(guest: Guest) -> bool:
    query = dns.message.make_query("www.far.example", "A")
    return dns.message.from_wire(ask(guest, query.to_wire())).rcode() == dns.rcode.NOERROR


def test_two_workers_say_the_same() -> None:
    with NatNetwork(NatConfig(dhcp=False, dns_records=RECORDS, resolvers=(), workers=2)) as network:
        guests = [guest_of(network, f"vm{n}") for n in range(4)]
        for n in range(1, 20):
            network.services.dns.remove_record("web.example")
            network.services.dns.add_record("web.example", f"192.0.2.{n}")
            for guest in (*guests, *guests):
                assert str(guest.resolve("web.example")) == f"192.0.2.{n}"
        assert hits(network) > 40


NAMES = [
    "web.example",
    "TWO.example",
    "alias.Example",
    "many.example",
    "a.wild.example",
    "none.wild2.example",
]
NAMES += [
    "vm1",
    "vm1.guestnet.internal",
    "nobody.guestnet.internal",
    "gateway.guestnet.internal",
    "localhost",
]
CACHED: list[int] = []
TYPES = ["A", "AAAA", "MX", "TXT", "CNAME", "SOA", "NS", "PTR", "HTTPS", "ANY"]


@given(
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(TYPES),
    edns=st.sampled_from([None, 0, 512, 700, 1232, 4096]),
    flags=st.sampled_from([0x0100, 0x0110, 0x0120, 0x0130, 0x0000, 0x0140, 0x1100]),
    dnssec=st.booleans(),
    identity=st.integers(0, 65535),
    edit=st.one_of(st.none(), st.tuples(st.integers(0, 80), st.integers(0, 255))),
)
def compare(
    network: NatNetwork,
    guest: Guest,
    name: str,
    kind: str,
    edns: int | None,
    flags: int,
    dnssec: bool,
    identity: int,
    edit: tuple[int, int] | None,
) -> None:
    head = struct.pack("!HHHHHH", identity, flags, 1, 0, 0, edns is not None)
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    query = bytearray(head + labels + b"\0" + struct.pack("!HH", dns.rdatatype.from_text(kind), 1))
    if edns is not None:
        query += struct.pack("!BHHIH", 0, 41, edns, 0x8000 if dnssec else 0, 0)
    if edit is not None and edit[0] < len(query):
        query[edit[0]] = edit[1]
    before = network.endpoint_stats()["vm1"].dns_hits
    first, second = (ask(guest, bytes(query)) for _ in range(2))
    assert aged(first) == aged(second)
    if second[3] & 15 in (0, 3) and len(second) > 12 and not first[2] & 2:
        CACHED.append(network.endpoint_stats()["vm1"].dns_hits - before)


def aged(data: bytes) -> tuple[bytes, str]:
    """An answer without its TTLs."""
    message = dns.message.from_wire(data)
    for rrset in (*message.answer, *message.authority, *message.additional):
        rrset.ttl = 0
    return data[:12], message.to_text()


def test_a_cached_response_says_what_the_first_one_said() -> None:
    with NatNetwork(NatConfig(dhcp=False, dns_records=RECORDS, resolvers=())) as network:
        guest = guest_of(network, "vm1")
        settings(max_examples=250, deadline=None)(compare)(network, guest)
        assert sum(CACHED) > 50


def test_queries_over_tcp_are_pipelined_and_answered_in_any_order(
    network: NatNetwork, server: Server
) -> None:
    guest = guest_of(network, "vm1")
    connection = guest.connect("192.168.64.1", 53)
    asked = {}
    for n in range(300):
        name = ("web.example", "vm1.guestnet.internal", f"n{n}.far.example")[n % 3]
        query = dns.message.make_query(name, "A", id=n)
        asked[n] = query
        wire = query.to_wire()
        connection.send(len(wire).to_bytes(2, "big") + wire)
    data = b""
    while asked:
        while len(data) >= 2 and len(data) >= 2 + int.from_bytes(data[:2], "big"):
            end = 2 + int.from_bytes(data[:2], "big")
            answer = dns.message.from_wire(data[2:end])
            assert asked.pop(answer.id).is_response(answer)
            assert answer.answer
            data = data[end:]
        if asked:
            data += connection.recv(65536)
    assert server.asked == 100
    stats = network.endpoint_stats()["vm1"]
    assert stats.dns_hits + stats.dns_misses == 300
    # The connection ends as the guest does.
    connection.close()
    assert connection.recv(1) == b""


def test_a_connection_that_asks_nothing_is_closed(network: NatNetwork) -> None:
    """After ten seconds; what is no query ends it at once."""
    guest = guest_of(network, "vm1")
    rude = guest.connect("192.168.64.1", 53)
    rude.send(b"\0\1x")
    assert rude.recv(1) == b""


def test_host_only_asks_no_name_server_and_keeps_the_network_s_own_names(
    network: NatNetwork, server: Server
) -> None:
    guest = guest_of(network, "vm1")
    assert str(guest.resolve("outside.example")) == server.address
    network.set_mode("host_only")
    asked = server.asked
    for name in ("outside.example", "other.example"):
        with pytest.raises(GuestError):
            guest.resolve(name)
    assert str(guest.resolve("web.example")) == "192.0.2.7"
    assert server.asked == asked
    network.set_mode("nat")
    assert str(guest.resolve("other.example")) == server.address
