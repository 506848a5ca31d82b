"""Whatever a guest sends, there is an answer or none, and what answers can be read by dnspython."""

from __future__ import annotations

import itertools
import struct

import dns.exception
import dns.message
from guestnet.services.dns.resolvers import parse_resolv_conf
from hypothesis import given, settings
from hypothesis import strategies as st

from .dns_played import PATIENCE, Served, server

NUMBERS = itertools.count()
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


@given(st.lists(ANYTHING, min_size=1, max_size=6))
def ask(served: Served, data: list[bytes]) -> None:
    guest = served.client("vm1")
    port = guest._port()
    guest._datagrams[port] = []
    for one in data:
        guest.send_udp("192.168.64.1", 53, port, one)
    # The last is answered after all others: no name server is asked, and the authority answers in order.
    last = dns.message.make_query(f"n{next(NUMBERS)}.guestnet.internal", "A", use_edns=-1).to_wire()
    guest.send_udp("192.168.64.1", 53, port, last)
    with guest._changed:
        done = guest._changed.wait_for(
            lambda: any(last[12:] in answer for answer in guest._datagrams[port]), PATIENCE
        )
    assert done
    answers = guest._datagrams.pop(port)
    assert len(answers) <= len(data) + 1
    for answer in answers:
        assert len(answer) <= 1232
        assert answer[2] & 0x80
        (asked, *_) = [one for one in (*data, last) if one[:2] == answer[:2]]
        try:
            dns.message.from_wire(asked)
        except (dns.exception.DNSException, ValueError):
            continue
        dns.message.from_wire(answer)


def test_queries() -> None:
    made = server(records=RECORDS, limits={"service_datagrams_per_second": 1_000_000})
    settings(max_examples=300, deadline=None)(ask)(made)
    assert made.count("dns_unanswered") > 0


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(st.text(max_size=20)).map("\nnameserver ".join)))
def test_resolv_conf(text: str) -> None:
    assert len(parse_resolv_conf(text).servers) <= 6
