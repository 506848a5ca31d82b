"""What clients get, message by message (RFC 2131 section 4.3)."""

from __future__ import annotations

import pytest
from guestnet.model.ipam import format_mac

from .conftest import Segment
from .dhcp_wire import (
    ACK,
    DECLINE,
    DISCOVER,
    INFORM,
    MAC,
    NAK,
    OFFER,
    RELEASE,
    REQUEST,
    ask,
    bootp,
    ip,
    read,
)

BROADCAST_MAC = b"\xff" * 6
OTHER = bytes.fromhex("020000000008")
SERVER = (54, ip("192.168.64.1"))


def test_discover_is_offered_the_address_of_the_endpoint(segment: Segment) -> None:
    reply = segment.send(ask(DISCOVER))
    assert reply is not None
    said = read(reply.payload)
    assert (said.op, said.kind, said.xid, said.mac) == (2, OFFER, 0x12345678, MAC)
    assert (said.yiaddr, said.ciaddr, said.giaddr) == ("192.168.64.2", "0.0.0.0", "0.0.0.0")
    assert said.address(54) == "192.168.64.1"
    assert said.number(51) == 3600
    assert (said.number(58), said.number(59)) == (1800, 3150)
    assert len(reply.payload) >= 300
    assert segment.server.leases() == []
    assert segment.leased == []


def test_an_answer_goes_to_the_offered_address_unless_the_client_wants_a_broadcast(segment: Segment) -> None:
    plain = segment.send(ask(DISCOVER))
    wanted = segment.send(ask(DISCOVER, flags=0x8000))
    assert plain is not None
    assert wanted is not None
    assert (str(plain.dst_ip), plain.dst_port, plain.dst_mac, plain.broadcast) == (
        "192.168.64.2",
        68,
        MAC,
        False,
    )
    assert (str(wanted.dst_ip), wanted.dst_port) == ("255.255.255.255", 68)
    assert (wanted.dst_mac, wanted.broadcast) == (BROADCAST_MAC, True)
    assert read(plain.payload).flags == 0
    assert read(wanted.payload).flags == 0x8000


def test_only_the_broadcast_flag_comes_back(segment: Segment) -> None:
    assert segment.answer(DISCOVER, flags=0xFFFF).flags == 0x8000
    assert segment.answer(DISCOVER, flags=0x7FFF).flags == 0


def test_a_request_for_what_was_offered_is_a_lease(segment: Segment) -> None:
    segment.answer(DISCOVER)
    said = segment.answer(REQUEST, [SERVER, (50, ip("192.168.64.2")), (12, b"Web-1.example")])
    assert (said.kind, said.yiaddr, said.number(51)) == (ACK, "192.168.64.2", 3600)
    (lease,) = segment.server.leases()
    assert (lease.endpoint_id, lease.mac, str(lease.ip)) == ("vm1", format_mac(MAC), "192.168.64.2")
    assert (lease.hostname, lease.expires) == ("web-1", 4600.0)
    assert [one.ip for one in segment.leased] == [lease.ip]


def test_a_request_for_another_server_is_left_alone(segment: Segment) -> None:
    assert segment.ask(REQUEST, [(54, ip("192.168.64.9")), (50, ip("192.168.64.2"))]) is None
    assert segment.refusals() == {"other_server": 1}


def test_init_reboot_with_the_own_address_is_a_lease(segment: Segment) -> None:
    said = segment.answer(REQUEST, [(50, ip("192.168.64.2"))])
    assert (said.kind, said.yiaddr) == (ACK, "192.168.64.2")


@pytest.mark.parametrize(
    "wanted", ["10.0.0.7", "192.168.65.2", "127.0.0.1", "255.255.255.255", "192.168.64.77"]
)
@pytest.mark.parametrize("flags", [0, 0x8000])
def test_init_reboot_with_a_wrong_address_is_refused_to_all(
    segment: Segment, wanted: str, flags: int
) -> None:
    reply = segment.send(ask(REQUEST, [(50, ip(wanted)), (61, b"\x01" + MAC)], flags=flags))
    assert reply is not None
    said = read(reply.payload)
    assert said.kind == NAK
    assert (said.yiaddr, said.ciaddr) == ("0.0.0.0", "0.0.0.0")
    assert set(said.options) == {53, 54, 56, 61}, "RFC 2131 table 3, and RFC 6842"
    assert (str(reply.dst_ip), reply.dst_mac, reply.broadcast) == ("255.255.255.255", BROADCAST_MAC, True)
    assert segment.server.leases() == []


