"""DNS as guests see it: a running network whose guests are in memory, name servers that the test plays on
loopback, and queries made and read with dnspython.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, ip_address
from typing import Any, ClassVar

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
from guestnet import NatConfig, NatNetwork
from guestnet.model.ipam import parse_mac
from guestnet.services.dns import DnsConfig, DnsServer
from guestnet.services.dns.resolvers import Resolvers
from guestnet.testing.guest import Guest
from guestnet.testing.tcp import Connection

GATEWAY = IPv4Address("192.168.64.1")
SUBNET = IPv4Network("192.168.64.0/24")
Play = Callable[[dns.message.Message, bool], "bytes | list[bytes] | None"]


class Guests:
    """The directory of a network: names and addresses."""

    def __init__(self, **guests: str) -> None:
        self.guests = {
            name.replace("_", "-"): tuple(map(ip_address, addresses.split()))
            for name, addresses in guests.items()
        }

    def addresses_named(self, name: str, *, told: bool = True) -> tuple[IPv4Address | IPv6Address, ...]:
        return self.guests.get(name.lower(), ())

    def name_of(self, address: IPv4Address | IPv6Address) -> str | None:
        return next((name for name, known in self.guests.items() if address in known), None)


PATIENCE = 10.0


class Client(Guest):
    """A guest that sends whole DNS messages."""

    connection: Connection | None = None
    lock: threading.Lock

    def ask(self, message: bytes, tcp: bool) -> bytes | None:
        """The response; None when none comes."""
        with self.lock:
            return self._ask_tcp(message) if tcp else self._ask_udp(message)

    def _ask_udp(self, message: bytes) -> bytes | None:
        port = self._port()
        self._datagrams[port] = []
        self.send_udp(str(GATEWAY), 53, port, message)
        with self._changed:
            self._changed.wait_for(lambda: self._datagrams[port], PATIENCE)
        found = self._datagrams.pop(port)
        return found[0] if found else None

    def _ask_tcp(self, message: bytes) -> bytes | None:
        if self.connection is None:
            self.connection = self.connect(str(GATEWAY), 53)
        self.connection.send(len(message).to_bytes(2, "big") + message)
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            more = self.connection.recv(65536)
            if not more:
                self.connection = None
                return None
            data += more
        return data[2:]


class Served:
    """A running network with an authority of its own. `dns` is the authority."""

    _all: ClassVar[list[Served]] = []

    def __init__(self, dns_server: DnsServer, limits: dict[str, int]) -> None:
        self.dns = dns_server
        self.network = NatNetwork(NatConfig(dhcp=False, limits=limits))
        self.network.services._dns = dns_server
        self.network.start()
        self.clients: dict[str, Client] = {}
        self._lock = threading.Lock()
        self._all.append(self)

    @classmethod
    def close_all(cls) -> None:
        """To be called after each test."""
        while cls._all:
            cls._all.pop().network.stop()

    def client(self, name: str) -> Client:
        """The guest with this name, made when it is first asked for."""
        with self._lock:
            if name not in self.clients:
                endpoint = self.network.create_endpoint(name)
                made = Client(parse_mac(endpoint.mac), lambda frame: attachment.send(frame))  # noqa: PLW0108
                made.lock = threading.Lock()
                attachment = self.network.attach(name, "memory", on_frame=made.receive)
                made.address = IPv4Interface((endpoint.ip, 24))
                made.router = self.network.gateway
                self.clients[name] = made
            return self.clients[name]

    def use(self, resolvers: Resolvers) -> None:
        """Asks other name servers, from now on."""
        self.dns._source._current = resolvers
        session = self.network._session
        assert session is not None
        control = session._services._dns
        assert control is not None
        control._looked_at = 0.0
        control._look()

    def hurry(self, timeout: float = 0.1, attempts: int = 1) -> Served:
        """Has the forwarder wait less for name servers."""
        self.use(replace(self.dns._source._current, timeout=timeout, attempts=attempts))
        return self

    async def send(self, name: str, endpoint: str = "vm1") -> None:
        """Asks for a name without waiting for the response."""
        query = dns.message.make_query(name, "A").to_wire()
        await asyncio.to_thread(lambda: self.client(endpoint).send_udp(str(GATEWAY), 53, 5000, query))

    async def handle(self, query: bytes, *, tcp: bool, endpoint_id: str = "vm1") -> bytes | None:
        """The response to one message of a guest."""
        return await asyncio.to_thread(lambda: self.client(endpoint_id).ask(query, tcp))

    def count(self, name: str) -> int:
        """A counter of all guests."""
        return sum(getattr(stats, name) for stats in self.network.endpoint_stats().values())


def authority(**values: Any) -> DnsServer:
    """The authority of a network that does not run."""
    config: dict[str, Any] = {
        "gateway": GATEWAY,
        "subnet": SUBNET,
        "resolvers": (),
        "directory": Guests(vm1="192.168.64.2", web_1="192.168.64.3"),
    }
    return DnsServer(DnsConfig(**(config | values)))


def server(limits: dict[str, int] | None = None, **values: Any) -> Served:
    """A running network."""
    return Served(authority(**values), limits or {})


async def resolve(
    served: Served,
    name: str,
    type_: str = "A",
    *,
    tcp: bool = False,
    endpoint: str = "vm1",
    **options: Any,
) -> dns.message.Message:
    """Asks, and has the answer read by dnspython, which takes no malformed one."""
    query = dns.message.make_query(name, type_, **options)
    data = await served.handle(query.to_wire(), tcp=tcp, endpoint_id=endpoint)
    assert data is not None
    answer = dns.message.from_wire(data)
    assert query.is_response(answer), "another id or question"
    assert answer.flags & dns.flags.RA
    if not tcp:
        assert len(data) <= (512 if query.edns < 0 else max(512, min(query.payload, 1232)))
    return answer


def texts(answer: dns.message.Message) -> list[str]:
    """The records of the answer section, without their TTL."""
    return [f"{rrset.name} {rdata.rdtype.name} {rdata}" for rrset in answer.answer for rdata in rrset]


def reply(query: dns.message.Message, *records: str, rcode: int = 0, flags: int = 0) -> bytes:
    """A server's answer: each record as `name ttl type data`."""
    answer = dns.message.make_response(query, recursion_available=True, our_payload=1232)
    for line in records:
        name, ttl, type_, data = line.split(" ", 3)
        answer.answer.append(dns.rrset.from_text(name, int(ttl), "IN", type_, data))
    answer.set_rcode(dns.rcode.Rcode(rcode))
    answer.flags |= flags
    return answer.to_wire(max_size=65535)


