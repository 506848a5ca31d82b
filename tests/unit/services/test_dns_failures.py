"""A temporary failure stays one for a resolver that goes on to its search list."""

from __future__ import annotations

import asyncio

import dns.message
import dns.rcode
import pytest

from .dns_played import Upstream, reply, resolve, server, texts

NAME = "www.example.org"
SEARCHED = f"{NAME}.guestnet.internal"


def failing(rcode: int) -> Upstream:
    return Upstream(lambda query, tcp: reply(query, rcode=rcode))


@pytest.mark.parametrize("rcode", [dns.rcode.SERVFAIL, dns.rcode.REFUSED, dns.rcode.NOTIMP])
async def test_the_search_domain_does_not_make_an_upstream_failure_permanent(rcode: int) -> None:
    async with failing(rcode) as up:
        made = server(resolvers=(up.address,))
        assert (await resolve(made, NAME)).rcode() == rcode
        answer = await resolve(made, SEARCHED, use_edns=0)
        assert answer.rcode() == dns.rcode.SERVFAIL
        assert "search domain" in answer.extended_errors()[0].text
        assert (await resolve(made, SEARCHED, "AAAA", tcp=True)).rcode() == dns.rcode.SERVFAIL


async def test_a_name_that_does_not_exist_stays_nxdomain_with_the_search_domain() -> None:
    async with failing(dns.rcode.NXDOMAIN) as up:
        made = server(resolvers=(up.address,))
        assert (await resolve(made, NAME)).rcode() == dns.rcode.NXDOMAIN
        answer = await resolve(made, SEARCHED)
        assert answer.rcode() == dns.rcode.NXDOMAIN
        assert len(up.asked) == 1, "a name of the own zone is not asked of others"


async def test_a_name_that_nobody_asked_for_is_nxdomain_with_the_search_domain() -> None:
    async with failing(dns.rcode.SERVFAIL) as up:
        made = server(resolvers=(up.address,))
        assert (await resolve(made, SEARCHED)).rcode() == dns.rcode.NXDOMAIN
        assert up.asked == []


async def test_without_a_name_server_the_search_domain_fails_too() -> None:
    made = server()
    assert (await resolve(made, NAME)).rcode() == dns.rcode.SERVFAIL
    assert (await resolve(made, SEARCHED)).rcode() == dns.rcode.SERVFAIL


async def test_a_question_under_way_is_no_answer() -> None:
    """A resolver that gives up before the name server does goes on to its search list."""
    asked = asyncio.Event()

    def silent(query: dns.message.Message, tcp: bool) -> None:
        asked.set()

    async with Upstream(silent) as up:
        made = server(resolvers=(up.address,))
        await made.send(NAME, "first")
        await asked.wait()
        assert (await resolve(made, SEARCHED)).rcode() == dns.rcode.SERVFAIL


async def test_own_names_are_answered_whatever_fails() -> None:
    async with failing(dns.rcode.SERVFAIL) as up:
        made = server(resolvers=(up.address,), records={"a.b.guestnet.internal": ("192.0.2.7",)})
        await resolve(made, "a.b")
        assert texts(await resolve(made, "a.b.guestnet.internal")) == ["a.b.guestnet.internal. A 192.0.2.7"]
        assert (await resolve(made, "nobody.guestnet.internal")).rcode() == dns.rcode.NXDOMAIN
        assert texts(await resolve(made, "vm1.guestnet.internal")) == [
            "vm1.guestnet.internal. A 192.168.64.2"
        ]


async def test_a_failure_is_forgotten_with_an_answer() -> None:
    rcode = dns.rcode.SERVFAIL
    async with Upstream(lambda query, tcp: reply(query, rcode=rcode)) as up:
        made = server(resolvers=(up.address,))
        await resolve(made, NAME)
        assert (await resolve(made, SEARCHED)).rcode() == dns.rcode.SERVFAIL
        rcode = dns.rcode.NXDOMAIN
        await resolve(made, NAME, "AAAA")
        assert (await resolve(made, SEARCHED)).rcode() == dns.rcode.NXDOMAIN


async def test_a_guest_over_its_share_takes_its_own_refusal_for_temporary_alone() -> None:
    def silent(query: dns.message.Message, tcp: bool) -> None:
        pass

    async with Upstream(silent) as up:
        made = server(resolvers=(up.address,), limits={"dns_queries_per_port": 1})
        # What is cached counts for no share.
        assert (await resolve(made, SEARCHED, endpoint="greedy")).rcode() == dns.rcode.NXDOMAIN
        await made.send("slow.example.org", "greedy")
        assert (await resolve(made, NAME, endpoint="greedy")).rcode() == dns.rcode.REFUSED
        assert (await resolve(made, SEARCHED, endpoint="greedy")).rcode() == dns.rcode.SERVFAIL
        assert (await resolve(made, SEARCHED, endpoint="other")).rcode() == dns.rcode.NXDOMAIN
        assert made.count("dns_refused") == 1
