"""What clients get, message by message (RFC 8415 section 18.3)."""

from __future__ import annotations

import pytest
from guestnet.model.ipam import format_mac

from .conftest import Segment6
from .dhcp6_wire import (
    ADVERTISE,
    CONFIRM,
    DECLINE,
    IA_PD,
    IA_TA,
    INFORMATION,
    NO_ADDRS,
    NO_BINDING,
    NO_PREFIX,
    NOT_ON_LINK,
    REBIND,
    RECONFIGURE,
    RELEASE,
    RENEW,
    REPLY,
    REQUEST,
    SERVER_DUID,
    SOLICIT,
    USE_MULTICAST,
    XID,
    ask,
    client_id,
    duid,
    ia,
    requested,
    server_id,
    tlv,
)
from .dhcp_wire import MAC

OTHER = bytes.fromhex("020000000008")
OWN = "fd00:6e::2"
RAPID = tlv(14)
DNS, SEARCH, FQDN = 23, 24, 39


def take(segment: Segment6, **values: object) -> str:
    return segment.answer(REQUEST, client_id(), server_id(), ia(), **values).address


def test_solicit_is_offered_the_address_with_the_number_of_the_ipv4_address(segment6: Segment6) -> None:
    said = segment6.answer(SOLICIT, client_id(), ia(iaid=42))
    assert (said.kind, said.xid, said.options[1], said.options[2]) == (ADVERTISE, XID, duid(), SERVER_DUID)
    assert said.options[7] == b"\xff", "the client waits for no other server"
    assert (said.ia.iaid, said.ia.times, said.ia.addresses) == (42, (1800, 2880), {OWN: (3600, 3600)})
    assert segment6.server.leases() == []
    assert segment6.leased == []


def test_a_request_for_what_was_offered_is_a_lease(segment6: Segment6) -> None:
    segment6.answer(SOLICIT, client_id(), ia())
    said = segment6.answer(REQUEST, client_id(), server_id(), ia(OWN))
    assert (said.kind, said.address) == (REPLY, OWN)
    assert 14 not in said.options
    (lease,) = segment6.server.leases()
    assert (lease.endpoint_id, lease.mac, str(lease.ip), lease.expires) == (
        "vm1",
        format_mac(MAC),
        OWN,
        4600.0,
    )
    assert [str(one.ip) for one in segment6.leased] == [OWN]


def test_rapid_commit_is_a_lease_at_once(segment6: Segment6) -> None:
    said = segment6.answer(SOLICIT, client_id(), RAPID, ia())
    assert (said.kind, said.options[14], said.address) == (REPLY, b"", OWN)
    assert 7 not in said.options
    assert [str(one.ip) for one in segment6.server.leases()] == [OWN]


def test_rapid_commit_without_an_address_is_an_advertisement(segment6: Segment6) -> None:
    said = segment6.answer(SOLICIT, client_id(), RAPID, ia(code=IA_PD))
    assert (said.kind, said.ia.status) == (ADVERTISE, NO_PREFIX)
    assert 14 not in said.options
    assert segment6.server.leases() == []


@pytest.mark.parametrize("kind", [RENEW, REBIND])
def test_renewing_and_rebinding_lengthen_the_lease(segment6: Segment6, kind: int) -> None:
    take(segment6)
    segment6.now += 1800
    named = [server_id()] if kind == RENEW else []
    said = segment6.answer(kind, client_id(), *named, ia(OWN))
    assert (said.kind, said.address) == (REPLY, OWN)
    assert segment6.server.leases()[0].expires == segment6.now + 3600
    assert segment6.released == []


@pytest.mark.parametrize("kind", [RENEW, REBIND])
def test_a_wrong_address_is_taken_away_and_the_own_one_is_given(segment6: Segment6, kind: int) -> None:
    named = [server_id()] if kind == RENEW else []
    said = segment6.answer(kind, client_id(), *named, ia("fd00:6e::77", "2001:db8::1"))
    assert said.ia.addresses == {OWN: (3600, 3600), "fd00:6e::77": (0, 0), "2001:db8::1": (0, 0)}


def test_an_own_address_beside_a_wrong_one_is_said_once(segment6: Segment6) -> None:
    said = segment6.answer(REBIND, client_id(), ia("fd00:6e::77", OWN, "fd00:6e::77"))
    assert said.ia.addresses == {OWN: (3600, 3600), "fd00:6e::77": (0, 0)}


