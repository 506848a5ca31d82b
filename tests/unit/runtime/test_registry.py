"""Endpoints and their addresses, without any network."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address

import pytest
from guestnet.errors import (
    AddressInUse,
    AddressPoolExhausted,
    ConfigError,
    EndpointExists,
    EndpointNotFound,
)
from guestnet.model.ipam import parse_mac
from guestnet.model.spec import NatConfig, StaticLease
from guestnet.runtime.endpoint import Endpoint
from guestnet.runtime.registry import Registry

A, B = "02:00:00:00:00:0a", "02:00:00:00:00:0b"
WEB = StaticLease(A, IPv4Address("192.168.64.10"), "web")


def ip(last: int) -> IPv4Address:
    return IPv4Address(f"192.168.64.{last}")


def registry(**values: object) -> Registry:
    return Registry(NatConfig(**values))  # type: ignore[arg-type]


def test_endpoints_begin_after_the_gateway() -> None:
    r = registry()
    assert [r.create(f"vm{n}").ip for n in (1, 2)] == [ip(2), ip(3)]
    assert len(r) == 2
    assert [e.id for e in r.all()] == ["vm1", "vm2"]
    r.remove("vm1")
    assert r.create("vm3").ip == ip(2)


def test_misuse() -> None:
    r = registry()
    r.create("vm1", mac=A)
    with pytest.raises(EndpointExists, match="'vm1'"):
        r.create("vm1")
    with pytest.raises(EndpointNotFound, match="'vm2'"):
        r.remove("vm2")
    with pytest.raises(AddressInUse, match="endpoint 'vm1'"):
        r.create("vm2", mac=A)
    with pytest.raises(AddressInUse, match="endpoint 'vm1'"):
        r.create("vm2", ip=ip(2))
    with pytest.raises(AddressInUse, match="the gateway"):
        r.create("vm2", ip=ip(1))
    for bad in ("10.0.0.1", "192.168.64.0", "192.168.64.255", "x", 5):
        with pytest.raises(ConfigError, match="ip of endpoint 'vm2'"):
            r.create("vm2", ip=bad)  # type: ignore[arg-type]
    for bad_id in ("", "a b", "x" * 64, "a/b", 5, "\u00e4"):
        with pytest.raises(ConfigError, match="endpoint id"):
            r.create(bad_id)  # type: ignore[arg-type]
    assert len(r) == 1


def test_exhausted() -> None:
    r = registry(subnet="10.0.0.0/29", host_loopback=True)
    for n in range(4):
        r.create(f"vm{n}")
    with pytest.raises(AddressPoolExhausted, match=r"10\.0\.0\.0/29"):
        r.create("more")
    with pytest.raises(AddressInUse, match="host's loopback"):
        r.create("more", ip="10.0.0.6")
    r.remove("vm0")
    assert str(r.create("more").ip) == "10.0.0.2"


def test_addresses_outside_of_the_pool_can_be_asked_for() -> None:
    r = registry(dhcp_start="192.168.64.100", dhcp_end="192.168.64.101")
    assert r.create("a").ip == ip(100)
    assert r.create("b", ip=ip(5)).ip == ip(5)
    with pytest.raises(AddressInUse):
        r.create("c", ip=ip(5))
    r.remove("b")
    assert r.create("c", ip=ip(5)).ip == ip(5)


def test_static_leases_are_kept_for_their_mac() -> None:
    r = registry(static_leases=[WEB], dhcp_start=ip(9), dhcp_end=ip(11))
    assert [r.create(n).ip for n in "ab"] == [ip(9), ip(11)]
    with pytest.raises(AddressInUse, match="static lease"):
        r.create("x", ip=ip(10))
    assert r.address_named("web") == ip(10)
    assert r.create("owner", mac=A).ip == ip(10)
    r.remove("owner")
    with pytest.raises(AddressPoolExhausted):
        r.create("x")
    assert r.create("owner", mac=A, ip=ip(10)).ip == ip(10)


def test_a_leased_address_is_not_had_by_a_second_mac() -> None:
    r = registry(static_leases=[WEB])
    r.create("thief", mac=B)
    for wanted in (None, ip(10)):
        assert r.address_for("thief", parse_mac(A), requested=wanted) is None
    owner = r.create("owner", mac=A)
    assert owner.ip == ip(10)
    assert r.address_named("web") == ip(10)
    # Nor the MAC of an endpoint that is there and silent.
    assert r.address_for("thief", parse_mac(A)) is None
    assert r.create("other", mac="02:00:00:00:00:0c").mac == "02:00:00:00:00:0c"
    assert r.address_for("thief", parse_mac("02:00:00:00:00:0c")) is None


def test_one_guest_does_not_have_all_addresses_of_a_small_subnet() -> None:
    r = registry(subnet="192.168.64.0/28")
    taken = 0
    for n in range(4):
        name, mac = f"vm{n}", f"02:00:00:00:00:{n + 1:02x}"
        r.create(name, mac=mac)  # there is one for each guest that comes
        more = [r.address_for(name, bytes((2, 0, 0, 0, n + 1, i))) for i in range(20)]
        taken += 1 + len([x for x in more if x is not None])
        assert n or taken == 7, "about half of it"
    assert taken == 13


def test_guests_of_listeners_are_named_by_lease_or_number() -> None:
    r = registry(static_leases=[WEB])
    r.create("vm1")
    web, other = r.arrive(parse_mac(A), "/run/x"), r.arrive(parse_mac(B), "/run/x")
    assert (web.id, web.ip) == ("web", ip(10))
    assert (other.id, other.ip) == ("vm2", ip(3))
    with pytest.raises(AddressInUse):
        r.arrive(parse_mac(B), "/run/x")
    # It comes again, as what it was, though another took the next number meanwhile.
    r.remove("vm2")
    third = r.arrive(parse_mac("02:00:00:00:00:0c"), "/run/x")
    assert third.id == "vm3"
    r.remove(third.id)
    assert (r.arrive(parse_mac(B), "/run/x").id, r.get("vm2").ip) == ("vm2", ip(3))  # type: ignore[union-attr]


def test_an_address_that_a_guest_brings_along_is_its_own_when_free() -> None:
    r = registry()
    assert r.arrive(parse_mac(A), "/x", seen=ip(77)).ip == ip(77)
    assert r.arrive(parse_mac(B), "/x", seen=ip(77)).ip == ip(2)


def test_a_generated_mac_gives_way_to_the_guests_own() -> None:
    r = registry(static_leases=[WEB])
    endpoint = r.create("vm")
    moved: list[tuple[Endpoint, IPv4Address]] = []
    r.moved = lambda e, old: moved.append((e, old))
    assert r.is_proposed("vm")
    assert r.address_for("vm", parse_mac(B)) == ip(2)
    assert endpoint.mac == B
    assert not r.is_proposed("vm")
    # From now on another MAC is somebody else, bridged behind it.
    assert r.address_for("vm", parse_mac("02:00:00:00:00:0c")) == ip(3)
    assert not moved
    leased = r.create("leased")
    assert r.address_for("leased", parse_mac(A)) == ip(10)
    assert leased.ip == ip(10)
    assert moved == [(leased, ip(4))]
    assert not r.address_for("nobody", parse_mac(A))


def test_addresses_behind_an_endpoint_are_bounded() -> None:
    r = registry()
    r.create("vm", mac=A)
    given = [r.address_for("vm", bytes((2, 0, 0, 0, 1, n))) for n in range(20)]
    assert len([x for x in given if x is not None]) == 15
    assert r.address_for("vm", bytes((2, 0, 0, 0, 1, 0))) == given[0]
    first = given[0]
    assert first is not None
    r.release("vm", bytes((2, 0, 0, 0, 1, 0)), first)
    assert r.address_for("vm", bytes((2, 0, 0, 0, 1, 30)), requested=ip(200)) == ip(200)
    r.remove("vm")
    assert r.create("next").ip == ip(2)


def test_guests_that_come_and_go_do_not_put_the_whole_pool_aside() -> None:
    r = registry()
    for number in range(300):
        mac = parse_mac(f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}")
        guest = r.arrive(mac, "/run/x")
        r.decline(guest.id, mac, guest.ip)
        r.remove(guest.id)
    assert len({r.create(f"other{number}").ip for number in range(180)}) == 180
    # Those that were declined last are still not given.
    before = r.arrive(parse_mac(A), "/run/x")
    declined = before.ip
    r.decline(before.id, parse_mac(A), declined)
    assert r.create("last").ip != declined


def test_declined() -> None:
    now = [0.0]
    r = Registry(NatConfig(dhcp_start="192.168.64.2", dhcp_end="192.168.64.4"), clock=lambda: now[0])
    vm = r.create("vm", mac=A)
    r.decline("vm", parse_mac(B), ip(2))
    assert vm.ip == ip(2)
    r.decline("vm", parse_mac(A), ip(2))
    assert vm.ip == ip(3)
    assert r.name_of(ip(3)) == "vm"
    assert r.name_of(ip(2)) is None
    assert r.create("b").ip == ip(4)
    with pytest.raises(AddressPoolExhausted):
        r.create("c")
    r.decline("vm", parse_mac(A), ip(3))
    assert vm.ip == ip(3), "there is no other"
    now[0] = 601.0
    assert r.create("c").ip == ip(2)


def test_a_name_that_a_guest_tells_itself_is_for_dns_alone() -> None:
    r = registry()
    liar = r.create("vm1", mac=A)
    r.note_hostname(liar, parse_mac(A), "web")
    assert r.address_named("web") == liar.ip
    assert r.address_named("web", told=False) is None, "ports published for web do not lead to it"
    owner = r.create("vm2", hostname="web")
    assert (liar.hostname, r.named("web")) == (None, owner)
    assert r.address_named("web", told=False) == owner.ip
    r.note_hostname(liar, parse_mac(A), "other")
    third = r.create("other")
    assert r.named("other") is third, "an id counts more"


def test_a_guest_does_not_name_itself_as_the_owner_has_named_something() -> None:
    r = registry(static_leases=[WEB])
    r.owned = lambda name: name == "api"
    guest = r.create("vm1", mac=A)
    host = socket.gethostname().partition(".")[0]
    r.remove(r.arrive(parse_mac(B), "/x").id)
    taken = ("api", "API", "web", "vm1", "vm2", "gateway", "host", "localhost", "wpad", "isatap", host)
    for name in taken:
        r.note_hostname(guest, parse_mac(A), name)
        assert guest.hostname is None, name
    r.note_hostname(guest, parse_mac(A), "mine")
    assert guest.hostname == "mine"
    # What the owner names later is the owner's, in any spelling, and numbers are left out that are names.
    other = r.create("MINE")
    assert (guest.hostname, r.named("mine")) == (None, other)
    r.owned = lambda name: name in ("vm3", "vm4")
    assert r.arrive(parse_mac("02:00:00:00:00:0c"), "/x").id == "vm5"


def test_names() -> None:
    r = registry(static_leases=[WEB])
    a = r.create("VM-a", hostname="alpha")
    assert (r.named("VM-a"), r.named("vm-A"), r.named("ALPHA")) == (a, a, a)
    assert r.address_named("alpha") == a.ip
    assert r.address_named("beta") is None
    with pytest.raises(EndpointExists, match="'alpha'"):
        r.create("b", hostname="Alpha")
    with pytest.raises(ConfigError, match="'a b'"):
        r.create("b", hostname="a b")
    b = r.create("b", mac=B)
    r.note_hostname(b, parse_mac(B), "alpha")
    assert b.hostname is None, "another guest has the name"
    r.note_hostname(b, parse_mac(A), "beta")
    assert b.hostname is None, "not the endpoint's own card"
    r.note_hostname(b, parse_mac(B), "be ta")
    assert b.hostname is None, "no name that DNS can have"
    r.note_hostname(b, parse_mac(B), "vm7")
    assert b.hostname is None, "that of a guest that may come yet"
    r.note_hostname(b, parse_mac(B), "Beta")
    assert r.named("beta") is b
    assert r.hostname_for("b", parse_mac(B)) == "beta"
    assert r.hostname_for("b", parse_mac(A)) is None
    assert r.hostname_for("nobody", parse_mac(A)) is None
    r.create("c_1.x", mac=A)
    assert r.hostname_for("c_1.x", parse_mac(A)) is None
    assert "b" in repr(b)


def ip6(number: int) -> IPv6Address:
    return IPv6Address("fd00::") + number


def test_ipv6_addresses_of_a_guest() -> None:
    r = registry(subnet6="fd00::/64")
    one, two = r.create("one"), r.create("two")
    assert r.note_address("one", ip6(0x99))
    assert not r.note_address("one", ip6(0x99)), "it is known"
    for other in (IPv6Address("fe80::9"), IPv6Address("2001:db8::9"), ip6(1)):
        assert not r.note_address("one", other), "outside the prefix, or the gateway's"
    assert r.addresses_named("one") == (one.ip, ip6(0x99))
    r.note_lease6("one", ip6(2))
    assert one.addresses == (one.ip, ip6(2), ip6(0x99))
    assert r.addresses_named("one") == (one.ip, ip6(2)), "a leased address is a better answer"
    assert [r.name_of(ip6(number)) for number in (2, 0x99, 3)] == ["one", "one", None]
    # Another takes an address over.
    r.note_lease6("two", ip6(0x99))
    assert (one.addresses, two.addresses) == ((one.ip, ip6(2)), (two.ip, ip6(0x99)))
    assert r.name_of(ip6(0x99)) == "two"
    r.note_lease6("one", None)
    assert one.addresses == (one.ip,)
    r.remove("two")
    assert r.name_of(ip6(0x99)) is None


def test_ipv6_addresses_of_a_guest_are_bounded() -> None:
    """Privacy addresses come and go (RFC 8981)."""
    r = registry(subnet6="fd00::/64")
    one = r.create("one")
    for number in range(2, 102):
        assert r.note_address("one", ip6(number))
    assert one.addresses == (one.ip, *(ip6(number) for number in range(101, 85, -1)))
    assert r.addresses_named("one") == (one.ip, ip6(101), ip6(100), ip6(99), ip6(98)), "the latest"
    assert r.name_of(ip6(50)) is None
    r.remove("one")
    assert r.name_of(ip6(101)) is None


def test_a_change_of_ipv6_addresses_makes_earlier_answers_wrong() -> None:
    r = registry(subnet6="fd00::/64")
    r.create("one")
    told: list[int] = []
    r.renamed = lambda: told.append(1)
    r.note_lease6("one", ip6(2))
    r.note_lease6("one", ip6(2))
    r.note_lease6("one", None)
    r.note_address("one", ip6(3))
    r.note_lease6("nobody", ip6(2))
    assert len(told) == 3


def test_a_guest_that_is_yet_to_come_has_the_addresses_of_its_lease() -> None:
    lease = StaticLease(A, None, "web", ip6(0x50))
    r = registry(subnet6="fd00::/64", static_leases=[lease])
    assert r.addresses_named("Web") == (ip6(0x50),)
    assert r.address_named("web") is None
    assert r.create("other", A).ip == ip(2), "its IPv4 address is any"
