"""Asking name servers: UDP first, TCP for what does not fit, one server after the other.

Each try has a socket of its own, connected, so that the kernel takes answers of that server only and gives
it an unpredictable port; the identifier is random, and an answer must repeat the question (RFC 5452). A
server that did not answer is asked last for a while.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from guestnet.services.dns.resolvers import Resolver, Resolvers
from guestnet.services.dns.wire import (
    AD,
    CD,
    DO,
    HEADER,
    QR,
    RD,
    TC,
    UDP_LARGEST,
    Answer,
    Malformed,
    Query,
    Rcode,
    Type,
    read_answer,
)

_log = logging.getLogger("guestnet")

PATIENCE = 12.0
"""Seconds for one question, with all servers and tries."""
_SLOW_SECONDS = 30.0
_PLAIN_SECONDS = 600.0
_REMEMBERED = 64
_LARGEST_UDP = 4096
"""Bytes of an answer by UDP that are asked for where TCP fails: it may come in fragments, or not at all."""
_WRONG_ANSWERS = 64
"""Datagrams that are no answer, before a try is given up: somebody is guessing."""
_NO_EDNS = (Rcode.FORMERR, Rcode.NOTIMP, Rcode.BADVERS)
TRY_NEXT = (Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED, Rcode.BADVERS)
"""What says more about the server than about the name."""


@dataclass(frozen=True)
class Heard:
    """A response as it came, and its shape."""

    data: bytes
    answer: Answer


class Upstream:
    """Asks; remembers which servers are slow, and which do not know EDNS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slow: dict[Resolver, float] = {}
        self._plain: dict[Resolver, float] = {}
        self._turn = itertools.count()

    async def ask(self, query: Query, resolvers: Resolvers, *, tcp: bool) -> Heard | None:
        """The best answer that the servers have; None when none answered."""
        poor: Heard | None = None
        answered: set[Resolver] = set()
        try:
            async with asyncio.timeout(PATIENCE):
                for server in self._order(resolvers):
                    if server in answered:
                        continue
                    try:
                        async with asyncio.timeout(resolvers.timeout):
                            heard = await self._ask(server, query, resolvers, tcp)
                    except (OSError, EOFError, Malformed, TimeoutError) as error:
                        self._report_silence(server, error)
                        self._remember(self._slow, server, _SLOW_SECONDS)
                        continue
                    if self._slow.pop(server, None) is not None:
                        _log.info("the name server %s answers again", server.host)
                    if heard.answer.rcode not in TRY_NEXT:
                        return heard
                    answered.add(server)
                    poor = poor or heard
        except TimeoutError:
            pass
        return poor

    def _report_silence(self, server: Resolver, error: Exception) -> None:
        """Once while it lasts: guests decide how often a server is asked."""
        if self._slow.get(server, 0.0) > self._clock():
            return
        reason = "no answer in time" if isinstance(error, TimeoutError) else str(error) or "it hung up"
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror.lower()
        _log.info("the name server %s does not answer: %s", server.host, reason)

    def first(self, resolvers: Resolvers) -> Resolver | None:
        """The server that is asked first, when nothing but a datagram is to be said about it."""
        server = next(self._order(resolvers), None)
        if server is None or resolvers.use_tcp:
            return None
        now = self._clock()
        troubled = any(known.get(server, 0.0) > now for known in (self._slow, self._plain))
        return None if troubled else server

    def _order(self, resolvers: Resolvers) -> Iterator[Resolver]:
        servers = list(resolvers.servers)
        if resolvers.rotate and servers:
            first = next(self._turn) % len(servers)
            servers = servers[first:] + servers[:first]
        now = self._clock()
        servers.sort(key=lambda server: self._slow.get(server, 0.0) > now)
        for _ in range(resolvers.attempts):
            yield from servers

    def _remember(self, where: dict[Resolver, float], server: Resolver, seconds: float) -> None:
        if len(where) >= _REMEMBERED:
            where.clear()
        where[server] = self._clock() + seconds

    async def _ask(self, server: Resolver, query: Query, resolvers: Resolvers, tcp: bool) -> Heard:
        tcp_only, patience = resolvers.use_tcp, resolvers.timeout
        edns = self._plain.get(server, 0.0) <= self._clock()
        heard = await self._once(server, query, edns, tcp_only)
        if edns and heard.answer.rcode in _NO_EDNS:
            self._remember(self._plain, server, _PLAIN_SECONDS)
            edns = False
            heard = await self._once(server, query, edns, tcp_only)
        if not tcp or not heard.answer.flags & TC:
            return heard
        try:
            async with asyncio.timeout(patience / 2):
                return await self._once(server, query, edns, True)
        except (OSError, EOFError, Malformed, TimeoutError):
            if not edns or tcp_only:
                raise
        # Some name servers have no TCP, against RFC 7766. A larger datagram may hold the whole answer.
        whole = await self._once(server, query, edns, False, _LARGEST_UDP)
        if whole.answer.flags & TC:
            raise Malformed("truncated, and no TCP")
        return whole

    async def _once(
        self, server: Resolver, query: Query, edns: bool, tcp: bool, largest: int = UDP_LARGEST
    ) -> Heard:
        message = make_query(query, edns, largest)
        return await (_ask_tcp if tcp else _ask_udp)(server, message, query)


