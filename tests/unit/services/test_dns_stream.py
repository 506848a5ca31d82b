"""DNS over TCP, on the unix socket that guests' connections are relayed to (RFC 7766)."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dns.message
import dns.rcode
import pytest
from guestnet.services.dns import DnsServer
from guestnet.services.dns import stream as stream_module

from .dns_played import server, texts

QUERY = dns.message.make_query("vm1", "A", use_edns=-1).to_wire()


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


async def read(reader: asyncio.StreamReader) -> dns.message.Message:
    length = int.from_bytes(await reader.readexactly(2), "big")
    return dns.message.from_wire(await reader.readexactly(length))


class Served:
    def __init__(self, made: DnsServer, path: str) -> None:
        self.server, self.path = made, path
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self, port: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection, named as the relay names those of the guest on a port."""
        sock = socket.socket(socket.AF_UNIX)
        if port is not None:
            sock.bind(f"\0guestnet/{port}/{os.getpid()}.{sock.fileno()}")
        sock.connect(self.path)
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        self.writers.append(writer)
        return reader, writer


@asynccontextmanager
async def serving(tmp_path: Path, **values: Any) -> AsyncIterator[Served]:
    made = Served(server(**values), str(tmp_path / "dns"))
    await made.server.serve_unix(made.path)
    try:
        yield made
    finally:
        await made.server.close()
        for writer in made.writers:
            writer.transport.abort()
        # Transports close in the next turn of the loop.
        await asyncio.sleep(0)