def test_the_address_of_another_guest_is_not_for_who_asks(segment6: Segment6) -> None:
    segment6.add("vm2", OTHER)
    theirs = "fd00:6e::3"
    assert segment6.answer(REQUEST, client_id(duid(OTHER)), server_id(), ia(theirs)).address == OWN
    assert segment6.answer(CONFIRM, client_id(), ia(theirs)).status == NOT_ON_LINK
    for kind in (RELEASE, DECLINE):
        assert segment6.answer(kind, client_id(duid(OTHER)), server_id(), ia(theirs)).ia.status == NO_BINDING
    assert [str(one.ip) for one in segment6.server.leases()] == [OWN]
    segment6.add("vm3", bytes.fromhex("020000000009"))
    said = segment6.answer(REQUEST, client_id(), server_id(), ia(), endpoint="vm3", mac=OTHER)
    assert said.ia.status == NO_ADDRS, "a MAC of another guest"


def test_clones_with_one_duid_have_addresses_of_their_own(segment6: Segment6) -> None:
    segment6.add("vm2", OTHER)
    assert take(segment6) == OWN
    assert take(segment6, endpoint="vm2", mac=OTHER) == "fd00:6e::3"


def test_another_duid_or_iaid_of_the_same_guest_has_the_same_address(segment6: Segment6) -> None:
    """A reinstalled guest is the same guest."""
    assert take(segment6) == OWN
    said = segment6.answer(REQUEST, client_id(b"\0\4" + bytes(16)), server_id(), ia(iaid=99))
    assert said.address == OWN
    assert len(segment6.server.leases()) == 1


def test_one_association_has_the_address_and_the_others_a_status(segment6: Segment6) -> None:
    asked = (ia(iaid=1), ia(OWN, iaid=2), ia(code=IA_TA, iaid=3), ia(code=IA_PD, iaid=4))
    for kind in (SOLICIT, REQUEST):
        named = [server_id()] if kind == REQUEST else []
        said = segment6.answer(kind, client_id(), *named, *asked)
        assert said.address == OWN
        assert [(one.iaid, one.status, len(one.addresses)) for one in said.ias] == [
            (1, NO_ADDRS, 0),
            (2, 0, 1),
            (3, NO_ADDRS, 0),
            (4, NO_PREFIX, 0),
        ], "the association that has the address already keeps it"


def test_two_addresses_in_one_association_are_not_both_given(segment6: Segment6) -> None:
    said = segment6.answer(REQUEST, client_id(), server_id(), ia(OWN, "fd00:6e::77"))
    assert said.ia.addresses == {OWN: (3600, 3600)}


def test_a_request_with_an_address_of_another_link_is_refused(segment6: Segment6) -> None:
    said = segment6.answer(REQUEST, client_id(), server_id(), ia("2001:db8::1"))
    assert (said.ia.status, said.ia.addresses) == (NOT_ON_LINK, {})
    assert segment6.server.leases() == []


def test_confirm(segment6: Segment6) -> None:
    assert segment6.answer(CONFIRM, client_id(), ia(OWN)).status == 0
    assert segment6.answer(CONFIRM, client_id(), ia("2001:db8::1")).status == NOT_ON_LINK
    assert segment6.answer(CONFIRM, client_id(), ia(OWN, "2001:db8::1")).status == NOT_ON_LINK
    assert segment6.ask(CONFIRM, client_id(), ia()) is None
    assert segment6.refusals() == {"nothing_to_confirm": 1}
    assert segment6.leased == []


def test_release_ends_the_lease_and_the_address_stays_the_guests(segment6: Segment6) -> None:
    take(segment6)
    said = segment6.answer(RELEASE, client_id(), server_id(), ia(OWN))
    assert (said.kind, said.status, said.ias) == (REPLY, 0, [])
    assert [str(one.ip) for one in segment6.released] == [OWN]
    assert segment6.server.leases() == []
    again = segment6.answer(RELEASE, client_id(), server_id(), ia(OWN, iaid=5), ia(code=IA_PD, iaid=6))
    assert (again.status, [(one.iaid, one.status) for one in again.ias]) == (
        0,
        [(5, NO_BINDING), (6, NO_BINDING)],
    )
    assert take(segment6) == OWN