def make_query(query: Query, edns: bool, largest: int = UDP_LARGEST) -> bytes:
    """The question as it is asked of others: nothing of the guest's message but what has a meaning to them.

    EDNS is between neighbours (RFC 6891 section 6.1.1), so the guest's own options stay here.
    """
    flags = query.flags & (RD | CD) | AD
    head = HEADER.pack(int.from_bytes(os.urandom(2), "big"), flags, 1, 0, 0, 1 if edns else 0)
    if not edns:
        return head + query.question
    opt = struct.pack("!BHHIH", 0, Type.OPT, largest, DO if query.wants_dnssec else 0, 0)
    return head + query.question + opt


def accept(data: bytes, message: bytes, query: Query) -> Heard | None:
    """The response, when it is one to the message."""
    if len(data) < HEADER.size or data[:2] != message[:2]:
        return None
    _, flags, questions, *_ = HEADER.unpack_from(data)
    if not flags & QR or flags & 0x7800:
        return None
    if questions == 0 and flags & 15 in TRY_NEXT:
        # A server that did not understand the message sends no question back.
        return Heard(data, Answer(0, flags & ~TC, query.question, 0, 0, 0, (), None))
    try:
        answer = read_answer(data)
    except Malformed:
        return None
    asked, said = query.question, answer.question
    if said[-4:] != asked[-4:] or said[:-4].lower() != asked[:-4].lower():
        return None
    return Heard(data, answer)


class _Once(asyncio.DatagramProtocol):
    """Waits for one answer."""

    def __init__(self, message: bytes, query: Query, heard: asyncio.Future[Heard]) -> None:
        self._message, self._query, self._heard = message, query, heard
        self._wrong = 0

    def datagram_received(self, data: bytes, addr: object) -> None:
        if self._heard.done():
            return
        found = accept(data, self._message, self._query)
        if found is not None:
            self._heard.set_result(found)
            return
        self._wrong += 1
        if self._wrong >= _WRONG_ANSWERS:
            self._heard.set_exception(Malformed("too many answers to other questions"))

    def error_received(self, exc: Exception) -> None:
        if not self._heard.done():
            self._heard.set_exception(exc)


async def _ask_udp(server: Resolver, message: bytes, query: Query) -> Heard:
    loop = asyncio.get_running_loop()
    heard: asyncio.Future[Heard] = loop.create_future()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Once(message, query, heard), remote_addr=(server.host, server.port)
    )
    try:
        transport.sendto(message)
        return await heard
    finally:
        heard.cancel()
        transport.abort()


async def _ask_tcp(server: Resolver, message: bytes, query: Query) -> Heard:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(struct.pack("!H", len(message)) + message)
        length = int.from_bytes(await reader.readexactly(2), "big")
        found = accept(await reader.readexactly(length), message, query)
        if found is None or found.answer.flags & TC:
            raise Malformed("not an answer to the question")
        return found
    finally:
        writer.transport.abort()
