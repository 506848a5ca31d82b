"""A name server that a test plays on loopback, over UDP and TCP, and questions asked with dnspython."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
from guestnet.services.dns import DnsConfig, DnsServer

GATEWAY = IPv4Address("192.168.64.1")
SUBNET = IPv4Network("192.168.64.0/24")
Play = Callable[[dns.message.Message, bool], "bytes | list[bytes] | None"]


class Guests:
    """The directory of a network: names and addresses."""

    def __init__(self, **guests: str) -> None:
        self.guests = {name.replace("_", "-"): IPv4Address(address) for name, address in guests.items()}

    def address_named(self, name: str, *, told: bool = True) -> IPv4Address | None:
        return self.guests.get(name.lower())

    def name_of(self, address: IPv4Address) -> str | None:
        return next((name for name, known in self.guests.items() if known == address), None)


def server(clock: Callable[[], float] | None = None, **values: Any) -> DnsServer:
    config: dict[str, Any] = {
        "gateway": GATEWAY,
        "subnet": SUBNET,
        "resolvers": (),
        "directory": Guests(vm1="192.168.64.2", web_1="192.168.64.3"),
    }
    made = DnsConfig(**(config | values))
    return DnsServer(made) if clock is None else DnsServer(made, clock)


async def resolve(
    dns_server: DnsServer,
    name: str,
    type_: str = "A",
    *,
    tcp: bool = False,
    endpoint: str = "vm1",
    **options: Any,
) -> dns.message.Message:
    """Asks, and has the answer read by dnspython, which takes no malformed one."""
    query = dns.message.make_query(name, type_, **options)
    data = await dns_server.handle(query.to_wire(), tcp=tcp, endpoint_id=endpoint)
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
