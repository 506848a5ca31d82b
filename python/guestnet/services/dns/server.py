"""The DNS server: a query in, an answer out; never an exception, and never more work than is bounded."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from guestnet.services.dns.cache import Cache, Key, aged
from guestnet.services.dns.config import DnsConfig
from guestnet.services.dns.failures import TemporaryFailures
from guestnet.services.dns.records import OwnRecord, know_types
from guestnet.services.dns.resolvers import Resolvers, ResolverSource
from guestnet.services.dns.stream import StreamServer
from guestnet.services.dns.upstream import TRY_NEXT, Heard, Upstream
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
_EDE_NO_RESOLVER, _EDE_UNREACHABLE, _EDE_BUSY, _EDE_UNKNOWN = 0, 22, 0, 0
_EXPLANATION_LONGEST = 256
_ALWAYS = 8
"""Questions that each guest may ask of others at a time, however many are asked."""
_Flight = tuple[bytes, int, bool, bool, bool, bool]


@dataclass(frozen=True, slots=True)
class Reply:
    """What is said to a query, None: nothing. `keep`: a message that answers the same question again while
    its TTLs last; `own`: about the own names, and true whatever name servers there are."""

    answer: bytes | None
    keep: bytes | None = None
    own: bool = False


class DnsServer:
    """Answers the DNS queries of one network. `network.services.dns` is the server of a network.

    `counters` counts what became of the queries. `handle`, `serve_unix` and `close` belong to one event loop
    at a time; after `close` another loop may use them. Records may be added and removed from any thread.

    Example:
        >>> from guestnet import NatNetwork
        >>> dns = NatNetwork().services.dns
        >>> dns.add_record("later.example", "192.0.2.6")
        >>> dns.add_record("later.example", "TXT:some text")
        >>> dns.remove_record("later.example"), dns.remove_record("later.example")
        (True, False)
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
        self._failures = TemporaryFailures()
        self._asking: Counter[object] = Counter()
        self._asking_total = 0
        self._stream = StreamServer(self._answer, config.connections)
        self.counters: Counter[str] = Counter()
        self.changed: Callable[[], object] = lambda: None
        """Called, in any thread, when what was said before may not be true any more: other records, or other
        name servers."""

    def add_record(self, name: str, value: str) -> None:
        """Adds a record. It takes effect at once.

        Args:
            name: The name; `*.example` stands for all names below `example`.
            value: An address, or `TYPE:value`.

        Raises:
            ConfigError: The name or the value is wrong.
        """
        self._zones.add(name, value)
        self.changed()

    def remove_record(self, name: str) -> bool:
        """Removes the records of a name, whether they were added or configured.

        Args:
            name: The name.

        Returns:
            Whether there were any.
        """
        removed = self._zones.remove(name)
        if removed:
            self.changed()
        return removed

    def records(self) -> dict[str, tuple[str, ...]]:
        """The records that were configured or added, and not removed.

        Returns:
            The values of each name, as they were given.
        """
        return self._zones.texts()

    def owns(self, name: str) -> bool:
        """Whether a bare name, or that name in the zone, stands for a record of the network's owner."""
        return self._zones.owns(name)

    def own_names(self) -> list[bytes]:
        """Names that, with all below them and all of one label, are answered here or may be."""
        return self._zones.apexes()

    def server(self) -> tuple[IPv4Address | IPv6Address, int] | None:
        """The name server to ask for other names, where one datagram is all that it takes."""
        found = self._upstream.first(self._look())
        if found is None or "%" in found.host:
            return None
        return ip_address(found.host), found.port

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
        return (await self.reply(query, tcp=tcp, endpoint_id=endpoint_id)).answer

    async def _answer(self, data: bytes, tcp: bool, asker: object) -> bytes | None:
        return (self._known(data, tcp) or await self._found(data, tcp, asker)).answer

    def known(self, query: bytes) -> Reply | None:
        """The reply to a datagram, where it is known without asking anybody; else None, and `reply` is to be
        awaited."""
        return self._known(query, False)

    async def reply(self, query: bytes, *, tcp: bool, endpoint_id: str | None) -> Reply:
        """As `handle`, with what may be kept."""
        return self._known(query, tcp) or await self._found(query, tcp, endpoint_id)

    async def wait(self, query: bytes, endpoint_id: str | None) -> Reply:
        """The reply to a datagram for which `known` had none."""
        return await self._found(query, False, endpoint_id)

    def _known(self, data: bytes, tcp: bool) -> Reply | None:
        if len(data) < HEADER.size:
            self.counters["too_short"] += 1
            return _NOTHING
        flags = HEADER.unpack_from(data)[1]
        if flags & QR:
            # An answer to an answer could go on for ever.
            self.counters["not_a_query"] += 1
            return _NOTHING
        if opcode(flags):
            return self._refused(data, Rcode.NOTIMP, tcp)
        try:
            query = read_query(data)
        except Malformed:
            return self._refused(data, Rcode.FORMERR, tcp)
        try:
            reply = self._known_query(query, tcp)
        except Exception:
            reply = self._defect(query, tcp)
        if reply is not None:
            self._count(reply, tcp)
        return reply

    async def _found(self, data: bytes, tcp: bool, asker: object) -> Reply:
        query = read_query(data)
        try:
            reply = await self._query(query, tcp, asker)
        except Exception:
            reply = self._defect(query, tcp)
        self._count(reply, tcp)
        return reply

    def _defect(self, query: Query, tcp: bool) -> Reply:
        # A defect here must not take names from a guest for longer than one question.
        _log.exception("a DNS query failed")
        return Reply(respond(query, Rcode.SERVFAIL, tcp=tcp))

    def _refused(self, data: bytes, rcode: Rcode, tcp: bool) -> Reply:
        self.counters["tcp" if tcp else "udp"] += 1
        self.counters[rcode.name.lower()] += 1
        return Reply(refuse(data, rcode))

    def _count(self, reply: Reply, tcp: bool) -> None:
        self.counters["tcp" if tcp else "udp"] += 1
        if reply.answer is None:
            return
        flags = HEADER.unpack_from(reply.answer)[1]
        try:
            self.counters[Rcode(flags & 15).name.lower()] += 1
        except ValueError:
            self.counters["other_rcode"] += 1
        if flags & TC:
            self.counters["truncated"] += 1

    def _known_query(self, query: Query, tcp: bool) -> Reply | None:
        if query.edns is not None and query.edns.version != 0:
            return Reply(respond(query, Rcode.BADVERS, tcp=tcp))
        if query.type in (0, Type.OPT):
            return Reply(respond(query, Rcode.FORMERR, tcp=tcp))
        if query.rclass != IN or _META_FIRST <= query.type <= _META_LAST:
            # Other classes hold data about servers; transfers and transactions are not for guests.
            return Reply(respond(query, Rcode.REFUSED, tcp=tcp))
        chain, found, _ = self._own(query)
        if found is not None and self._zones.searched(query.key, found) is None:
            self.counters["own"] += 1
            answer = self._answer_own(query, chain, found, tcp)
            return Reply(answer, answer, own=True)
        if chain or found is not None:
            # The rest of the chain is asked of others. NXDOMAIN for a name of the search list depends on
            # whether the name before the search domain fails, which may change at any time.
            return None
        known = self._remembered(query, tcp)
        return None if known is None else Reply(known)

    async def _query(self, query: Query, tcp: bool, asker: object) -> Reply:
        chain, found, name = self._own(query)
        if found is not None:
            self.counters["own"] += 1
            searched = self._zones.searched(query.key, found)
            if searched is not None and self._fails(searched, asker):
                why = explanation(_EDE_UNKNOWN, "the name without the search domain cannot be resolved now")
                return Reply(respond(query, Rcode.SERVFAIL, tcp=tcp, options=why))
            return Reply(self._answer_own(query, chain, found, tcp))
        if not chain:
            return await self._ask_others(query, tcp, asker)
        return Reply(await self._continue_elsewhere(query, chain, name, tcp, asker))

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

    def _fails(self, name: bytes, asker: object) -> bool:
        """Whether others were asked for a name without a result: they do not answer, or did not yet."""
        if not self._look().servers or self._failures.has(name, asker, self._clock()):
            return True
        return any(key[0] == name for key in self._flights)

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
        known = self._remembered(target, True)
        if known is None:
            known = (await self._ask_others(target, True, asker)).answer
        data = known or b""
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

    def _look(self) -> Resolvers:
        """The name servers. Others may know other things: a VPN came or went."""
        resolvers = self._source.current()
        if resolvers is not self._resolvers:
            self._resolvers = resolvers
            self._cache.clear()
            self._failures.clear()
            self.changed()
        return resolvers

    def _remembered(self, query: Query, tcp: bool) -> bytes | None:
        """The answer that others have given already, or that nobody can give."""
        if not self._look().servers:
            return self._failed(query, tcp, _EDE_NO_RESOLVER, "no name server is configured on the host")
        if not query.flags & RD:
            return None
        now = self._clock()
        cached = self._cache.get(_key(query), now)
        if cached is None:
            return None
        self.counters["cached"] += 1
        return _passed(query, Heard(cached.data, cached.answer), tcp, int(now - cached.heard))

    async def _ask_others(self, query: Query, tcp: bool, asker: object) -> Reply:
        most = self._config.questions_per_endpoint
        if self._asking_total >= self._config.questions:
            # Those who ask much have taken all there is; who asks little is not to suffer for it.
            most = min(most, _ALWAYS)
        if self._asking[asker] >= most:
            self.counters["busy"] += 1
            self._failures.add(query.key, asker, self._clock(), shared=False)
            busy = explanation(_EDE_BUSY, "too many questions at once")
            return Reply(respond(query, Rcode.REFUSED, tcp=tcp, options=busy))
        heard = await self._asked_by(asker, self._fly((*_key(query), bool(query.flags & RD), tcp), query))
        if heard is None or heard.answer.rcode in TRY_NEXT:
            self._failures.add(query.key, asker, self._clock(), shared=True)
        else:
            self._failures.remove(query.key)
        if heard is None:
            return Reply(self._failed(query, tcp, _EDE_UNREACHABLE, "no name server of the host answers"))
        return Reply(_passed(query, heard, tcp, 0), heard.data)

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


_NOTHING = Reply(None)


def _key(query: Query) -> Key:
    return query.key, query.type, query.wants_dnssec, bool(query.flags & CD)


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
