"""A PCP client's side of the wire, written apart from the server's, by the figures of RFC 6887 and RFC 6886;
and a host whose ports are opened in memory."""

from __future__ import annotations

import asyncio
import random
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from guestnet.errors import GuestnetError, PortInUse
from guestnet.services.pcp import Mapping, PcpConfig, PcpServer

VM1, VM2 = IPv4Address("192.168.64.2"), IPv4Address("192.168.64.3")
OUTSIDE = "203.0.113.1"
NONCE = b"twelve bytes"
TCP, UDP, SCTP = 6, 17, 132
(
    SUCCESS,
    UNSUPP_VERSION,
    NOT_AUTHORIZED,
    MALFORMED_REQUEST,
    UNSUPP_OPCODE,
    UNSUPP_OPTION,
    MALFORMED_OPTION,
    NETWORK_FAILURE,
    NO_RESOURCES,
    UNSUPP_PROTOCOL,
    USER_EX_QUOTA,
    CANNOT_PROVIDE_EXTERNAL,
    ADDRESS_MISMATCH,
) = range(13)
SHORT, LONG = 30, 1800
PREFER_FAILURE = bytes((2, 0, 0, 0))
NOWHERE = "0.0.0.0"


def mapped(address: str | IPv4Address) -> bytes:
    """An IPv4 address in 128 bits."""
    return bytes.fromhex("00000000000000000000ffff") + IPv4Address(address).packed


def head(opcode: int, lifetime: int = 0, client: IPv4Address = VM1, *, version: int = 2) -> bytes:
    return bytes((version, opcode, 0, 0)) + lifetime.to_bytes(4, "big") + mapped(client)


def announce(client: IPv4Address = VM1) -> bytes:
    return head(0, 0, client)


def ask_map(
    internal: int = 80,
    *,
    lifetime: int = 3600,
    protocol: int = TCP,
    external: int = 0,
    address: str = NOWHERE,
    nonce: bytes = NONCE,
    client: IPv4Address = VM1,
    options: bytes = b"",
) -> bytes:
    data = nonce + bytes((protocol, 0, 0, 0)) + struct.pack("!HH", internal, external) + mapped(address)
    return head(1, lifetime, client) + data + options


def pmp(opcode: int, internal: int, external: int, lifetime: int) -> bytes:
    return bytes((0, opcode, 0, 0)) + struct.pack("!HHI", internal, external, lifetime)


@dataclass
class Said:
    """An answer of PCP."""

    opcode: int
    result: int
    lifetime: int
    epoch: int
    reserved: bytes
    data: bytes

    @property
    def nonce(self) -> bytes:
        return self.data[:12]

    @property
    def protocol(self) -> int:
        return self.data[12]

    @property
    def internal(self) -> int:
        return int.from_bytes(self.data[16:18], "big")

    @property
    def external(self) -> int:
        return int.from_bytes(self.data[18:20], "big")

    @property
    def address(self) -> str:
        assert self.data[20:32] == bytes(10) + b"\xff\xff"
        return str(IPv4Address(self.data[32:36]))

    @property
    def options(self) -> bytes:
        return self.data[36:]


def read(answer: bytes | None) -> Said:
    assert answer is not None
    assert 24 <= len(answer) <= 1100
    assert len(answer) % 4 == 0
    version, opcode, reserved, result, lifetime, epoch = struct.unpack_from("!BBBBII", answer)
    assert (version, reserved, opcode & 0x80) == (2, 0, 0x80)
    return Said(opcode & 0x7F, result, lifetime, epoch, answer[12:24], answer[24:])


class Host:
    """Ports of a host, in memory. `busy` are those of its other programs."""

    def __init__(self) -> None:
        self.address: str | None = OUTSIDE
        self.holders = {"vm1": {VM1}, "vm2": {VM2}}
        self.busy: set[tuple[str, int]] = set()
        self.tried: list[int] = []
        self.broken = False
        self.open_ports: dict[tuple[str, int], tuple[IPv4Address, int]] = {}
        self.gate: asyncio.Event | None = None
        self.waits = asyncio.Event()

    def external(self) -> IPv4Address | None:
        return None if self.address is None else IPv4Address(self.address)

    def holds(self, endpoint_id: str, address: IPv4Address) -> bool:
        return address in self.holders.get(endpoint_id, ())

    async def open(self, endpoint_id: str, protocol: str, guest: tuple[IPv4Address, int], port: int) -> Any:
        self.tried.append(port)
        if self.gate is not None:
            self.waits.set()
            await self.gate.wait()
        if self.broken:
            raise GuestnetError("no more descriptors")
        if (protocol, port) in self.busy or (protocol, port) in self.open_ports:
            raise PortInUse("taken")
        assert self.holds(endpoint_id, guest[0])
        self.open_ports[protocol, port] = guest
        return (protocol, port)

    async def close(self, handle: Any) -> None:
        self.drop(handle)

    def drop(self, handle: Any) -> None:
        del self.open_ports[handle]


class Played:
    """A server with a clock that the test turns."""

    def __init__(self, first: int = 40000, last: int = 40999, **values: int) -> None:
        self.now = 5000.0
        self.host = Host()
        self.server = PcpServer(
            PcpConfig(first=first, last=last, **values),
            lambda: self.now,
            random.Random(first),
            lambda: self.now,
        )
        self.opened: list[Mapping] = []
        self.closed: list[Mapping] = []
        self.server.on_open = self.opened.append
        self.server.on_close = self.closed.append
        self.server.start(self.host)

    async def send(self, payload: bytes, endpoint: str = "vm1", source: IPv4Address = VM1) -> bytes | None:
        return await self.server.handle(payload, endpoint_id=endpoint, source=source)

    async def ask(self, payload: bytes, endpoint: str = "vm1", source: IPv4Address = VM1) -> Said:
        return read(await self.send(payload, endpoint, source))

    async def map(self, internal: int = 80, **values: Any) -> Said:
        """A request of vm1, or of vm2 where that is the client."""
        client = values.get("client", VM1)
        return await self.ask(ask_map(internal, **values), "vm1" if client == VM1 else "vm2", client)

    def refusals(self) -> dict[str, int]:
        return {
            name.removeprefix("refused_"): count
            for name, count in self.server.counters.items()
            if name.startswith("refused_")
        }
