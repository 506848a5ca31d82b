"""Address allocation and hardware addresses."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from guestnet.errors import ConfigError
from guestnet.model.ipam import IpAllocator, format_mac, generate_mac, parse_mac
from hypothesis import given
from hypothesis import strategies as st


def make() -> IpAllocator[IPv4Address]:
    return IpAllocator("192.168.64.2", "192.168.64.5")


def test_lowest_free_first_until_there_is_none() -> None:
    pool = make()
    assert [str(pool.allocate()) for _ in range(4)] == [f"192.168.64.{n}" for n in (2, 3, 4, 5)]
    assert pool.allocate() is None
    assert pool.available == 0
    assert pool.release("192.168.64.4")
    assert pool.release("192.168.64.3")
    assert pool.allocate() == IPv4Address("192.168.64.3")
    assert pool.available == 1


def test_specific() -> None:
    pool = make()
    assert pool.allocate_specific("192.168.64.2")
    assert not pool.allocate_specific(IPv4Address("192.168.64.2"))
    assert not pool.allocate_specific("192.168.64.6")
    assert pool.is_allocated("192.168.64.2")
    assert not pool.is_allocated("192.168.64.3")
    assert pool.allocate() == IPv4Address("192.168.64.3")
    assert pool.allocated_count == 2


def test_release_of_what_is_not_taken() -> None:
    pool = make()
    assert not pool.release("192.168.64.2")
    assert not pool.release("10.0.0.1")
    assert pool.available == 4


def test_taken_again_after_it_was_freed_and_asked_for() -> None:
    pool = make()
    first = pool.allocate()
    assert first is not None
    pool.release(first)
    assert pool.allocate_specific(first)
    assert pool.allocate() == IPv4Address("192.168.64.3")


def test_ipv6_subnet_costs_nothing() -> None:
    pool: IpAllocator[IPv6Address] = IpAllocator("fd00::2", "fd00::ffff:ffff:ffff:ffff")
    assert pool.allocate() == IPv6Address("fd00::2")
    assert pool.available == 2**64 - 3


def test_bad_ranges() -> None:
    with pytest.raises(ConfigError, match="starts after its end"):
        IpAllocator("10.0.0.2", "10.0.0.1")
    with pytest.raises(ConfigError, match="one family"):
        IpAllocator("10.0.0.2", "fd00::1")
    with pytest.raises(ConfigError, match="not an IP address"):
        IpAllocator("here", "there")


@given(st.lists(st.tuples(st.sampled_from(["any", "take", "free"]), st.integers(0, 11)), max_size=60))
def test_agrees_with_a_set(steps: list[tuple[str, int]]) -> None:
    base = int(IPv4Address("10.0.0.2"))
    pool: IpAllocator[IPv4Address] = IpAllocator("10.0.0.2", "10.0.0.11")
    taken: set[int] = set()
    for what, n in steps:
        address = IPv4Address(base + n)
        if what == "any":
            free = sorted(set(range(10)) - taken)
            assert pool.allocate() == (IPv4Address(base + free[0]) if free else None)
            taken |= set(free[:1])
        elif what == "take":
            assert pool.allocate_specific(address) == (n < 10 and n not in taken)
            taken |= {n} if n < 10 else set()
        else:
            assert pool.release(address) == (n in taken)
            taken -= {n}
        assert pool.available == 10 - len(taken)


def test_macs() -> None:
    made = {generate_mac() for _ in range(200)}
    assert len(made) == 200
    for mac in made:
        assert parse_mac(mac)[0] & 3 == 2
    assert parse_mac("2:0:5E:10:0:1") == b"\x02\x00\x5e\x10\x00\x01"
    assert format_mac(parse_mac("02-00-5e-10-00-01")) == "02:00:5e:10:00:01"


@pytest.mark.parametrize(
    "bad", ["", "02:00:5e:10:00", "zz:00:5e:10:00:01", "01:00:5e:10:00:01", bytes(6), b"x", 7]
)
def test_bad_macs(bad: object) -> None:
    with pytest.raises(ConfigError, match="MAC address"):
        parse_mac(bad)  # type: ignore[arg-type]
