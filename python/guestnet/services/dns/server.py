"""The DNS server: a query in, an answer out; never an exception, and never more work than is bounded."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections import Counter
from collections.abc import Callable

from guestnet.services.dns.cache import Cache, aged
from guestnet.services.dns.config import DnsConfig
from guestnet.services.dns.records import OwnRecord, know_types
from guestnet.services.dns.resolvers import ResolverSource
from guestnet.services.dns.stream import StreamServer
from guestnet.services.dns.upstream import Heard, Upstream
from guestnet.services.dns.wire import (
    AA,
    AD,
    CD,
    HEADER,
    IN,
    QR,
    RA,
    RD,
    TC,
    Malformed,
    Query,
    Rcode,
    Type,
    body_end,
    explanation,
    opcode,
    opt,
    read_query,
    record,
    refuse,
    respond,
)
from guestnet.services.dns.zones import GUEST_TTL, Found, Zones

_log = logging.getLogger("guestnet")

_LONGEST_CHAIN = 8
"""CNAMEs in a row."""
_TRANSFERS = (251, 252)
_META_FIRST, _META_LAST = 128, 254
"""Types that are no data (RFC 6895 section 3.1), with the transfers among them."""
_EDE = 15
_EDE_NO_RESOLVER, _EDE_UNREACHABLE, _EDE_BUSY = 0, 22, 0
_EXPLANATION_LONGEST = 256
_ALWAYS = 8
"""Questions that each guest may ask of others at a time, however many are asked."""
_Flight = tuple[bytes, int, bool, bool, bool, bool]


class DnsServer:
    """Answers the guests of one network. `counters` names what became of their queries.

    `handle`, `serve_unix` and `close` belong to one event loop at a time; after `close` to another one if
    need be. Records may be added and removed from any thread.
    """

    def __init__(self, config: DnsConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._zones = Zones(config)
        self._source = ResolverSource(config.resolvers, config.resolv_conf)
        self._resolvers = self._source.current()
        self._upstream = Upstream(clock)
        self._cache = Cache()
        self._flights: dict[_Flight, asyncio.Task[Heard | None]] = {}
        self._asking: Counter[object] = Counter()
        self._asking_total = 0
        self._stream = StreamServer(self._answer, config.connections)
        self.counters: Counter[str] = Counter()

    def add_record(self, name: str, value: str) -> None:
        """Adds `name` with an address or `TYPE:value`. Raises ConfigError."""
        self._zones.add(name, value)

    def remove_record(self, name: str) -> bool:
        """Removes the records of a name that were added or configured. False when there were none."""
        return self._zones.remove(name)

    async def serve_unix(self, path: str) -> None:
        """Serves DNS over TCP (RFC 7766) on a unix socket, from when this returns until `close`."""
        await self._stream.open(path)

    async def close(self) -> None:
        """Ends all connections and questions."""
        await self._stream.close()
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        self._flights.clear()

    async def handle(self, query: bytes, *, tcp: bool, endpoint_id: str | None) -> bytes | None:
        """The answer to one message of a guest; None: it deserves none."""
        return await self._answer(query, tcp, endpoint_id)

    async def _answer(self, data: bytes, tcp: bool, asker: object) -> bytes | None:
        if len(data) < HEADER.size:
            self.counters["too_short"] += 1
            return None
        flags = HEADER.unpack_from(data)[1]
        if flags & QR:
            # An answer to an answer could go on for ever.
            self.counters["not_a_query"] += 1
            return None
        self.counters["tcp" if tcp else "udp"] += 1
        if opcode(flags):
            return self._refused(data, Rcode.NOTIMP)
        try:
            query = read_query(data)
        except Malformed:
            return self._refused(data, Rcode.FORMERR)
        try:
            answer = await self._query(query, tcp, asker)
        except Exception:
            # A defect here must not take names from a guest for longer than one question.
            _log.exception("a DNS query failed")
            answer = respond(query, Rcode.SERVFAIL, tcp=tcp)
        self._count(answer)
        return answer

    def _refused(self, data: bytes, rcode: Rcode) -> bytes | None:
        self.counters[rcode.name.lower()] += 1
        return refuse(data, rcode)

    def _count(self, answer: bytes) -> None:
        flags = HEADER.unpack_from(answer)[1]
        try:
            self.counters[Rcode(flags & 15).name.lower()] += 1
        except ValueError:
            self.counters["other_rcode"] += 1
        if flags & TC:
            self.counters["truncated"] += 1

    async def _query(self, query: Query, tcp: bool, asker: object) -> bytes:
        if query.edns is not None and query.edns.version != 0:
            return respond(query, Rcode.BADVERS, tcp=tcp)
        if query.type in (0, Type.OPT):
            return respond(query, Rcode.FORMERR, tcp=tcp)
        if query.rclass != IN or _META_FIRST <= query.type <= _META_LAST:
            # Other classes hold data about servers; transfers and transactions are not for guests.
            return respond(query, Rcode.REFUSED, tcp=tcp)
        chain, found, name = self._own(query)
        if found is not None:
            self.counters["own"] += 1
            return self._answer_own(query, chain, found, tcp)
        if not chain:
            return await self._forward(query, tcp, asker)
        return await self._continue_elsewhere(query, chain, name, tcp, asker)

    # --- own names ---

    def _own(self, query: Query) -> tuple[list[tuple[OwnRecord, int]], Found | None, bytes]:
        """Follows own CNAMEs: the records found, the last verdict (None: not ours), and the last name."""
        chain: list[tuple[OwnRecord, int]] = []
        name, followed = query.key, 0
        while (found := self._zones.find(name, query.type)) is not None:
            chain.extend((own, found.ttl) for own in found.records)
            alias = found.records[0] if found.records else None
            if alias is None or alias.type != Type.CNAME or query.type == Type.CNAME:
                return chain, found, name
            name, followed = alias.rdata.lower(), followed + 1
            if followed > _LONGEST_CHAIN:
                return [], Found(found.apex, rcode=Rcode.SERVFAIL), name
        return chain, None, name

    def _answer_own(self, query: Query, chain: list[tuple[OwnRecord, int]], found: Found, tcp: bool) -> bytes:
        if found.rcode == Rcode.SERVFAIL:
            return respond(query, Rcode.SERVFAIL, tcp=tcp)
        authority = []
        if not found.records:
            # RFC 2308 section 3: the SOA says for how long there is nothing.
            soa = found.soa(self._zones.gateway)
            authority.append(record(found.apex, Type.SOA, GUEST_TTL, soa))
        return respond(query, found.rcode, (_records(query, chain), authority, []), flags=AA, tcp=tcp)

    async def _continue_elsewhere(
        self, query: Query, chain: list[tuple[OwnRecord, int]], name: bytes, tcp: bool, asker: object
    ) -> bytes:
        """An own CNAME points at somebody else's name: their records are put behind it."""
        import dns.exception
        import dns.message
        import dns.rdataclass

        target = Query(query.id, query.flags, name, query.type, query.rclass, query.edns)
        # Over TCP, or half of the records could be missing without anyone noticing.
        data = await self._forward(target, True, asker)
        know_types()
        try:
            heard = dns.message.from_wire(data, ignore_trailing=True)
            answer, authority = (
                [
                    record(rrset.name.to_wire() or b"", rrset.rdtype, rrset.ttl, rdata.to_wire() or b"")
                    for rrset in section
                    if rrset.rdclass == dns.rdataclass.IN
                    for rdata in rrset
                ]
                for section in (heard.answer, heard.authority)
            )
        except dns.exception.DNSException:
            return respond(query, Rcode.SERVFAIL, tcp=tcp)
        rcode = heard.rcode()
        return respond(query, rcode, (_records(query, chain) + answer, authority, []), tcp=tcp)

    # --- names of others ---

    async def _forward(self, query: Query, tcp: bool, asker: object) -> bytes:
        resolvers = self._source.current()
        if resolvers is not self._resolvers:
            # Other servers may know other things: a VPN came or went.
            self._resolvers = resolvers
            self._cache.clear()
        if not resolvers.servers:
            return self._failed(query, tcp, _EDE_NO_RESOLVER, "no name server is configured on the host")
        key = (query.key, query.type, query.wants_dnssec, bool(query.flags & CD))
        recursive = bool(query.flags & RD)
        cached = self._cache.get(key, self._clock()) if recursive else None
        if cached is not None:
            self.counters["cached"] += 1
            age = int(self._clock() - cached.heard)
            return _passed(query, Heard(cached.data, cached.answer), tcp, age)
        most = self._config.questions_per_endpoint
        if self._asking_total >= self._config.questions:
            # Those who ask much have taken all there is; who asks little is not to suffer for it.
            most = min(most, _ALWAYS)
        if self._asking[asker] >= most:
            self.counters["busy"] += 1
            busy = explanation(_EDE_BUSY, "too many questions at once")
            return respond(query, Rcode.REFUSED, tcp=tcp, options=busy)
        heard = await self._asked_by(asker, self._fly((*key, recursive, tcp), query))
        if heard is None:
            return self._failed(query, tcp, _EDE_UNREACHABLE, "no name server of the host answers")
        return _passed(query, heard, tcp, 0)

    def _failed(self, query: Query, tcp: bool, code: int, why: str) -> bytes:
        self.counters["unanswered"] += 1
        return respond(query, Rcode.SERVFAIL, tcp=tcp, options=explanation(code, why))

    async def _asked_by(self, asker: object, flight: asyncio.Task[Heard | None]) -> Heard | None:
        """The answer. The question counts as the asker's until it is answered, also when the asker has gone:
        or who leaves again and again could have any number asked."""
        self._asking[asker] += 1
        self._asking_total += 1

        def landed(_: object) -> None:
            self._asking_total -= 1
            self._asking[asker] -= 1
            if not self._asking[asker]:
                del self._asking[asker]

        flight.add_done_callback(landed)
        # A guest that goes away must not take the answer from others.
        return await asyncio.shield(flight)

    def _fly(self, key: _Flight, query: Query) -> asyncio.Task[Heard | None]:
        """Asks, or gives the task that is asking the same.

        So a question that comes back to us, through a name server that asks a guest, does not go round.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.get_running_loop().create_task(self._ask(key, query))
            self._flights[key] = flight
        return flight

    async def _ask(self, key: _Flight, query: Query) -> Heard | None:
        try:
            resolvers, tcp = self._resolvers, key[-1]
            self.counters["asked"] += 1
            heard = await self._upstream.ask(query, resolvers, tcp=tcp)
            if heard is not None and query.flags & RD and resolvers is self._resolvers:
                self._cache.put(key[:4], heard.data, heard.answer, self._clock())
            return heard
        finally:
            self._flights.pop(key, None)


def _records(query: Query, chain: list[tuple[OwnRecord, int]]) -> list[bytes]:
    """Records as bytes; the name that was asked for is a pointer to the question, in the asker's spelling."""
    return [
        record(b"\xc0\x0c" if own.name == query.key else own.name, own.type, ttl, own.rdata)
        for own, ttl in chain
    ]