async def test_one_question(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.connect()
        writer.write(framed(QUERY))
        assert texts(await read(reader)) == ["vm1. A 192.168.64.2"]


async def test_questions_in_a_row_and_in_pieces(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.connect()
        ids = set()
        stream = b""
        for number in range(100):
            query = dns.message.make_query("vm1", "A", id=number, use_edns=-1)
            stream += framed(query.to_wire())
        for at in range(0, len(stream), 7):
            writer.write(stream[at : at + 7])
            await asyncio.sleep(0)
        for _ in range(100):
            ids.add((await read(reader)).id)
        assert ids == set(range(100))


async def test_a_guest_that_ends_its_side_still_gets_its_answers(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.connect()
        writer.write(framed(QUERY) * 3)
        writer.write_eof()
        for _ in range(3):
            await read(reader)
        assert await reader.read() == b""


async def test_slow_questions_do_not_hold_up_the_others(tmp_path: Path) -> None:
    async with serving(tmp_path, resolvers=("127.0.0.1:1",)) as served:
        gate = asyncio.Event()

        async def slow(*_: object, **__: object) -> None:
            await gate.wait()

        served.server._upstream.ask = slow  # type: ignore[method-assign]
        reader, writer = await served.connect()
        later = dns.message.make_query("www.example.org", "A", id=1)
        writer.write(framed(later.to_wire()) + framed(QUERY))
        assert texts(await read(reader)) == ["vm1. A 192.168.64.2"]
        gate.set()
        assert (await read(reader)).id == 1


async def test_questions_of_one_connection_are_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path, resolvers=("127.0.0.1:1",)) as served:
        gate, full, asked = asyncio.Event(), asyncio.Event(), []

        async def slow(query: object, *_: object, **__: object) -> None:
            asked.append(query)
            if len(asked) == stream_module.PER_CONNECTION:
                full.set()
            await gate.wait()

        served.server._upstream.ask = slow  # type: ignore[method-assign]
        reader, writer = await served.connect()
        for number in range(200):
            query = dns.message.make_query(f"n{number}.example.org", "A", id=number)
            writer.write(framed(query.to_wire()))
        other, own = await served.connect()
        own.write(framed(QUERY))
        await read(other)
        await full.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(asked) == stream_module.PER_CONNECTION
        gate.set()
        assert len({(await read(reader)).id for _ in range(200)}) == 200


async def test_questions_of_a_connection_that_has_ended_still_count(tmp_path: Path) -> None:
    """Or a guest that ends one connection after the other would have any number asked at a time."""
    async with serving(tmp_path, resolvers=("127.0.0.1:1",), questions_per_endpoint=8) as served:
        gate, asked = asyncio.Event(), 0

        async def slow(*_: object, **__: object) -> None:
            nonlocal asked
            asked += 1
            await gate.wait()

        served.server._upstream.ask = slow  # type: ignore[method-assign]
        for number in range(10):
            reader, writer = await served.connect(port=7)
            for one in range(5):
                query = dns.message.make_query(f"n{number}-{one}.example.org", "A", id=one)
                writer.write(framed(query.to_wire()))
            # What is no query ends the connection, whatever was asked before.
            writer.write(framed(b"x"))
            while await reader.read(4096):
                pass
        assert asked == 8
        reader, writer = await served.connect(port=7)
        gate.set()
        writer.write(framed(dns.message.make_query("later.example.org", "A").to_wire()))
        assert (await read(reader)).rcode() == dns.rcode.SERVFAIL, "asked, and not refused"


@pytest.mark.parametrize("data", [b"\0\0", framed(b"x"), framed(b"\0\1\x80\0" + bytes(8))])
async def test_what_is_no_query_ends_the_connection(tmp_path: Path, data: bytes) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.connect()
        writer.write(data)
        assert await reader.read() == b""


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff\xff", framed(QUERY)[:-1]])
async def test_who_is_silent_too_long_is_closed(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "IDLE", 0.05)
    async with serving(tmp_path) as served:
        reader, writer = await served.connect()
        writer.write(data)
        assert await reader.read() == b""
        assert not served.server._stream._connections


async def test_a_guest_that_does_not_read_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "IDLE", 0.1)
    big = {"big.example": tuple(f"TXT:{number:03}{'x' * 240}" for number in range(200))}
    async with serving(tmp_path, records=big) as served:
        reader, writer = await served.connect()
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        query = framed(dns.message.make_query("big.example", "TXT").to_wire())
        writer.write(query * 200)

        async def write_on() -> None:
            while True:
                await writer.drain()
                writer.write(query)

        # Writing fails when the server has closed its side.
        with pytest.raises((ConnectionError, BrokenPipeError)):
            await write_on()


async def test_connections_are_bounded_and_the_silent_one_goes(tmp_path: Path) -> None:
    async with serving(tmp_path, connections=4) as served:
        made = [await served.connect() for _ in range(4)]
        for reader, writer in made[1:]:
            writer.write(framed(QUERY))
            await read(reader)
        new = await served.connect()
        new[1].write(framed(QUERY))
        await read(new[0])
        assert await made[0][0].read() == b""
        assert len(served.server._stream._connections) == 4
        for reader, writer in (*made[1:], new):
            writer.write(framed(QUERY))
            await read(reader)


async def test_one_guest_cannot_take_the_connections_of_others(tmp_path: Path) -> None:
    async with serving(tmp_path, connections=4) as served:
        modest = await served.connect(1)
        for _ in range(20):
            greedy = await served.connect(2)
        greedy[1].write(framed(QUERY))
        await read(greedy[0])
        modest[1].write(framed(QUERY))
        assert texts(await read(modest[0])) == ["vm1. A 192.168.64.2"]


async def test_one_guests_connections_share_its_questions(tmp_path: Path) -> None:
    values: dict[str, Any] = {"resolvers": ("127.0.0.1:1",), "questions": 20, "questions_per_endpoint": 8}
    async with serving(tmp_path, **values) as served:
        gate, full, asked = asyncio.Event(), asyncio.Event(), []

        async def slow(query: object, *_: object, **__: object) -> None:
            asked.append(query)
            if len(asked) == 8:
                full.set()
            await gate.wait()

        served.server._upstream.ask = slow  # type: ignore[method-assign]
        greedy = [await served.connect(2) for _ in range(6)]
        for number, (_, writer) in enumerate(greedy):
            if number == 2:
                await full.wait()
            for part in range(4):
                query = dns.message.make_query(f"n{number}-{part}.example.org", "A", id=part)
                writer.write(framed(query.to_wire()))
        for reader, _ in greedy[2:]:
            for _ in range(4):
                assert (await read(reader)).rcode() == dns.rcode.REFUSED
        reader, writer = await served.connect(1)
        writer.write(framed(dns.message.make_query("www.example.org", "A", id=9).to_wire()))
        gate.set()
        assert (await read(reader)).rcode() == dns.rcode.SERVFAIL


async def test_close_ends_all_and_removes_the_socket(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reader, writer = await served.connect()
        writer.write(framed(QUERY))
        await read(reader)
        await served.server.close()
        assert await reader.read() == b""
        assert os.listdir(tmp_path) == []
        await served.server.close()
        await served.server.serve_unix(served.path)
        again, asking = await served.connect()
        asking.write(framed(QUERY))
        assert texts(await read(again)) == ["vm1. A 192.168.64.2"]


async def test_answers_that_a_guest_does_not_read_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "PER_SECOND", 1_000_000)
    async with serving(tmp_path) as served:

        async def large(data: bytes, tcp: bool, asker: object) -> bytes:
            return data[:2] + bytes(60_000)

        streams = served.server._stream
        streams._answer = large
        for _ in range(20):
            _, writer = await served.connect(port=7)
            writer.write(framed(QUERY) * 32)
        most = 0
        for _ in range(200):
            await asyncio.sleep(0)
            most = max(
                most, sum(one.writer.transport.get_write_buffer_size() for one in streams._connections)
            )
        assert 1 << 20 < most <= stream_module.UNREAD + 20 * 65536 + 60_000
        # Who reads gets all answers, however large.
        reader, writer = await served.connect(port=8)
        writer.write(framed(QUERY) * 200)
        for _ in range(200):
            assert len(await reader.readexactly(60_004)) == 60_004


async def test_questions_of_a_guest_have_a_pace_on_all_its_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All guests are answered by one thread. Over UDP the switch limits how much each may ask."""
    monkeypatch.setattr(stream_module, "PER_SECOND", 1000)
    async with serving(tmp_path) as served:
        begin = asyncio.get_running_loop().time()
        greedy = [await served.connect(port=7) for _ in range(10)]
        for _, writer in greedy:
            writer.write(framed(QUERY) * 60)
        reader, writer = await served.connect(port=8)
        writer.write(framed(QUERY))
        await read(reader)
        others_turn = asyncio.get_running_loop().time() - begin
        for reader, _ in greedy:
            for _ in range(60):
                await read(reader)
        lasted = asyncio.get_running_loop().time() - begin
        # What was not used before may come at once.
        assert lasted >= (600 - stream_module.PER_SECOND * stream_module.SAVED) / 1000 - 0.01
        assert others_turn < lasted / 2
        # Long questions count for more.
        begin = asyncio.get_running_loop().time()
        reader, writer = await served.connect(port=9)
        long = QUERY + bytes(60_000)
        for _ in range(15):
            writer.write(framed(long))
        for _ in range(15):
            await read(reader)
        assert asyncio.get_running_loop().time() - begin >= 0.3

        async def large(data: bytes, tcp: bool, asker: object) -> bytes:
            return data[:2] + bytes(60_000)

        # Long answers too.
        served.server._stream._answer = large
        begin = asyncio.get_running_loop().time()
        reader, writer = await served.connect(port=10)
        for _ in range(15):
            writer.write(framed(QUERY))
            await reader.readexactly(60_004)
        assert asyncio.get_running_loop().time() - begin >= 0.3
