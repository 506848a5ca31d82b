"""Names of others as guests get them: asked of name servers that the test plays on loopback."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from pathlib import Path

import dns.edns
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from guestnet.services.dns.resolvers import Resolver, Resolvers, parse_resolv_conf, parse_resolver

from .dns_played import Play, Upstream, authority, reply, resolve, server, texts

ADDRESS = "www.example.org. 300 A 192.0.2.80"


def silent(query: dns.message.Message, tcp: bool) -> None:
    """A server that says nothing."""


async def test_an_answer_comes_back_as_it_was_said() -> None:
    async with Upstream(lambda query, tcp: reply(query, ADDRESS, flags=dns.flags.AA)) as up:
        answer = await resolve(server(resolvers=(up.address,)), "www.example.org")
        assert texts(answer) == ["www.example.org. A 192.0.2.80"]
        assert answer.answer[0].ttl == 300
        assert answer.flags & dns.flags.AA
        assert up.ways == ["udp"]


@pytest.mark.parametrize(
    ("type_", "data"),
    [
        ("AAAA", "2001:db8::5"),
        ("MX", "10 mail.example.org."),
        ("TXT", '"a" "b"'),
        ("SRV", "1 2 3 target.example.org."),
        ("HTTPS", '1 . alpn="h2"'),
        ("NAPTR", '1 1 "u" "x" "y" .'),
        ("TYPE65500", r"\# 4 01020304"),
    ],
)
async def test_any_type_passes(type_: str, data: str) -> None:
    async with Upstream(lambda query, tcp: reply(query, f"www.example.org. 60 {type_} {data}")) as up:
        answer = await resolve(server(resolvers=(up.address,)), "www.example.org", type_)
        assert texts(answer) == [f"www.example.org. {type_} {data}"]


async def test_what_the_guest_said_besides_its_question_is_not_passed_on() -> None:
    async with Upstream(lambda query, tcp: reply(query, ADDRESS)) as up:
        made = server(resolvers=(up.address,))
        cookie = dns.edns.GenericOption(10, b"12345678")
        await resolve(made, "WWW.example.org", use_edns=0, payload=4096, options=[cookie], flags=0x0120)
        query, _ = up.asked[0]
        assert (query.edns, query.payload) == (0, 1232)
        assert query.options == ()
        assert str(query.question[0].name) == "WWW.example.org."


async def test_identifiers_are_not_the_guests_and_not_in_order() -> None:
    async with Upstream(lambda query, tcp: reply(query)) as up:
        made = server(resolvers=(up.address,))
        for number in range(20):
            await resolve(made, f"n{number}.example.org", id=7)
        ids = [query.id for query, _ in up.asked]
        assert len(set(ids)) > 15
        assert ids != sorted(ids)


async def test_nxdomain_and_its_soa_come_back() -> None:
    def play(query: dns.message.Message, tcp: bool) -> bytes:
        answer = dns.message.make_response(query)
        answer.set_rcode(dns.rcode.NXDOMAIN)
        soa = "ns.example.org. admin.example.org. 1 2 3 4 60"
        answer.authority.append(dns.rrset.from_text("example.org.", 60, "IN", "SOA", soa))
        return answer.to_wire()

    async with Upstream(play) as up:
        answer = await resolve(server(resolvers=(up.address,)), "no.example.org")
        assert answer.rcode() == dns.rcode.NXDOMAIN
        assert answer.authority[0][0].minimum == 60


BIG = [f"big.example.org. 60 TXT {number:03}{'x' * 90}" for number in range(40)]


def truncating(query: dns.message.Message, tcp: bool) -> bytes:
    return reply(query, *BIG) if tcp else reply(query, flags=dns.flags.TC)


async def test_a_guest_on_udp_is_told_to_come_over_tcp_and_gets_it_there() -> None:
    async with Upstream(truncating) as up:
        made = server(resolvers=(up.address,))
        cut = await resolve(made, "big.example.org", "TXT")
        assert cut.flags & dns.flags.TC
        assert cut.answer == []
        assert up.ways == ["udp"], "what does not fit is not fetched before it is wanted"
        whole = await resolve(made, "big.example.org", "TXT", tcp=True)
        assert len(texts(whole)) == 40
        assert not whole.flags & dns.flags.TC
        assert up.ways == ["udp", "udp", "tcp"]


def without_tcp(query: dns.message.Message, tcp: bool) -> bytes | None:
    """A name server behind a filter: what does not fit a datagram is not to be had."""
    if tcp:
        return None
    whole = reply(query, *BIG[:15])
    return (
        whole
        if len(whole) <= (query.payload if query.edns >= 0 else 512)
        else reply(query, flags=dns.flags.TC)
    )


async def test_a_name_server_that_truncates_and_has_no_tcp_is_asked_for_a_larger_datagram() -> None:
    async with Upstream(without_tcp) as up:
        made = server(resolvers=(up.address,)).hurry(timeout=1)
        assert (await resolve(made, "big.example.org", "TXT", use_edns=0, payload=4096)).flags & dns.flags.TC
        whole = await resolve(made, "big.example.org", "TXT", tcp=True)
        assert len(texts(whole)) == 15
        assert [query.payload for query, _ in up.asked] == [1232, 1232, 1232, 4096]
        assert up.ways == ["udp", "udp", "tcp", "udp"]


async def test_a_name_server_that_truncates_all_and_has_no_tcp_is_a_failure() -> None:
    async with Upstream(lambda query, tcp: None if tcp else reply(query, flags=dns.flags.TC)) as up:
        made = server(resolvers=(up.address,)).hurry(timeout=0.2)
        assert (await resolve(made, "big.example.org", "TXT", tcp=True)).rcode() == dns.rcode.SERVFAIL


async def test_an_answer_that_fits_the_server_and_not_the_guest() -> None:
    async with Upstream(lambda query, tcp: reply(query, *BIG[:8])) as up:
        made = server(resolvers=(up.address,))
        assert (await resolve(made, "big.example.org", "TXT", use_edns=-1)).flags & dns.flags.TC
        assert len(texts(await resolve(made, "big.example.org", "TXT", use_edns=0, payload=1232))) == 8
        assert len(texts(await resolve(made, "big.example.org", "TXT", tcp=True))) == 8


async def test_a_server_that_does_not_know_edns_is_asked_without() -> None:
    def play(query: dns.message.Message, tcp: bool) -> bytes:
        if query.edns >= 0:
            return query.id.to_bytes(2, "big") + b"\x80\x01" + bytes(8)
        return reply(query, ADDRESS)

    async with Upstream(play) as up:
        made = server(resolvers=(up.address,))
        assert texts(await resolve(made, "www.example.org")) == ["www.example.org. A 192.0.2.80"]
        assert [query.edns for query, _ in up.asked] == [0, -1]
        await resolve(made, "other.example.org")
        assert [query.edns for query, _ in up.asked] == [0, -1, -1], "remembered"


async def test_dnssec_is_asked_for_when_the_guest_wants_it() -> None:
    async with Upstream(lambda query, tcp: reply(query, ADDRESS, flags=dns.flags.AD)) as up:
        made = server(resolvers=(up.address,))
        wanted = await resolve(made, "www.example.org", want_dnssec=True)
        assert wanted.flags & dns.flags.AD
        assert up.asked[0][0].ednsflags & dns.flags.DO
        plain = await resolve(made, "www.example.org", use_edns=-1)
        assert not plain.flags & dns.flags.AD
        assert not up.asked[1][0].ednsflags & dns.flags.DO


async def test_wrong_answers_are_passed_over() -> None:
    """RFC 5452: another identifier, another question, no answer at all, rubbish; then the right one."""

    def play(query: dns.message.Message, tcp: bool) -> list[bytes]:
        right = reply(query, ADDRESS)
        lie = reply(query, "www.example.org. 300 A 203.0.113.66")
        other = dns.message.make_query("evil.example.org", "A")
        other.id = query.id
        return [
            bytes((lie[0] ^ 1, lie[1])) + lie[2:],
            reply(other, "evil.example.org. 300 A 203.0.113.66"),
            lie[:2] + bytes((lie[2] & 0x7F,)) + lie[3:],
            lie[:20],
            b"",
            b"\xff" * 40,
            right,
        ]

    async with Upstream(play) as up:
        answer = await resolve(server(resolvers=(up.address,)), "www.example.org")
        assert texts(answer) == ["www.example.org. A 192.0.2.80"]


async def test_who_guesses_too_long_is_not_listened_to() -> None:
    def play(query: dns.message.Message, tcp: bool) -> list[bytes]:
        return [b"\0\0" + bytes(20)] * 80 + [reply(query, ADDRESS)]

    async with Upstream(play) as up:
        made = server(resolvers=(up.address,)).hurry(timeout=30)
        assert (await resolve(made, "www.example.org")).rcode() == dns.rcode.SERVFAIL


async def test_a_silent_server_is_passed_over_and_then_asked_last() -> None:
    async with Upstream(silent) as mute, Upstream(lambda query, tcp: reply(query, ADDRESS)) as up:
        made = server(resolvers=(mute.address, up.address)).hurry()
        assert (await resolve(made, "www.example.org")).answer
        assert len(mute.asked) == 1
        assert (await resolve(made, "two.example.org")).rcode() == dns.rcode.NOERROR
        assert len(mute.asked) == 1


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED])
async def test_a_server_that_fails_is_passed_over(rcode: int) -> None:
    async with Upstream(lambda query, tcp: reply(query, rcode=rcode)) as bad:
        async with Upstream(lambda query, tcp: reply(query, ADDRESS)) as up:
            made = server(resolvers=(bad.address, up.address)).hurry(timeout=30)
            assert (await resolve(made, "www.example.org")).answer
        alone = server(resolvers=(bad.address,)).hurry(timeout=30)
        assert (await resolve(alone, "www.example.org")).rcode() == rcode


async def test_a_closed_port_is_passed_over_at_once() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    async with Upstream(lambda query, tcp: reply(query, ADDRESS)) as up:
        made = server(resolvers=(f"127.0.0.1:{port}", up.address)).hurry(timeout=60)
        assert (await resolve(made, "www.example.org")).answer


async def test_when_no_server_answers() -> None:
    async with Upstream(silent) as one, Upstream(silent) as two:
        made = server(resolvers=(one.address, two.address)).hurry(timeout=0.1, attempts=2)
        answer = await resolve(made, "www.example.org", use_edns=0)
        assert answer.rcode() == dns.rcode.SERVFAIL
        assert answer.extended_errors()[0].text == "no name server of the host answers"
        assert (len(one.asked), len(two.asked)) == (2, 2)
        assert made.count("dns_unanswered") == 1


async def test_tcp_that_is_cut_off_or_lies_is_no_answer() -> None:
    async with Upstream(lambda query, tcp: b"\xff" * 30 if tcp else reply(query, flags=dns.flags.TC)) as up:
        made = server(resolvers=(up.address,)).hurry()
        assert (await resolve(made, "www.example.org", tcp=True)).rcode() == dns.rcode.SERVFAIL


async def test_the_same_question_is_asked_once_at_a_time() -> None:
    async with Upstream(lambda query, tcp: reply(query, ADDRESS)) as up:
        made = server(resolvers=(up.address,))
        answers = await asyncio.gather(
            *(resolve(made, "www.example.org", endpoint=f"vm{n}") for n in range(30))
        )
        assert all(texts(answer) for answer in answers)
        assert len(up.asked) == 1


async def test_an_own_cname_to_a_name_of_others() -> None:
    def play(query: dns.message.Message, tcp: bool) -> bytes:
        return reply(
            query, "www.example.org. 60 CNAME real.example.org.", "real.example.org. 60 A 192.0.2.80"
        )

    async with Upstream(play) as up:
        made = server(resolvers=(up.address,), records={"my.example": ("CNAME:www.example.org",)})
        assert texts(await resolve(made, "my.example")) == [
            "my.example. CNAME www.example.org.",
            "www.example.org. CNAME real.example.org.",
            "real.example.org. A 192.0.2.80",
        ]


async def test_extended_errors_of_the_server_are_passed_on() -> None:
    def play(query: dns.message.Message, tcp: bool) -> bytes:
        answer = dns.message.make_response(query)
        answer.set_rcode(dns.rcode.SERVFAIL)
        answer.use_edns(0, options=[dns.edns.EDEOption(dns.edns.EDECode.DNSSEC_BOGUS, "bogus")])
        return answer.to_wire()

    async with Upstream(play) as up:
        answer = await resolve(server(resolvers=(up.address,)), "www.example.org", use_edns=0)
        assert answer.extended_errors()[0].text == "bogus"


async def test_resolv_conf_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    made = authority(resolvers=None, resolv_conf=str(path))
    for number in (1, 2):
        path.with_suffix(".new").write_text(f"nameserver 127.0.0.{number}\n")
        os.rename(path.with_suffix(".new"), path)
        assert [one.host for one in made.name_servers().servers] == [f"127.0.0.{number}"]
        assert made.name_servers() is made.name_servers()
    path.unlink()
    assert [one.host for one in made.name_servers().servers] == ["127.0.0.1"]


def test_servers_are_written_with_the_number_of_their_interface() -> None:
    texts = {
        host: Resolver(host, 5353).text()
        for host in ("192.0.2.53", "2001:db8::53", "fe80::1%lo", "fe80::1%7")
    }
    assert texts == {
        "192.0.2.53": "192.0.2.53:5353",
        "2001:db8::53": "[2001:db8::53]:5353",
        "fe80::1%lo": "[fe80::1%1]:5353",
        "fe80::1%7": "[fe80::1%7]:5353",
    }
    assert Resolver("fe80::1%none").text() is None


async def test_other_servers_may_know_other_things() -> None:
    async with (
        Upstream(lambda query, tcp: reply(query, ADDRESS)) as one,
        Upstream(lambda query, tcp: reply(query, "www.example.org. 9 A 10.0.0.1")) as two,
    ):
        made = server(resolvers=(one.address,))
        assert texts(await resolve(made, "www.example.org")) == ["www.example.org. A 192.0.2.80"]
        made.use(Resolvers((parse_resolver(two.address),)))
        assert texts(await resolve(made, "www.example.org")) == ["www.example.org. A 10.0.0.1"]


def test_resolv_conf_is_read_as_far_as_it_can_be() -> None:
    text = (
        "# a comment\n; another\n\nnameserver 192.0.2.53 trailing\nnameserver\nnameserver x.example\n"
        "nameserver 2001:db8::53\nnameserver fe80::1%eth0\nnameserver 192.0.2.53\nnameserver 256.0.0.0\n"
        "search a b\noptions timeout:7 attempts:9 rotate use-vc ndots:2\n\x00\xff garbage\n"
    )
    found = parse_resolv_conf(text)
    assert [one.host for one in found.servers] == ["192.0.2.53", "2001:db8::53", "fe80::1%eth0"]
    assert {one.port for one in found.servers} == {53}
    assert (found.timeout, found.attempts, found.rotate, found.use_tcp) == (7, 5, True, True)
    for text in ("", "search a\n", "nameserver x.example\n", "nameserver 0.0.0.0\n"):
        assert parse_resolv_conf(text) == Resolvers((Resolver("127.0.0.1"),)), "resolv.conf(5)"
    assert parse_resolv_conf("nameserver ::\n") == Resolvers((Resolver("::1"),))
    many = parse_resolv_conf("".join(f"nameserver 10.0.0.{n}\n" for n in range(1, 99)))
    assert len(many.servers) == 6
    for options in ("timeout:", "timeout:-1", "timeout:99999999999", "timeout:x", "attempts:0"):
        assert parse_resolv_conf(f"options {options}").timeout == 2.0


async def test_a_record_of_another_class_is_left_out_behind_an_own_cname() -> None:
    def play(query: dns.message.Message, tcp: bool) -> bytes:
        name = query.question[0].name.to_wire() or b""
        found = name + struct.pack("!HHIH", 1, 1, 60, 4) + bytes((192, 0, 2, 80))
        strange = name + struct.pack("!HHIH", 65, 255, 60, 4) + b"abcd"
        head = struct.pack("!6H", query.id, 0x8180, 1, 2, 0, 0)
        return head + name + struct.pack("!HH", 1, 1) + found + strange

    async with Upstream(play) as up:
        made = server(resolvers=(up.address,), records={"my.example": ("CNAME:www.example.org",)})
        answer = await resolve(made, "my.example")
        assert texts(answer) == ["my.example. CNAME www.example.org.", "www.example.org. A 192.0.2.80"]
        made.dns.add_record("web.example", "HTTPS:1 . alpn=h2")


async def test_what_is_not_cached() -> None:
    async def asked_twice(play: Play) -> int:
        async with Upstream(play) as up:
            made = server(resolvers=(up.address,))
            await resolve(made, "www.example.org")
            await resolve(made, "www.example.org")
            return len(up.asked)

    assert await asked_twice(lambda query, tcp: reply(query, ADDRESS)) == 1
    assert await asked_twice(lambda query, tcp: reply(query, "www.example.org. 0 A 192.0.2.80")) == 2
    assert await asked_twice(lambda query, tcp: reply(query)) == 2, "no record, and no SOA that says how long"
    assert await asked_twice(lambda query, tcp: reply(query, flags=dns.flags.TC)) == 2
    assert await asked_twice(lambda query, tcp: reply(query, rcode=dns.rcode.SERVFAIL)) == 2


async def test_a_question_is_cached_by_what_it_asks_for() -> None:
    async with Upstream(lambda query, tcp: reply(query, ADDRESS)) as up:
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


async def test_a_dead_name_server_is_logged_once_and_when_it_answers_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    talks = False

    def play(query: dns.message.Message, tcp: bool) -> bytes | None:
        return reply(query, ADDRESS) if talks else None

    async with Upstream(play) as up:
        made = server(resolvers=(up.address,)).hurry()
        with caplog.at_level(logging.INFO, "guestnet"):
            for n in range(3):
                await resolve(made, f"n{n}.example.org")
            talks = True
            for n in range(3):
                await resolve(made, f"m{n}.example.org")
            made.use(Resolvers((parse_resolver("127.0.0.1:1"),)))
            await resolve(made, "other.example.org")
        assert [record.getMessage() for record in caplog.records] == [
            "the name server 127.0.0.1 does not answer: no answer in time",
            "the name server 127.0.0.1 answers again",
            "the name server 127.0.0.1 does not answer: connection refused",
        ]
