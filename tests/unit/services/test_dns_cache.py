"""The cache: what is kept, for how long, and how much of it."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from guestnet.services.dns import cache as cache_module
from guestnet.services.dns import server as server_module
from guestnet.services.dns.cache import Cache
from guestnet.services.dns.wire import read_answer

from .dns_played import Upstream, reply, resolve, server


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_ttls_go_down_and_end() -> None:
    clock = Clock()
    records = ("www.example.org. 300 CNAME real.example.org.", "real.example.org. 60 A 192.0.2.80")
    async with Upstream(lambda query, tcp: reply(query, *records)) as up:
        made = server(clock, resolvers=(up.address,))
        for wait, ttls in ((0, [300, 60]), (0, [300, 60]), (25.5, [275, 35]), (34.4, [241, 1])):
            clock.now += wait
            answer = await resolve(made, "www.example.org")
            assert [rrset.ttl for rrset in answer.answer] == ttls
        assert len(up.asked) == 1
        assert made.counters["cached"] == 3
        clock.now += 1
        assert [rrset.ttl for rrset in (await resolve(made, "www.example.org")).answer] == [300, 60]
        assert len(up.asked) == 2


async def test_what_is_too_long_for_the_asker_is_not_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand records take a millisecond, and a guest may ask a thousand times a second."""
    records = [f"big.example.org. 300 A 192.0.{n >> 8}.{n & 255}" for n in range(900)]

    def play(query: dns.message.Message, tcp: bool) -> bytes:
        return reply(query, *records) if tcp else reply(query, flags=dns.flags.TC)

    async with Upstream(play) as up:
        made = server(resolvers=(up.address,))
        whole = await resolve(made, "big.example.org", tcp=True)
        assert len(whole.answer[0]) == 900
        monkeypatch.delattr(server_module, "aged")
        for edns in (0, -1):
            cut = await resolve(made, "big.example.org", use_edns=edns)
            assert cut.flags & dns.flags.TC
            assert not cut.answer
        assert made.counters["cached"] == 2


async def test_the_case_of_the_asker_and_its_flags_are_its_own() -> None:
    async with Upstream(lambda query, tcp: reply(query, "www.example.org. 300 A 192.0.2.80")) as up:
        made = server(resolvers=(up.address,))
        await resolve(made, "www.example.org", use_edns=-1)
        again = await resolve(made, "WWW.Example.ORG", tcp=True, use_edns=-1)
        assert str(again.question[0].name) == "WWW.Example.ORG."
        assert len(up.asked) == 1
        await resolve(made, "www.example.org", want_dnssec=True)
        await resolve(made, "www.example.org", "AAAA")
        await resolve(made, "www.example.org", flags=dns.flags.RD | dns.flags.CD)
        assert len(up.asked) == 4
        await resolve(made, "www.example.org", flags=0)
        assert len(up.asked) == 5, "who does not want recursion gets what the server says now"


async def asked_twice(play: object) -> int:
    async with Upstream(play) as up:  # type: ignore[arg-type]
        made = server(resolvers=(up.address,))
        await resolve(made, "www.example.org")
        await resolve(made, "www.example.org")
        return len(up.asked)


async def test_what_is_not_kept() -> None:
    assert await asked_twice(lambda query, tcp: reply(query, "www.example.org. 0 A 192.0.2.80")) == 2
    assert await asked_twice(lambda query, tcp: reply(query)) == 2, "nothing, and no SOA that says how long"
    assert await asked_twice(lambda query, tcp: reply(query, flags=dns.flags.TC)) == 2
    failed = await asked_twice(lambda query, tcp: reply(query, rcode=dns.rcode.SERVFAIL))
    assert failed == 2
    # RFC 2181 section 8: the highest bit makes a TTL zero.
    high = 1 << 31

    def play(query: dns.message.Message, tcp: bool) -> bytes:
        data = bytearray(reply(query, "www.example.org. 300 A 192.0.2.80"))
        at = bytes(data).index((300).to_bytes(4, "big"))
        data[at : at + 4] = high.to_bytes(4, "big")
        return bytes(data)

    assert await asked_twice(play) == 2


async def test_what_is_not_there_is_kept_as_long_as_its_soa_says() -> None:
    clock = Clock()

    def play(query: dns.message.Message, tcp: bool) -> bytes:
        answer = dns.message.make_response(query)
        answer.set_rcode(dns.rcode.NXDOMAIN)
        soa = "ns.example.org. admin.example.org. 1 2 3 4 30"
        answer.authority.append(dns.rrset.from_text("example.org.", 3600, "IN", "SOA", soa))
        return answer.to_wire()

    async with Upstream(play) as up:
        made = server(clock, resolvers=(up.address,))
        await resolve(made, "no.example.org")
        clock.now += 29
        assert (await resolve(made, "no.example.org")).rcode() == dns.rcode.NXDOMAIN
        assert len(up.asked) == 1
        clock.now += 2
        await resolve(made, "no.example.org")
        assert len(up.asked) == 2


def test_it_is_bounded_in_number_and_bytes() -> None:
    cache = Cache()

    def put(name: str, *records: str, now: float = 0) -> None:
        query = dns.message.make_query(name, "TXT")
        data = reply(query, *records)
        cache.put((query.question[0].name.to_wire() or b"", 16, False, False), data, read_answer(data), now)

    for number in range(cache_module.ENTRIES + 50):
        put(f"n{number}.example", f"n{number}.example. 60 TXT x")
    assert len(cache) == cache_module.ENTRIES
    assert cache.get((b"\x02n0\x07example\0", 16, False, False), 1) is None, "the oldest went"
    last = f"n{cache_module.ENTRIES + 49}".encode()
    assert cache.get((bytes((len(last),)) + last + b"\x07example\0", 16, False, False), 1) is not None
    for number in range(400):
        name = f"big{number}.example"
        put(name, *(f"{name}. 60 TXT {part:03}{'x' * 200}" for part in range(60)))
    assert cache._bytes <= cache_module.BYTES
    assert cache._bytes == sum(len(entry.data) for entry in cache._entries.values())
    before = len(cache)
    put("huge.example", *(f"huge.example. 60 TXT {part:03}{'x' * 200}" for part in range(100)))
    assert len(cache) == before, "one answer may not push out many"
    cache.clear()
    assert (len(cache), cache._bytes) == (0, 0)