@pytest.mark.parametrize("state", ["renewing", "rebinding"])
def test_renewing_and_rebinding_lengthen_the_lease(segment: Segment, state: str) -> None:
    segment.answer(REQUEST, [(50, ip("192.168.64.2"))])
    segment.now += 1800 if state == "renewing" else 3150
    reply = segment.send(ask(REQUEST, ciaddr="192.168.64.2"))
    assert reply is not None
    said = read(reply.payload)
    assert (said.kind, said.yiaddr, said.ciaddr) == (ACK, "192.168.64.2", "192.168.64.2")
    assert (str(reply.dst_ip), reply.dst_mac, reply.broadcast) == ("192.168.64.2", MAC, False)
    assert segment.server.leases()[0].expires == segment.now + 3600
    assert segment.released == []


def test_renewing_the_address_of_another_guest_is_refused(segment: Segment) -> None:
    segment.add("vm2", OTHER)
    assert segment.answer(REQUEST, ciaddr="192.168.64.3").kind == NAK
    assert segment.answer(REQUEST, ciaddr="10.1.1.1").kind == NAK


def test_a_request_that_contradicts_itself_gets_nothing(segment: Segment) -> None:
    assert segment.ask(REQUEST) is None
    assert segment.ask(REQUEST, [(50, ip("192.168.64.2"))], ciaddr="192.168.64.3") is None
    assert segment.refusals() == {"contradiction": 2}


def test_inform_gets_options_and_no_lease(segment: Segment) -> None:
    reply = segment.send(ask(INFORM, [(55, bytes((1, 3, 6, 15)))], ciaddr="192.168.64.200", flags=0x8000))
    assert reply is not None
    said = read(reply.payload)
    assert (said.kind, said.yiaddr, said.ciaddr) == (ACK, "0.0.0.0", "192.168.64.200")
    assert set(said.options) == {53, 54, 1, 3, 6, 15}, "no times (RFC 2131 section 4.3.5)"
    assert (str(reply.dst_ip), reply.dst_mac, reply.broadcast) == ("192.168.64.200", MAC, False)
    assert segment.server.leases() == []
    assert segment.ask(INFORM, ciaddr="10.0.0.1") is None
    assert segment.ask(INFORM) is None


def test_release_ends_the_lease(segment: Segment) -> None:
    segment.answer(REQUEST, [(50, ip("192.168.64.2"))])
    assert segment.ask(RELEASE, [SERVER], ciaddr="192.168.64.2") is None
    assert segment.server.leases() == []
    assert [str(lease.ip) for lease in segment.released] == ["192.168.64.2"]
    assert segment.ask(RELEASE, [SERVER], ciaddr="192.168.64.2") is None
    assert segment.refusals() == {"not_leased": 1}
    assert segment.answer(DISCOVER).yiaddr == "192.168.64.2", "an endpoint's address stays its own"


def test_releasing_the_address_of_another_guest_ends_nothing(segment: Segment) -> None:
    segment.add("vm2", OTHER)
    segment.answer(REQUEST, [(50, ip("192.168.64.3"))], endpoint="vm2", mac=OTHER)
    segment.ask(RELEASE, [SERVER], ciaddr="192.168.64.3")
    assert [str(lease.ip) for lease in segment.server.leases()] == ["192.168.64.3"]
    assert segment.released == []


def test_decline_gives_another_address_and_puts_this_one_aside(segment: Segment) -> None:
    segment.answer(REQUEST, [(50, ip("192.168.64.2"))])
    assert segment.ask(DECLINE, [SERVER, (50, ip("192.168.64.2"))]) is None
    assert [str(lease.ip) for lease in segment.released] == ["192.168.64.2"]
    offered = segment.answer(DISCOVER).yiaddr
    assert offered == "192.168.64.3"
    segment.add("vm2", OTHER)
    assert segment.answer(DISCOVER, endpoint="vm2", mac=OTHER).yiaddr not in ("192.168.64.2", offered)
    assert segment.answer(REQUEST, [(50, ip("192.168.64.2"))]).kind == NAK


def test_declines_of_one_endpoint_are_bounded_and_forgiven(segment: Segment) -> None:
    for _ in range(12):
        offered = segment.answer(DISCOVER).yiaddr
        segment.ask(DECLINE, [SERVER, (50, ip(offered))])
    assert segment.refusals() == {"too_many_declined": 8}
    segment.now += 601
    offered = segment.answer(DISCOVER).yiaddr
    segment.ask(DECLINE, [SERVER, (50, ip(offered))])
    assert segment.refusals() == {"too_many_declined": 8}