def test_a_declined_address_is_replaced_and_comes_back_later(segment6: Segment6) -> None:
    take(segment6)
    assert segment6.answer(DECLINE, client_id(), server_id(), ia(OWN)).status == 0
    assert [str(one.ip) for one in segment6.released] == [OWN]
    other = take(segment6)
    assert other == "fd00:6e::1:0:0"
    segment6.registry.remove("vm1")
    segment6.server.remove_endpoint("vm1")
    segment6.book.remove("vm1")
    segment6.add("vm1")
    assert take(segment6) != OWN, "it is put aside"
    segment6.book.remove("vm1")
    segment6.now += 601
    assert take(segment6) == OWN


def test_a_guest_that_declines_everything_is_refused_and_others_are_not(segment6: Segment6) -> None:
    segment6.add("vm2", OTHER)
    for _ in range(4):
        held = take(segment6)
        assert segment6.answer(DECLINE, client_id(), server_id(), ia(held)).status == 0
    held = take(segment6)
    assert segment6.answer(DECLINE, client_id(), server_id(), ia(held)).status == 1
    assert segment6.refusals() == {"too_many_declined": 1}
    assert take(segment6) == held
    assert take(segment6, endpoint="vm2", mac=OTHER) == "fd00:6e::3"


def test_a_guest_that_invents_clients_has_its_share_and_others_theirs(segment6: Segment6) -> None:
    segment6.add("vm2", OTHER)
    given = set()
    for number in range(200):
        mac = bytes.fromhex("0a0000000000")[:4] + number.to_bytes(2, "big")
        said = segment6.answer(SOLICIT, client_id(duid(mac)), ia(), mac=mac)
        given |= set(said.ia.addresses)
    assert len(given) == 16
    assert len(segment6.store) == 16
    assert segment6.refusals() == {"no_address": 184}
    assert take(segment6, endpoint="vm2", mac=OTHER) == "fd00:6e::3"


def test_offers_and_leases_end(segment6: Segment6) -> None:
    behind = bytes.fromhex("0a0000000001")
    segment6.answer(SOLICIT, client_id(), ia(), mac=behind)
    take(segment6)
    segment6.now += 60
    segment6.server.expire(segment6.now)
    assert len(segment6.store) == 1
    assert segment6.released == []
    segment6.now += 3540
    segment6.server.expire(segment6.now)
    assert [str(one.ip) for one in segment6.released] == [OWN]


def test_leases_are_restored_with_their_remaining_time(segment6: Segment6) -> None:
    take(segment6)
    kept = segment6.server.leases()
    later = Segment6()
    later.now = 2000.0
    later.add("vm1")
    later.server.restore(kept)
    assert later.server.leases() == kept
    gone = Segment6()
    gone.now = 9000.0
    gone.add("vm1")
    gone.server.restore(kept)
    assert gone.server.leases() == []


def test_a_static_address_by_mac(segment6: Segment6) -> None:
    del segment6
    reserved = {format_mac(MAC): "fd00:6e::1234", format_mac(OTHER): "fd00:6e::3"}
    segment = Segment6({"reserved": reserved})
    segment.add("first", bytes.fromhex("020000000001"))
    segment.add("second", bytes.fromhex("020000000002"))
    segment.add("vm1", None)
    third = take(segment, endpoint="second", mac=bytes.fromhex("020000000002"))
    assert third == "fd00:6e::1:0:0", "the address with its number is reserved"
    assert take(segment) == "fd00:6e::1234", "also for a guest whose MAC is learned"


def test_no_guest_has_the_address_of_the_gateway(segment6: Segment6) -> None:
    del segment6
    segment = Segment6({"gateway": "192.168.64.254"})
    segment.add("vm1", ip="192.168.64.1")
    assert take(segment) == "fd00:6e::1:0:0"


def test_information_without_an_address(segment6: Segment6) -> None:
    said = segment6.answer(INFORMATION, requested(DNS, SEARCH, 32, 82, 83))
    assert said.kind == REPLY
    assert 1 not in said.options
    assert said.options[DNS] == bytes.fromhex("fd00006e" + "00" * 11 + "01")
    assert said.options[SEARCH] == b"\x08guestnet\x08internal\0"
    assert [int.from_bytes(said.options[code], "big") for code in (32, 82, 83)] == [3600, 3600, 3600]
    assert segment6.answer(INFORMATION, client_id()).options[1] == duid()
    assert segment6.leased == []