def _passed(query: Query, heard: Heard, tcp: bool, age: int) -> bytes:
    """Somebody else's answer as the answer to this query: records as they are, the rest ours."""
    answer = heard.answer
    rcode = answer.rcode
    if rcode > 15 and query.edns is None:
        return respond(query, Rcode.SERVFAIL, tcp=tcp)
    flags = QR | RA | query.flags & (RD | CD) | answer.flags & (AA | TC) | rcode & 15
    if query.wants_dnssec or query.flags & AD:
        flags |= answer.flags & AD
    last = opt(query, rcode, _explanations(heard))
    if flags & TC or body_end(answer) + len(last) > query.largest(tcp):
        head = HEADER.pack(query.id, flags | TC, 1, 0, 0, 1 if last else 0)
        return head + query.question + last
    body = aged(heard.data, answer, age)
    counts = (answer.answers, answer.authorities, answer.additionals + (1 if last else 0))
    head = HEADER.pack(query.id, flags, 1, *counts)
    return head + query.question + body[len(head) + len(query.question) :] + last


def _explanations(heard: Heard) -> bytes:
    """The extended errors that the name server sent; other options are between it and us."""
    options = b"" if heard.answer.edns is None else heard.answer.edns.options
    kept, at = b"", 0
    while at + 4 <= len(options):
        code, length = struct.unpack_from("!HH", options, at)
        if code == _EDE and at + 4 + length <= len(options) and length <= _EXPLANATION_LONGEST and not kept:
            kept = options[at : at + 4 + length]
        at += 4 + length
    return kept