def test_declining_an_address_that_is_not_held_is_refused(segment: Segment) -> None:
    segment.ask(DECLINE, [SERVER, (50, ip("192.168.64.2"))])
    segment.answer(DISCOVER)
    segment.ask(DECLINE, [SERVER, (50, ip("192.168.64.9"))])
    segment.ask(DECLINE, [SERVER])
    segment.ask(DECLINE, [(54, ip("192.168.64.8")), (50, ip("192.168.64.2"))])
    assert segment.refusals() == {"not_leased": 2, "contradiction": 1, "other_server": 1}


def test_rapid_commit_is_a_lease_at_once(segment: Segment) -> None:
    said = segment.answer(DISCOVER, [(80, b"")])
    assert (said.kind, said.yiaddr) == (ACK, "192.168.64.2")
    assert said.options[80] == b""
    assert len(segment.server.leases()) == 1
    assert 80 not in segment.answer(DISCOVER).options


def test_a_static_lease_is_what_its_guest_gets() -> None:
    lease = {"mac": "02:00:00:00:00:07", "ip": "192.168.64.50", "name": "alpha"}
    segment = Segment({"static_leases": [lease]})
    segment.add("alpha")
    segment.add("vm2", OTHER)
    assert segment.answer(DISCOVER, endpoint="alpha").yiaddr == "192.168.64.50"
    other = [(50, ip("192.168.64.50"))]
    assert segment.answer(DISCOVER, other, endpoint="vm2", mac=OTHER).yiaddr == "192.168.64.2"
    assert segment.answer(REQUEST, other, endpoint="vm2", mac=OTHER).kind == NAK


def test_a_lease_is_over_when_its_time_is(segment: Segment) -> None:
    segment.answer(REQUEST, [(50, ip("192.168.64.2"))])
    segment.now += 3599.9
    segment.server.expire(segment.now)
    assert len(segment.server.leases()) == 1
    segment.now += 0.2
    assert segment.server.leases() == []
    segment.server.expire(segment.now)
    assert [str(lease.ip) for lease in segment.released] == ["192.168.64.2"]


def test_an_offer_that_is_not_taken_becomes_free_again(segment: Segment) -> None:
    """A second MAC behind the endpoint has an address of its own, for as long as it wants it."""
    said = segment.answer(DISCOVER, [(50, ip("192.168.64.99"))], mac=OTHER)
    assert said.yiaddr == "192.168.64.99"
    segment.now += 61
    segment.server.expire(segment.now)
    assert len(segment.store) == 0
    third = bytes.fromhex("020000000009")
    assert segment.answer(DISCOVER, [(50, ip("192.168.64.99"))], mac=third).yiaddr == "192.168.64.99"


def test_clients_of_one_endpoint_are_bounded(segment: Segment) -> None:
    given = set()
    for number in range(40):
        mac = bytes((2, 0, 0, 0, 1, number))
        said = segment.ask(REQUEST, [(50, ip(f"192.168.64.{100 + number}"))], mac=mac)
        if said is not None and said.kind == ACK:
            given.add(said.yiaddr)
    assert 1 <= len(given) <= 16
    assert segment.refusals()["no_address"] >= 24
    segment.add("vm2", OTHER)
    assert segment.answer(DISCOVER, endpoint="vm2", mac=OTHER).kind == OFFER


def test_an_endpoint_that_goes_takes_its_leases_along(segment: Segment) -> None:
    segment.answer(REQUEST, [(50, ip("192.168.64.2"))])
    segment.answer(REQUEST, [(50, ip("192.168.64.90"))], mac=OTHER)
    segment.server.remove_endpoint("vm1")
    assert segment.server.leases() == []
    assert {str(lease.ip) for lease in segment.released} == {"192.168.64.2", "192.168.64.90"}
    assert len(segment.store) == 0


def test_the_lease_that_a_client_wants_is_heard_within_bounds(segment: Segment) -> None:
    wanted = [(600, 600), (1, 60), (0, 60), (3600, 3600), (86400, 3600), (0xFFFFFFFF, 3600)]
    for asked, given in wanted:
        said = segment.answer(REQUEST, [(50, ip("192.168.64.2")), (51, asked.to_bytes(4, "big"))])
        assert said.number(51) == given
        assert said.number(58) < said.number(59) < given
        assert segment.server.leases()[0].expires == segment.now + given