def test_only_what_is_asked_for_is_said(segment6: Segment6) -> None:
    assert set(segment6.answer(SOLICIT, client_id(), ia(), requested(DNS)).options) == {1, 2, 7, DNS}
    assert set(segment6.answer(SOLICIT, client_id(), ia()).options) == {1, 2, 7, DNS, SEARCH}


def test_options_without_room_are_left_out() -> None:
    long = ".".join(["a" * 60] * 4)
    segment = Segment6(search=tuple(f"b{number}.{long[:-10]}" for number in range(10)))
    segment.add("vm1")
    reply = segment.send(ask(SOLICIT, client_id(), ia()))
    assert reply is not None
    assert len(reply) <= 1232
    assert segment.server.counters["options_without_room"] == 1


def test_a_lease_without_end() -> None:
    segment = Segment6(lease_time=0xFFFFFFFF)
    segment.add("vm1")
    said = segment.answer(REQUEST, client_id(), server_id(), ia())
    assert (said.ia.times, said.ia.addresses) == (
        (0xFFFFFFFF, 0xFFFFFFFF),
        {OWN: (0xFFFFFFFF, 0xFFFFFFFF)},
    )
    segment.now += 1e9
    segment.server.expire(segment.now)
    assert segment.released == []


def fqdn(flags: int, labels: bytes) -> bytes:
    return tlv(FQDN, bytes((flags,)) + labels)


def test_the_name_of_a_client(segment6: Segment6) -> None:
    """RFC 4704."""
    segment6.answer(REQUEST, client_id(), server_id(), ia(), fqdn(1, b"\x03Web"), requested(FQDN))
    assert [one.hostname for one in segment6.leased] == ["web"]
    segment6.registry.note_hostname(segment6.registry.all()[0], MAC, "web")
    whole = b"\x03web\x08guestnet\x08internal\0"
    said = segment6.answer(RENEW, client_id(), server_id(), ia(), fqdn(1, whole), requested(FQDN))
    assert said.options[FQDN] == b"\x01" + whole
    said = segment6.answer(RENEW, client_id(), server_id(), ia(), fqdn(0, whole), requested(FQDN))
    assert said.options[FQDN] == b"\x03" + whole
    said = segment6.answer(RENEW, client_id(), server_id(), ia(), fqdn(0, whole))
    assert FQDN not in said.options, "it did not ask for it"


def test_a_client_that_wants_no_name_has_none(segment6: Segment6) -> None:
    said = segment6.answer(REQUEST, client_id(), server_id(), ia(), fqdn(4, b"\x03web"), requested(FQDN))
    assert [one.hostname for one in segment6.leased] == [None]
    assert said.options[FQDN] == b"\x04\x03vm1\x08guestnet\x08internal\0"


@pytest.mark.parametrize("name", [b"", b"\x04wpad", b"\x05a b c", b"\x03\xff\xfe\xfd", b"\x01-"])
def test_names_that_no_client_gets(segment6: Segment6, name: bytes) -> None:
    segment6.answer(REQUEST, client_id(), server_id(), ia(), fqdn(1, name))
    assert [one.hostname for one in segment6.leased] == [None]


@pytest.mark.parametrize("kind", [REQUEST, RENEW, RELEASE, DECLINE])
def test_unicast_is_answered_with_a_status(segment6: Segment6, kind: int) -> None:
    said = segment6.answer(kind, client_id(), server_id(), ia(OWN), unicast=True)
    assert (said.kind, said.status, set(said.options), said.ias) == (REPLY, USE_MULTICAST, {1, 2, 13}, [])
    assert segment6.leased == []


