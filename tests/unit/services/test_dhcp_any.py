"""Whatever a guest sends, there is an answer or none, in bounded memory, and never an exception."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import Segment
from .dhcp_wire import COOKIE, MAC, bootp, ip, read, tlv

ADDRESSES = st.sampled_from(
    ["0.0.0.0", "192.168.64.2", "192.168.64.3", "192.168.64.77", "10.0.0.1", "255.255.255.255"]
)
MACS = st.integers(0, 40).map(lambda number: MAC[:5] + bytes((number,)))


@st.composite
def options(draw: st.DrawFn) -> bytes:
    some = st.tuples(
        st.sampled_from([50, 51, 52, 53, 54, 55, 57, 61, 12, 81, 80, 0, 255, 43, 119]),
        st.one_of(st.binary(max_size=8), ADDRESSES.map(ip), st.binary(max_size=255)),
    )
    kinds = st.lists(st.tuples(st.just(53), st.integers(0, 10).map(lambda kind: bytes((kind,)))), max_size=1)
    area = tlv(draw(kinds) + draw(st.lists(some, max_size=8)))
    return (
        draw(st.sampled_from([COOKIE, b"", b"abcd"]))
        + area
        + draw(st.sampled_from([b"", b"\xff", b"\0\xff"]))
    )


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, bytes]:
    mac = draw(MACS)
    message = bootp(
        mac=mac,
        op=draw(st.sampled_from([1, 1, 1, 2, 0])),
        flags=draw(st.integers(0, 0xFFFF)),
        ciaddr=draw(ADDRESSES),
        giaddr=draw(st.sampled_from(["0.0.0.0", "0.0.0.0", "192.168.64.9"])),
        file=draw(st.binary(max_size=128)),
        sname=draw(st.binary(max_size=64)),
        vendor=draw(options()),
    )
    return message, draw(st.sampled_from([mac, mac, MAC]))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=700))
def test_any_bytes(data: bytes) -> None:
    segment = Segment()
    segment.add("vm1")
    segment.send(data)
    segment.send(COOKIE.join((bootp(), data)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(messages(), st.integers(0, 2), st.floats(0, 5000)), max_size=60))
def test_any_conversation(steps: list[tuple[tuple[bytes, bytes], int, float]]) -> None:
    segment = Segment()
    segment.add("vm1", MAC)
    segment.add("vm2", bytes.fromhex("020000000055"))
    for (data, mac), endpoint, wait in steps:
        segment.now += wait
        name = ("vm1", "vm2", "gone")[endpoint]
        reply = segment.send(data, name, mac)
        if reply is not None:
            said = read(reply.payload)
            assert said.op == 2
            assert said.mac == mac
            assert 300 <= len(reply.payload) <= 1472
            assert reply.dst_mac in (mac, b"\xff" * 6)
        assert len(segment.store) <= 32
        leases = segment.server.leases()
        assert len({lease.ip for lease in leases}) == len(leases), "one address, one holder"
        assert all(lease.expires > segment.now for lease in leases)
    segment.now += 1e6
    segment.server.expire(segment.now)
    assert all(lease.expires == float("inf") for lease in segment.server.leases())