def test_a_lease_for_ever() -> None:
    segment = Segment(lease_time=0xFFFFFFFF)
    segment.add("vm1")
    said = segment.answer(REQUEST, [(50, ip("192.168.64.2"))])
    assert said.number(51) == 0xFFFFFFFF
    assert not {58, 59} & set(said.options)
    segment.now += 1e12
    assert len(segment.server.leases()) == 1


def test_bootp_clients_get_their_address_for_ever(segment: Segment) -> None:
    for vendor in (b"", b"\x63\x82\x53\x63\xff".ljust(64, b"\0")):
        reply = segment.send(bootp(vendor=vendor))
        assert reply is not None
        assert len(reply.payload) == 300
        said = read(reply.payload)
        assert said.yiaddr == "192.168.64.2"
        assert 53 not in said.options
    segment.now += 1e9
    assert len(segment.server.leases()) == 1


@pytest.mark.parametrize(
    ("payload", "mac", "reason"),
    [
        (b"", MAC, "too_short"),
        (ask(DISCOVER)[:235], MAC, "too_short"),
        (ask(DISCOVER).ljust(1500, b"\0") + b"\0", MAC, "too_long"),
        (ask(DISCOVER, [(60, b"")] * 128), MAC, "bad_options"),
        (ask(DISCOVER, op=2), MAC, "not_a_request"),
        (ask(DISCOVER, op=0), MAC, "not_a_request"),
        (ask(DISCOVER, htype=6), MAC, "bad_hardware"),
        (ask(DISCOVER, hlen=16), MAC, "bad_hardware"),
        (ask(DISCOVER, hlen=255), MAC, "bad_hardware"),
        (ask(DISCOVER, mac=BROADCAST_MAC), BROADCAST_MAC, "bad_hardware"),
        (ask(DISCOVER, mac=bytes(6)), bytes(6), "bad_hardware"),
        (ask(DISCOVER, mac=OTHER), MAC, "mac_mismatch"),
        (ask(DISCOVER, giaddr="192.168.64.9"), MAC, "relayed"),
        (ask(9), MAC, "bad_type"),
        (ask(0), MAC, "bad_type"),
        (ask(OFFER), MAC, "bad_type"),
        (ask(ACK), MAC, "bad_type"),
        (ask(NAK), MAC, "bad_type"),
        (ask(DISCOVER, [(50, b"\1\2\3")]), MAC, "bad_options"),
        (ask(DISCOVER, [(51, b"")]), MAC, "bad_options"),
        (ask(DISCOVER, [(54, b"\1\2\3\4\5")]), MAC, "bad_options"),
        (ask(DISCOVER, [(57, b"\1")]), MAC, "bad_options"),
        (ask(DISCOVER, [(61, b"")]), MAC, "bad_options"),
        (ask(DISCOVER, [(52, b"\4")]), MAC, "bad_options"),
        (ask(DISCOVER, [(53, b"\1")]), MAC, "bad_options"),
        (ask(DISCOVER)[:-1] + b"\x0c\xff", MAC, "bad_options"),
        (ask(DISCOVER)[:-1] + b"\x0c", MAC, "bad_options"),
    ],
)
def test_refused_messages_get_no_answer_and_are_counted_by_reason(
    segment: Segment, payload: bytes, mac: bytes, reason: str
) -> None:
    assert segment.send(payload, mac=mac) is None
    assert segment.refusals() == {reason: 1}
    assert len(segment.store) == 0


def test_an_unknown_endpoint_gets_nothing(segment: Segment) -> None:
    assert segment.ask(DISCOVER, endpoint="nobody") is None
    assert segment.refusals() == {"no_address": 1}


def test_a_full_network_says_so_by_silence() -> None:
    segment = Segment({"subnet": "192.168.64.0/30"})
    segment.add("vm1")
    assert segment.answer(DISCOVER).yiaddr == "192.168.64.2"
    assert segment.ask(DISCOVER, mac=OTHER) is None
    assert segment.refusals() == {"no_address": 1}
    # There is no other address, so declining this one changes nothing for the endpoint.
    segment.ask(DECLINE, [SERVER, (50, ip("192.168.64.2"))])
    assert segment.answer(DISCOVER).yiaddr == "192.168.64.2"
