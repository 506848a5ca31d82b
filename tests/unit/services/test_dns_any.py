"""Whatever comes, from a guest or from a name server, there is an answer or none, and never an exception."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import dns.exception
import dns.message
from guestnet.services.dns import records
from guestnet.services.dns.cache import aged, lifetime
from guestnet.services.dns.resolvers import parse_resolv_conf
from guestnet.services.dns.upstream import Heard, accept, make_query
from guestnet.services.dns.wire import Malformed, Query, read_answer, read_query
from hypothesis import given, settings
from hypothesis import strategies as st

from .dns_played import server

records.know_types()  # these tests read what they made up with dnspython
WORDS = b"vm1 VM1 guestnet internal wild example in-addr arpa 64 168 192 2 * loop localhost a.b 999 -"
LABELS = st.sampled_from([*WORDS.split(), b"\0", b"\xff" * 63])
RECORDS = {
    "*.wild.example": ("192.0.2.9",),
    "loop.example": ("CNAME:loop.loop.example",),
    "*.loop.example": ("CNAME:loop.example",),
    "away.example": ("CNAME:www.example.org",),
}


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Something like a DNS message."""
    head = draw(
        st.tuples(
            st.integers(0, 0xFFFF),
            st.one_of(st.sampled_from([0x0100, 0x8180, 0]), st.integers(0, 0xFFFF)),
            st.sampled_from([1, 1, 1, 0, 2, 0xFFFF]),
            st.sampled_from([0, 0, 1, 5, 0xFFFF]),
            st.sampled_from([0, 0, 1]),
            st.sampled_from([0, 1, 1, 2]),
        )
    )
    labels = draw(st.lists(LABELS, max_size=9))
    name = b"".join(bytes((len(label),)) + label for label in labels)
    end = draw(st.sampled_from([b"\0", b"\0", b"\0", b"\xc0\x0c", b"\x40", b""]))
    kind = draw(st.one_of(st.sampled_from([1, 28, 12, 255, 5, 6, 41, 16, 251]), st.integers(0, 0xFFFF)))
    question = name + end + struct.pack("!HH", kind, draw(st.sampled_from([1, 1, 1, 3, 255])))
    rest = b""
    for _ in range(draw(st.integers(0, 3))):
        owner = draw(st.sampled_from([b"\0", b"\xc0\x0c", b"\xc0\xff", b"\x03www\0", b"\xc0"]))
        data = draw(st.binary(max_size=24))
        length = draw(st.sampled_from([len(data), len(data), 0xFFFF]))
        type_ = draw(st.sampled_from([41, 1, 6, 5, 16]))
        rest += owner + struct.pack("!HHIH", type_, 1, draw(st.integers(0, 0xFFFFFFFF)), length) + data
    return struct.pack("!6H", *head) + question + rest


ANYTHING = st.one_of(st.binary(max_size=600), messages())


@settings(max_examples=300, deadline=None)
@given(st.lists(ANYTHING, min_size=1, max_size=6), st.booleans())
def test_queries(data: list[bytes], tcp: bool) -> None:
    made = server(records=RECORDS)

    async def ask() -> None:
        for one in data:
            answer = await made.handle(one, tcp=tcp, endpoint_id="vm1")
            if answer is None:
                continue
            assert answer[:2] == one[:2]
            assert answer[2] & 0x80
            assert tcp or len(answer) <= 1232
            try:
                dns.message.from_wire(one)
            except (dns.exception.DNSException, ValueError):
                continue
            dns.message.from_wire(answer)

    asyncio.run(ask())
    assert made.counters["servfail"] == 0 or made.counters["unanswered"] or made.counters["own"]


@settings(max_examples=400, deadline=None)
@given(ANYTHING)
def test_answers(data: bytes) -> None:
    query = Query(7, 0x0100, b"\3www\7example\0", 1, 1, None)
    message = make_query(query, True)
    for one in (data, message[:2] + data[2:], message[:2] + b"\x81\x80" + message[4:12] + data):
        found = accept(one, message, query)
        if isinstance(found, Heard):
            assert 0 <= lifetime(one, found.answer) <= 86400
            for age in (0, 1, 0xFFFFFFFF):
                assert len(aged(one, found.answer, age)) <= len(one)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=12, max_size=400))
def test_reading(data: bytes) -> None:
    for read in (read_query, read_answer):
        with contextlib.suppress(Malformed):
            read(data)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(st.text(max_size=20)).map("\nnameserver ".join)))
def test_resolv_conf(text: str) -> None:
    assert len(parse_resolv_conf(text).servers) <= 6