class Upstream:
    """Answers as `play` says; `asked` are the questions that came, and whether over TCP."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.asked: list[tuple[dns.message.Message, bool]] = []
        self.came = asyncio.Event()
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ways(self) -> list[str]:
        return ["tcp" if tcp else "udp" for _, tcp in self.asked]

    def answer(self, data: bytes, tcp: bool) -> list[bytes]:
        query = dns.message.from_wire(data)
        self.asked.append((query, tcp))
        self.came.set()
        said = self.play(query, tcp)
        return [] if said is None else [said] if isinstance(said, bytes) else said

    async def __aenter__(self) -> Upstream:
        played = self

        class Datagrams(asyncio.DatagramProtocol):
            def connection_made(self, transport: Any) -> None:
                self.transport: asyncio.DatagramTransport = transport

            def datagram_received(self, data: bytes, addr: Any) -> None:
                for said in played.answer(data, False):
                    self.transport.sendto(said, addr)

        loop = asyncio.get_running_loop()
        self._tcp = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._tcp.sockets[0].getsockname()[1]
        self._udp, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", self.port))
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            length = int.from_bytes(await reader.readexactly(2), "big")
            for said in self.answer(await reader.readexactly(length), True):
                writer.write(len(said).to_bytes(2, "big") + said)
            await reader.read()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def __aexit__(self, *_: object) -> None:
        assert self._udp is not None
        assert self._tcp is not None
        self._udp.abort()
        self._tcp.close()
        for writer in self._writers:
            writer.transport.abort()