@pytest.mark.parametrize("kind", [SOLICIT, CONFIRM, REBIND, INFORMATION])
def test_unicast_of_other_types_is_dropped(segment6: Segment6, kind: int) -> None:
    association = [] if kind == INFORMATION else [ia(OWN)]
    assert segment6.ask(kind, client_id(), *association, unicast=True) is None
    assert segment6.refusals() == {"unicast": 1}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "too_short"),
        (b"\x01\x02\x03", "too_short"),
        (ask(SOLICIT, client_id(), tlv(16, bytes(1500))), "too_long"),
        (b"\x00" + XID, "bad_type"),
        (b"\x0e" + XID, "bad_type"),
        (b"\x0c\x00" + bytes(32) + tlv(9, ask(SOLICIT, client_id())), "relayed"),
        (b"\x0d\x00" + bytes(32), "relayed"),
        (ask(ADVERTISE, client_id(), server_id()), "not_a_request"),
        (ask(REPLY, client_id(), server_id()), "not_a_request"),
        (ask(RECONFIGURE, client_id(), server_id()), "not_a_request"),
        (ask(SOLICIT, ia()), "no_client_id"),
        (ask(REQUEST, server_id(), ia()), "no_client_id"),
        (ask(SOLICIT, client_id(), server_id()), "unexpected_option"),
        (ask(CONFIRM, client_id(), server_id(), ia(OWN)), "unexpected_option"),
        (ask(REBIND, client_id(), server_id(), ia(OWN)), "unexpected_option"),
        (ask(INFORMATION, client_id(), ia()), "unexpected_option"),
        (ask(REQUEST, client_id(), ia()), "other_server"),
        (ask(REQUEST, client_id(), server_id(duid(MAC)), ia()), "other_server"),
        (ask(RENEW, client_id(), ia()), "other_server"),
        (ask(INFORMATION, server_id(duid(MAC))), "other_server"),
        (ask(SOLICIT, client_id(), client_id()), "bad_options"),
        (ask(SOLICIT, client_id(), RAPID, RAPID), "bad_options"),
        (ask(SOLICIT, client_id(), tlv(14, b"x")), "bad_options"),
        (ask(SOLICIT, client_id(b"\0\1")), "bad_options"),
        (ask(SOLICIT, client_id(bytes(131))), "bad_options"),
        (ask(SOLICIT, client_id(), tlv(6, b"\0")), "bad_options"),
        (ask(SOLICIT, client_id(), tlv(8, b"\0")), "bad_options"),
        (ask(SOLICIT, client_id(), b"\0"), "bad_options"),
        (ask(SOLICIT, client_id(), b"\0\1\0\5abcd"), "bad_options"),
        (ask(SOLICIT, client_id(), tlv(3, bytes(11))), "bad_options"),
        (ask(SOLICIT, client_id(), tlv(3, bytes(12) + tlv(5, bytes(23)))), "bad_options"),
        (ask(SOLICIT, client_id(), tlv(3, bytes(12) + tlv(5, bytes(25)))), "bad_options"),
        (ask(SOLICIT, client_id(), tlv(3, bytes(12) + b"\0\5\0\x30")), "bad_options"),
        (ask(SOLICIT, client_id(), ia(*[OWN] * 5)), "bad_options"),
        (ask(SOLICIT, client_id(), *[ia()] * 9), "bad_options"),
        (ask(SOLICIT, client_id(), *[tlv(200)] * 64), "bad_options"),
        (ask(SOLICIT, client_id(), tlv(FQDN)), "bad_options"),
        (ask(SOLICIT, client_id(), fqdn(0, b"\x04abc")), "bad_options"),
        (ask(SOLICIT, client_id(), fqdn(0, b"\xc0\x0c")), "bad_options"),
        (ask(SOLICIT, client_id(), fqdn(0, b"\x01a\0\x01b")), "bad_options"),
    ],
)
def test_messages_that_get_no_answer(segment6: Segment6, message: bytes, reason: str) -> None:
    assert segment6.send(message) is None
    assert segment6.refusals() == {reason: 1}
    assert len(segment6.store) == 0


def test_a_removed_endpoint_gets_nothing(segment6: Segment6) -> None:
    take(segment6)
    segment6.server.remove_endpoint("vm1")
    segment6.registry.remove("vm1")
    segment6.book.remove("vm1")
    assert [str(one.ip) for one in segment6.released] == [OWN]
    assert segment6.answer(SOLICIT, client_id(), ia()).ia.status == NO_ADDRS
    assert segment6.book.owner(segment6.released[0].ip) is None


def test_the_book_knows_who_has_which_address(segment6: Segment6) -> None:
    take(segment6)
    behind = take(segment6, mac=bytes.fromhex("0a0000000001"))
    assert [str(one) for one in segment6.book.held("vm1")] == [OWN, behind]
    assert {segment6.book.owner(one) for one in segment6.book.held("vm1")} == {"vm1"}
