"""The network's own names as guests get them, judged by dnspython."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, IPv6Network

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import pytest
from guestnet.errors import ConfigError

from .dns_played import Guests, authority, resolve, server, texts

RECORDS = {
    "web.example": ("192.0.2.1", "2001:db8::1", "192.0.2.2"),
    "typed.example": ("AAAA:2001:db8::7", "A:192.0.2.7"),
    "mail.example": ("MX:10 mx.example", "MX:20 mx2.example"),
    "_sip._tcp.example": ("SRV:10 5 5060 sip.example",),
    "text.example": ("TXT:v=spf1 -all", 'TXT:"two words" "more"'),
    "alias.example": ("CNAME:alias2.example",),
    "alias2.example": ("CNAME:web.example",),
    "loop.example": ("CNAME:loop2.example",),
    "loop2.example": ("CNAME:loop.example",),
    "away.example": ("CNAME:elsewhere.invalid.test",),
    "toguest.example": ("CNAME:vm1.guestnet.internal",),
    "sub.example": ("NS:ns.example",),
    "7.2.0.192.in-addr.arpa": ("PTR:seven.example",),
    "*.wild.example": ("192.0.2.9", "TXT:any"),
    "not.wild.example": ("192.0.2.10",),
    "a.deep.wild.example": ("192.0.2.11",),
    "caa.example": ('CAA:0 issue "ca.example"',),
    "strange.example": (r"TYPE65400:\# 3 010203",),
    "https.example": ("HTTPS:1 . alpn=h2",),
    "db.guestnet.internal": ("10.9.8.7",),
    "deep.er.guestnet.internal": ("10.9.8.8",),
}


@pytest.mark.parametrize(
    ("name", "type_", "expected"),
    [
        ("web.example", "A", ["web.example. A 192.0.2.1", "web.example. A 192.0.2.2"]),
        ("web.example", "AAAA", ["web.example. AAAA 2001:db8::1"]),
        ("typed.example", "AAAA", ["typed.example. AAAA 2001:db8::7"]),
        ("typed.example", "A", ["typed.example. A 192.0.2.7"]),
        ("mail.example", "MX", ["mail.example. MX 10 mx.example.", "mail.example. MX 20 mx2.example."]),
        ("_sip._tcp.example", "SRV", ["_sip._tcp.example. SRV 10 5 5060 sip.example."]),
        (
            "text.example",
            "TXT",
            ['text.example. TXT "v=spf1 -all"', 'text.example. TXT "two words" "more"'],
        ),
        (
            "alias.example",
            "A",
            [
                "alias.example. CNAME alias2.example.",
                "alias2.example. CNAME web.example.",
                "web.example. A 192.0.2.1",
                "web.example. A 192.0.2.2",
            ],
        ),
        ("alias.example", "CNAME", ["alias.example. CNAME alias2.example."]),
        (
            "toguest.example",
            "A",
            ["toguest.example. CNAME vm1.guestnet.internal.", "vm1.guestnet.internal. A 192.168.64.2"],
        ),
        ("sub.example", "NS", ["sub.example. NS ns.example."]),
        ("7.2.0.192.in-addr.arpa", "PTR", ["7.2.0.192.in-addr.arpa. PTR seven.example."]),
        ("any.wild.example", "A", ["any.wild.example. A 192.0.2.9"]),
        ("x.y.wild.example", "TXT", ['x.y.wild.example. TXT "any"']),
        ("not.wild.example", "A", ["not.wild.example. A 192.0.2.10"]),
        ("caa.example", "CAA", ['caa.example. CAA 0 issue "ca.example"']),
        ("strange.example", "TYPE65400", [r"strange.example. TYPE65400 \# 3 010203"]),
        ("db.guestnet.internal", "A", ["db.guestnet.internal. A 10.9.8.7"]),
        ("vm1.guestnet.internal", "A", ["vm1.guestnet.internal. A 192.168.64.2"]),
        ("vm1", "A", ["vm1. A 192.168.64.2"]),
        ("web-1", "A", ["web-1. A 192.168.64.3"]),
        ("gateway.guestnet.internal", "A", ["gateway.guestnet.internal. A 192.168.64.1"]),
        ("guestnet.internal", "NS", ["guestnet.internal. NS gateway.guestnet.internal."]),
        ("2.64.168.192.in-addr.arpa", "PTR", ["2.64.168.192.in-addr.arpa. PTR vm1.guestnet.internal."]),
        ("1.64.168.192.in-addr.arpa", "PTR", ["1.64.168.192.in-addr.arpa. PTR gateway.guestnet.internal."]),
        ("1.2.0.192.in-addr.arpa", "PTR", ["1.2.0.192.in-addr.arpa. PTR web.example."]),
        ("localhost", "A", ["localhost. A 127.0.0.1"]),
        ("any.localhost", "AAAA", ["any.localhost. AAAA ::1"]),
        ("1.0.0.127.in-addr.arpa", "PTR", ["1.0.0.127.in-addr.arpa. PTR localhost."]),
    ],
)
@pytest.mark.parametrize("tcp", [False, True])
async def test_a_record(name: str, type_: str, expected: list[str], tcp: bool) -> None:
    answer = await resolve(server(records=RECORDS), name, type_, tcp=tcp)
    assert answer.rcode() == dns.rcode.NOERROR
    assert answer.flags & dns.flags.AA
    said = texts(answer)
    assert sorted(said) == sorted(expected)
    # A CNAME comes before what it leads to.
    assert [line.split()[0] for line in said] == [line.split()[0] for line in expected]


@pytest.mark.parametrize(
    ("name", "type_", "rcode", "zone"),
    [
        ("nobody.guestnet.internal", "A", dns.rcode.NXDOMAIN, "guestnet.internal."),
        ("vm1.guestnet.internal", "AAAA", dns.rcode.NOERROR, "guestnet.internal."),
        ("vm1", "AAAA", dns.rcode.NOERROR, "vm1."),
        ("web.example", "MX", dns.rcode.NOERROR, "web.example."),
        ("guestnet.internal", "A", dns.rcode.NOERROR, "guestnet.internal."),
        ("er.guestnet.internal", "A", dns.rcode.NOERROR, "guestnet.internal."),
        ("wild.example", "A", dns.rcode.NOERROR, "wild.example."),
        ("x.wild.example", "AAAA", dns.rcode.NOERROR, "x.wild.example."),
        ("77.64.168.192.in-addr.arpa", "PTR", dns.rcode.NXDOMAIN, "64.168.192.in-addr.arpa."),
        ("2.64.168.192.in-addr.arpa", "A", dns.rcode.NOERROR, "64.168.192.in-addr.arpa."),
        ("x.2.64.168.192.in-addr.arpa", "PTR", dns.rcode.NXDOMAIN, "64.168.192.in-addr.arpa."),
        ("any.invalid", "A", dns.rcode.NXDOMAIN, "invalid."),
        ("any.onion", "A", dns.rcode.NXDOMAIN, "onion."),
        ("_dns.resolver.arpa", "SVCB", dns.rcode.NOERROR, "resolver.arpa."),
    ],
)
async def test_nothing_is_said_with_the_zones_soa(name: str, type_: str, rcode: int, zone: str) -> None:
    """RFC 2308: there is no such name, or none of that type, and for how long."""
    answer = await resolve(server(records=RECORDS), name, type_)
    assert answer.rcode() == rcode
    assert answer.answer == []
    (authority,) = answer.authority
    assert authority.rdtype == dns.rdatatype.SOA
    assert authority.name == dns.name.from_text(zone)
    assert authority[0].minimum == authority.ttl == 5


async def test_a_name_of_others_is_not_answered_without_a_resolver() -> None:
    for name in ("www.example.org", "deep.web.example", "nolabel", "9.9.9.9.in-addr.arpa"):
        answer = await resolve(server(records=RECORDS), name, use_edns=0)
        assert answer.rcode() == dns.rcode.SERVFAIL, name
        assert answer.extended_errors()[0].text == "no name server is configured on the host"


async def test_the_case_of_a_question_comes_back_as_it_was() -> None:
    answer = await resolve(server(records=RECORDS), "WeB.eXaMpLe")
    assert str(answer.question[0].name) == "WeB.eXaMpLe."
    assert str(answer.answer[0].name) == "WeB.eXaMpLe."
    assert texts(await resolve(server(), "VM1")) == ["VM1. A 192.168.64.2"]


async def test_a_wildcard_ends_where_a_name_exists() -> None:
    """RFC 4592 section 4: below an existing name the wildcard above it has no say."""
    made = server(records=RECORDS)
    assert texts(await resolve(made, "deep.wild.example")) == []
    assert (await resolve(made, "b.deep.wild.example")).answer == []
    assert texts(await resolve(made, "b.c.wild.example")) == ["b.c.wild.example. A 192.0.2.9"]


async def test_cnames_in_a_circle_end() -> None:
    assert (await resolve(server(records=RECORDS), "loop.example")).rcode() == dns.rcode.SERVFAIL


async def test_a_cname_to_what_cannot_be_asked() -> None:
    answer = await resolve(server(records=RECORDS), "away.example")
    assert answer.rcode() == dns.rcode.SERVFAIL


async def test_the_host_has_its_names_only_where_guests_reach_it() -> None:
    names = ("host.guestnet.internal", "host.docker.internal", "host.containers.internal")
    with_host = server(host=IPv4Address("192.168.64.254"))
    for name in names:
        assert texts(await resolve(with_host, name)) == [f"{name}. A 192.168.64.254"]
        assert (await resolve(server(), name)).answer == []
    pointer = await resolve(with_host, "254.64.168.192.in-addr.arpa", "PTR")
    assert texts(pointer) == ["254.64.168.192.in-addr.arpa. PTR host.guestnet.internal."]


async def test_the_users_record_counts_more_than_our_own_name() -> None:
    made = server(host=IPv4Address("192.168.64.254"), records={"host.docker.internal": ("10.0.0.9",)})
    assert texts(await resolve(made, "host.docker.internal")) == ["host.docker.internal. A 10.0.0.9"]


async def test_a_zone_of_the_users_own() -> None:
    made = server(zone="Lab.Example")
    assert texts(await resolve(made, "vm1.lab.example")) == ["vm1.lab.example. A 192.168.64.2"]
    assert (await resolve(made, "vm9.lab.example")).rcode() == dns.rcode.NXDOMAIN
    assert (await resolve(made, "vm1.guestnet.internal")).rcode() == dns.rcode.SERVFAIL


async def test_guests_come_and_go() -> None:
    guests = Guests()
    made = server(directory=guests)
    assert (await resolve(made, "new.guestnet.internal")).rcode() == dns.rcode.NXDOMAIN
    guests.guests["new"] = (IPv4Address("192.168.64.9"),)
    made.network._registry.renamed()
    answer = await resolve(made, "new.guestnet.internal")
    assert texts(answer) == ["new.guestnet.internal. A 192.168.64.9"]
    assert answer.answer[0].ttl == 5


PREFIX = IPv6Network("fd00:6e:0:1::/64")
SIX = Guests(vm1="192.168.64.2 fd00:6e:0:1::2", only="fd00:6e:0:1::a", old="192.168.64.3")
ARPA6 = "1.0.0.0.0.0.0.0.e.6.0.0.0.0.d.f.ip6.arpa"


def digits(tail: str) -> str:
    """The name of an address whose last digits are these."""
    return ".".join([*reversed(tail.rjust(16, "0")), ARPA6])


@pytest.mark.parametrize(
    ("name", "type_", "expected"),
    [
        ("vm1.guestnet.internal", "A", ["vm1.guestnet.internal. A 192.168.64.2"]),
        ("vm1.guestnet.internal", "AAAA", ["vm1.guestnet.internal. AAAA fd00:6e:0:1::2"]),
        ("vm1", "AAAA", ["vm1. AAAA fd00:6e:0:1::2"]),
        ("only.guestnet.internal", "AAAA", ["only.guestnet.internal. AAAA fd00:6e:0:1::a"]),
        ("only.guestnet.internal", "A", []),
        ("old.guestnet.internal", "AAAA", []),
        ("gateway.guestnet.internal", "AAAA", ["gateway.guestnet.internal. AAAA fd00:6e:0:1::1"]),
        (digits("2"), "PTR", [f"{digits('2')}. PTR vm1.guestnet.internal."]),
        (digits("a").upper(), "PTR", [f"{digits('a')}. PTR only.guestnet.internal."]),
        (digits("1"), "PTR", [f"{digits('1')}. PTR gateway.guestnet.internal."]),
        (digits("2"), "A", []),
        (digits("2").partition(".")[2], "PTR", []),
        (ARPA6, "NS", [f"{ARPA6}. NS gateway.guestnet.internal."]),
    ],
)
async def test_names_and_addresses_in_ipv6(name: str, type_: str, expected: list[str]) -> None:
    made = server(directory=SIX, subnet6=PREFIX, gateway6=PREFIX[1])
    answer = await resolve(made, name, type_)
    assert answer.rcode() == dns.rcode.NOERROR
    assert answer.flags & dns.flags.AA
    assert [line.lower() for line in texts(answer)] == [line.lower() for line in expected]


@pytest.mark.parametrize(
    "name", [digits("77"), f"0.{digits('2')}", f"g.{ARPA6}", f"10.{ARPA6}", "x." * 40 + ARPA6]
)
async def test_addresses_of_the_prefix_that_nobody_has(name: str) -> None:
    made = server(directory=SIX, subnet6=PREFIX, gateway6=PREFIX[1])
    answer = await resolve(made, name, "PTR")
    assert answer.rcode() == dns.rcode.NXDOMAIN
    assert str(answer.authority[0].name) == f"{ARPA6}.", "they are not asked of others"


async def test_addresses_of_other_prefixes_are_asked_of_others() -> None:
    made = server(directory=SIX, subnet6=PREFIX, gateway6=PREFIX[1])
    for name in (
        f"2.{digits('2')[2:]}".replace("1.0.0.0.0", "2.0.0.0.0"),
        ARPA6.partition(".")[2],
        "ip6.arpa",
    ):
        assert (await resolve(made, name, "PTR")).rcode() == dns.rcode.SERVFAIL, "there is no name server"


async def test_a_network_without_ipv6_asks_others_for_its_names() -> None:
    assert (await resolve(server(), digits("2"), "PTR")).rcode() == dns.rcode.SERVFAIL
    assert texts(await resolve(server(), "gateway.guestnet.internal", "AAAA")) == []


@pytest.mark.parametrize("type_", ["DS", "DNSKEY", "NS", "SOA"])
async def test_a_guest_named_like_a_top_level_domain_does_not_answer_for_it(type_: str) -> None:
    made = server(directory=Guests(com="192.168.64.7"))
    assert texts(await resolve(made, "com")) == ["com. A 192.168.64.7"]
    assert (await resolve(made, "com", type_)).rcode() == dns.rcode.SERVFAIL, "asked of others"
    assert (await resolve(made, "com.guestnet.internal", type_)).rcode() == dns.rcode.NOERROR


async def test_records_come_and_go() -> None:
    made = server()
    made.dns.add_record("late.example", "192.0.2.5")
    made.dns.add_record("late.example", "TXT:here")
    first = await resolve(made, "late.example")
    assert texts(first) == ["late.example. A 192.0.2.5"]
    assert (await resolve(made, "late.example", "TXT")).answer
    before = (await resolve(made, "guestnet.internal", "SOA")).answer[0][0].serial
    assert made.dns.remove_record("Late.Example") is True
    assert made.dns.remove_record("late.example") is False
    assert (await resolve(made, "late.example")).rcode() == dns.rcode.SERVFAIL
    assert (await resolve(made, "guestnet.internal", "SOA")).answer[0][0].serial > before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("web.example", "nonsense"),
        ("web.example", ""),
        ("web.example", "A:2001:db8::1"),
        ("web.example", "AAAA:192.0.2.1"),
        ("web.example", "MX:mail.example"),
        ("web.example", "MX:70000 mail.example"),
        ("web.example", "SRV:1 2 3"),
        ("web.example", "SOA:a b 1 2 3 4 5"),
        ("web.example", "NOSUCH:1"),
        ("web.example", "TXT:" + "x" * 5000),
        ("web.example", "fe80::1%eth0"),
        ("", "192.0.2.1"),
        (".", "192.0.2.1"),
        ("a b", "192.0.2.1"),
        ("a..b", "192.0.2.1"),
        ("x" * 64, "192.0.2.1"),
        ("é.example", "192.0.2.1"),
        ("a.*.example", "192.0.2.1"),
        (".".join(["x" * 50] * 6), "192.0.2.1"),
    ],
)
def test_a_record_that_is_none_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        authority(records={name: (value,)})
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError):
        authority().add_record(name, value)


def test_a_cname_stands_alone() -> None:
    with pytest.raises(ConfigError, match="CNAME beside another"):
        authority(records={"a.example": ("CNAME:b.example", "192.0.2.1")})


async def test_a_question_for_everything_gets_something() -> None:
    for name in ("web.example", "vm1.guestnet.internal", "guestnet.internal"):
        answer = await resolve(server(records=RECORDS), name, "ANY")
        assert [rdata.rdtype for rrset in answer.answer for rdata in rrset] == [dns.rdatatype.HINFO]


@pytest.mark.parametrize("type_", ["AXFR", "IXFR", "TKEY", "TSIG"])
async def test_transfers_and_transactions_are_refused(type_: str) -> None:
    query = dns.message.make_query("guestnet.internal", "A")
    wire = bytearray(query.to_wire())
    wire[-4:-2] = int(dns.rdatatype.from_text(type_)).to_bytes(2, "big")
    data = await server().handle(bytes(wire), tcp=True, endpoint_id="vm1")
    assert data is not None
    assert data[3] & 15 == dns.rcode.REFUSED


async def test_other_classes_are_refused() -> None:
    answer = await resolve(server(), "version.bind", "TXT", rdclass="CH")
    assert answer.rcode() == dns.rcode.REFUSED


async def test_an_answer_too_large_for_udp_is_cut_to_nothing_and_marked() -> None:
    made = server(records={"big.example": tuple(f"TXT:{number:03}{'x' * 90}" for number in range(20))})
    for options in ({"use_edns": -1}, {"use_edns": 0, "payload": 4096}):
        answer = await resolve(made, "big.example", "TXT", **options)
        assert answer.flags & dns.flags.TC
        assert answer.answer == []
    whole = await resolve(made, "big.example", "TXT", tcp=True)
    assert len(texts(whole)) == 20
    assert not whole.flags & dns.flags.TC


async def test_edns_is_answered_with_edns_only() -> None:
    assert (await resolve(server(), "vm1", use_edns=-1)).edns == -1
    answer = await resolve(server(), "vm1", use_edns=0, payload=4096, want_dnssec=True)
    assert (answer.edns, answer.payload) == (0, 1232)
    assert answer.ednsflags & dns.flags.DO
    newer = dns.message.make_query("vm1", "A", use_edns=0)
    newer.use_edns(edns=1)
    data = await server().handle(newer.to_wire(), tcp=False, endpoint_id="vm1")
    assert data is not None
    assert dns.message.from_wire(data).rcode() == dns.rcode.BADVERS


@pytest.mark.parametrize(("opcode", "rcode"), [(1, 4), (2, 4), (4, 4), (5, 4), (15, 4)])
async def test_other_kinds_of_message_are_not_implemented(opcode: int, rcode: int) -> None:
    wire = bytearray(dns.message.make_query("vm1", "A").to_wire())
    wire[2] |= opcode << 3
    data = await server().handle(bytes(wire), tcp=False, endpoint_id="vm1")
    assert data is not None
    assert data[:2] == wire[:2]
    assert data[2] & 0x80
    assert data[3] & 15 == rcode


async def test_an_answer_gets_no_answer() -> None:
    query = dns.message.make_query("vm1", "A")
    data = dns.message.make_response(query).to_wire()
    made = server()
    made.client("vm1").send_udp("192.168.64.1", 53, 5000, data)
    # A later query is answered, and nothing else came.
    made.client("vm1")._datagrams[5000] = []
    await resolve(made, "vm1")
    assert made.client("vm1")._datagrams[5000] == []
    assert made.count("dns_misses") == 2


async def test_a_query_has_no_thousands_of_records() -> None:
    """Each is looked at, for the one that is OPT, and the others wait meanwhile."""
    query = dns.message.make_query("vm1", "A", use_edns=-1).to_wire()
    nothing = b"\0" + struct.pack("!HHIH", 1, 1, 0, 0)
    for count, rcode in ((16, dns.rcode.NOERROR), (17, dns.rcode.FORMERR), (5900, dns.rcode.FORMERR)):
        data = query[:10] + struct.pack("!H", count) + query[12:] + nothing * count
        answer = await server().handle(data, tcp=True, endpoint_id="vm1")
        assert answer is not None
        assert answer[3] & 15 == rcode


class Liars(Guests):
    """Guests that all gave themselves their names."""

    def addresses_named(self, name: str, *, told: bool = True) -> tuple[IPv4Address | IPv6Address, ...]:
        return super().addresses_named(name) if told else ()


@pytest.mark.parametrize(
    "record",
    ["api", "api.guestnet.internal", "API", "v2.api.guestnet.internal", "*.api", "*.guestnet.internal"],
)
async def test_a_name_that_a_guest_gives_itself_does_not_shadow_the_owners(record: str) -> None:
    said = server(records={record: ("203.0.113.9",)}, directory=Liars(api="192.168.64.9", own="192.168.64.8"))
    for name in ("api.guestnet.internal", "api"):
        answer = await resolve(said, name, "A")
        assert "192.168.64.9" not in str(answer), answer
    if record != "*.guestnet.internal":
        assert "192.168.64.8" in str(await resolve(said, "own.guestnet.internal", "A"))
    # Also when it is added while the guest has the name.
    said = server(directory=Liars(api="192.168.64.9"))
    assert "192.168.64.9" in str(await resolve(said, "api.guestnet.internal", "A"))
    said.dns.add_record(record, "203.0.113.9")
    assert "192.168.64.9" not in str(await resolve(said, "api.guestnet.internal", "A"))
