"""The options of answers, by their RFCs."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import dns.name
import pytest

from .conftest import Segment
from .dhcp_wire import ACK, DISCOVER, MAC, NAK, OFFER, REQUEST, ask, bootp, ip, read, tlv

EVERY = bytes((1, 3, 6, 12, 15, 26, 28, 51, 54, 119, 121))


def domains(data: bytes) -> list[str]:
    """Option 119, by dnspython."""
    at, found = 0, []
    while at < len(data):
        name, used = dns.name.from_wire(data, at)
        found.append(name.to_text(omit_final_dot=True))
        at += used
    return found


def routes(data: bytes) -> list[tuple[str, str]]:
    """Option 121 by RFC 3442."""
    at, found = 0, []
    while at < len(data):
        length = data[at]
        octets = -(-length // 8)
        destination = IPv4Address(data[at + 1 : at + 1 + octets].ljust(4, b"\0"))
        router = IPv4Address(data[at + 1 + octets : at + 5 + octets])
        found.append((f"{destination}/{length}", str(router)))
        at += 5 + octets
    return found


def test_every_option_says_what_the_network_is(segment: Segment) -> None:
    said = segment.answer(DISCOVER, [(55, EVERY)])
    assert said.address(1) == "255.255.255.0"
    assert said.address(3) == said.address(6) == said.address(54) == "192.168.64.1"
    assert said.options[12] == b"vm1"
    assert said.options[15] == b"guestnet.internal"
    assert said.number(26) == 1500
    assert said.address(28) == "192.168.64.255"
    assert said.number(51) == 3600
    assert domains(said.options[119]) == ["guestnet.internal"]
    assert routes(said.options[121]) == [("0.0.0.0/0", "192.168.64.1")]


def test_options_come_in_the_order_of_the_parameter_request_list(segment: Segment) -> None:
    said = segment.answer(DISCOVER, [(55, bytes((28, 15, 121, 6, 3, 28, 200, 0, 255)))])
    order = [code for code in said.options if code not in (51, 53, 54, 58, 59)]
    # RFC 2132 section 3.3: the subnet mask comes before the router, also where it was not asked for.
    assert order == [1, 28, 15, 121, 6, 3]


def test_a_client_that_names_no_options_gets_the_usual_ones(segment: Segment) -> None:
    said = segment.answer(DISCOVER)
    assert {1, 3, 6, 12, 15, 26, 28, 51, 53, 54, 119} <= set(said.options)
    assert 121 not in said.options
    empty = segment.answer(DISCOVER, [(55, b"")])
    assert set(empty.options) == {1, 51, 53, 54, 58, 59}


def test_classless_routes_hold_the_default_route_because_option_3_is_then_ignored() -> None:
    router = IPv4Address("192.168.64.1")
    more = [
        ("10.0.0.0/8", 8),
        ("10.17.0.0/16", 16),
        ("10.27.129.0/24", 24),
        ("10.229.0.128/25", 25),
        ("10.198.122.47/32", 32),
    ]
    segment = Segment(routes=tuple((IPv4Network(text), router) for text, _ in more))
    segment.add("vm1")
    said = segment.answer(DISCOVER, [(55, bytes((3, 121)))])
    assert routes(said.options[121]) == [
        *((text, str(router)) for text, _ in more),
        ("0.0.0.0/0", str(router)),
    ]
    # The descriptors of RFC 3442's own table.
    assert said.options[121].startswith(bytes((8, 10)) + router.packed + bytes((16, 10, 17)) + router.packed)
    assert bytes((25, 10, 229, 0, 128)) + router.packed in said.options[121]
    assert said.address(3) == str(router), "for clients that know only this one"


def test_a_network_without_router_names_or_domain() -> None:
    segment = Segment(router=None, dns=(), domain=None, search=())
    segment.add("vm1")
    said = segment.answer(DISCOVER, [(55, EVERY)])
    assert set(said.options) == {1, 12, 26, 28, 51, 53, 54, 58, 59}


def test_the_search_list_is_compressed_and_read_by_others() -> None:
    search = ("eng.apple.example", "marketing.apple.example", "apple.example", "eng.apple.example")
    segment = Segment(search=search)
    segment.add("vm1")
    data = segment.answer(DISCOVER, [(55, bytes((119,)))]).options[119]
    assert domains(data) == list(search)
    assert len(data) == len(b"\3eng\5apple\7example\0") + len(b"\x09marketing..") + 2 + 2
    assert b"\xc0\x04" in data


def test_a_search_list_over_255_bytes_is_split_and_read_whole() -> None:
    search = tuple(f"{chr(97 + n) * 40}.{n}.example" for n in range(9))
    segment = Segment(search=search)
    segment.add("vm1")
    big = [(55, bytes((119,))), (57, (1500).to_bytes(2, "big"))]
    reply = segment.send(ask(DISCOVER, big))
    assert reply is not None
    data = read(reply.payload).options[119]
    assert len(data) > 255
    assert domains(data) == list(search)
    assert reply.payload.count(bytes((119, 255))) == 1, "RFC 3396: one full part, then the rest"


def test_options_that_do_not_fit_go_into_file_and_sname() -> None:
    search = tuple(f"{chr(97 + n) * 24}.{n}.example" for n in range(10))
    segment = Segment(search=search)
    segment.add("vm1")
    small = segment.send(ask(DISCOVER, [(55, bytes((119, 15, 26, 28, 12, 121)))]))
    assert small is not None
    assert len(small.payload) <= 548
    said = read(small.payload)
    assert domains(said.options[119]) == list(search)
    long = Segment(search=tuple(f"{chr(97 + n) * 50}.{n}.example" for n in range(20)))
    long.add("vm1")
    cut = long.send(ask(DISCOVER, [(55, bytes((119, 15)))]))
    assert cut is not None
    assert len(cut.payload) <= 548
    assert set(read(cut.payload).options) == {1, 15, 51, 53, 54, 58, 59}, "an option is whole or not there"
    assert long.server.counters["options_without_room"] == 1


def test_overload_uses_both_fields_and_is_read_back() -> None:
    segment = Segment(
        search=tuple(f"{chr(97 + n) * 30}.example" for n in range(8)),
        domain="d" * 50 + ".example",
        routes=tuple((IPv4Network(f"10.{n}.0.0/16"), IPv4Address("192.168.64.1")) for n in range(6)),
    )
    segment.add("vm1")
    reply = segment.send(ask(DISCOVER, [(55, bytes((119, 121, 15, 1, 3, 6, 26, 28, 12)))]))
    assert reply is not None
    said = read(reply.payload)
    assert said.options[52][0] & 1
    assert {119, 121, 15, 3, 6, 26, 28, 12} <= set(said.options)
    assert segment.server.counters["options_without_room"] == 0


@pytest.mark.parametrize(
    ("takes", "mtu", "most"),
    [(0, 1500, 548), (100, 1500, 548), (1024, 1500, 996), (65535, 1500, 1472), (9000, 576, 548)],
)
def test_the_size_that_the_client_takes_is_kept(takes: int, mtu: int, most: int) -> None:
    # Option 57 counts the IP datagram, so 28 bytes of headers go off.
    segment = Segment(
        mtu=mtu,
        search=tuple(f"{chr(97 + n) * 50}.{n}.example" for n in range(26)),
        routes=tuple((IPv4Network(f"10.{n}.0.0/16"), IPv4Address("192.168.64.1")) for n in range(50)),
    )
    segment.add("vm1")
    reply = segment.send(ask(DISCOVER, [(55, bytes((15, 121, 119))), (57, takes.to_bytes(2, "big"))]))
    assert reply is not None
    assert len(reply.payload) <= most
    assert read(reply.payload).kind == OFFER


def test_options_of_a_client_are_read_from_file_and_sname_too(segment: Segment) -> None:
    """RFC 3396 section 5: an option that is split goes on from one area to the next."""
    vendor = b"\x63\x82\x53\x63" + tlv([(53, bytes((REQUEST,))), (52, b"\3"), (50, ip("192.168.64.2")[:2])])
    message = bootp(
        vendor=vendor + b"\xff",
        file=tlv([(50, ip("192.168.64.2")[2:]), (12, b"spl")]) + b"\xff",
        sname=tlv([(12, b"it")]) + b"\xff",
    )
    reply = segment.send(message)
    assert reply is not None
    assert read(reply.payload).kind == ACK
    assert segment.server.leases()[0].hostname == "split"


def test_without_overload_file_and_sname_are_no_options(segment: Segment) -> None:
    message = ask(DISCOVER, file=tlv([(53, bytes((REQUEST,)))]) + b"\xff", sname=b"\xff" * 64)
    reply = segment.send(message)
    assert reply is not None
    assert read(reply.payload).kind == OFFER


def test_padding_is_passed_over_and_a_missing_end_is_forgiven(segment: Segment) -> None:
    padded = bootp(vendor=b"\x63\x82\x53\x63" + b"\0\0" + tlv([(53, b"\1")]) + b"\0" * 30 + tlv([(12, b"x")]))
    reply = segment.send(padded)
    assert reply is not None
    assert read(reply.payload).kind == OFFER


def test_a_client_may_say_much(segment: Segment) -> None:
    said = [(60, bytes(9))] * 100
    longest = ask(DISCOVER, said).ljust(1500, b"\0")
    assert segment.send(longest) is not None


def test_the_client_identifier_comes_back(segment: Segment) -> None:
    for kind, options in (
        (DISCOVER, []),
        (REQUEST, [(50, ip("192.168.64.2"))]),
        (REQUEST, [(50, ip("10.0.0.1"))]),
    ):
        said = segment.answer(kind, [*options, (61, b"\xff\0\1\2\3")])
        assert said.options[61] == b"\xff\0\1\2\3"
        assert said.kind in (OFFER, ACK, NAK)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([(12, b"Web")], "web"),
        ([(12, b"web\0\0")], "web"),
        ([(12, b"web.corp.example")], "web"),
        ([(12, b"")], None),
        ([(12, b"-x")], None),
        ([(12, b"x-")], None),
        ([(12, b"a b")], None),
        ([(12, b"\xff\xfe")], None),
        ([(12, b"x" * 64)], None),
        ([(12, b"x" * 63)], "x" * 63),
        ([(12, b"wpad")], None),
        ([(12, b"GATEWAY")], None),
        ([(12, b"localhost")], None),
        ([(81, b"\0\0\0fqdn.example")], "fqdn"),
        ([(81, b"\4\0\0\4fqdn\7example\0")], "fqdn"),
        ([(81, b"\4\0\0\xff")], None),
        ([(81, b"\4\0\0")], None),
        ([(12, b"first"), (81, b"\0\0\0second")], "first"),
    ],
)
def test_the_host_name_of_a_client(
    segment: Segment, options: list[tuple[int, bytes]], name: str | None
) -> None:
    segment.answer(REQUEST, [(50, ip("192.168.64.2")), *options])
    assert segment.server.leases()[0].hostname == name


def test_only_the_endpoints_own_mac_gets_its_name(segment: Segment) -> None:
    behind = bytes.fromhex("020000000099")
    assert segment.answer(DISCOVER, [(55, bytes((12,)))]).options[12] == b"vm1"
    assert 12 not in segment.answer(DISCOVER, [(55, bytes((12,)))], mac=behind).options
    assert segment.answer(DISCOVER).mac == MAC
