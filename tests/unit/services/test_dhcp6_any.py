"""Whatever a guest sends by DHCPv6, there is an answer or none, in bounded memory, and never an exception."""

from __future__ import annotations

from ipaddress import IPv6Address

from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import Segment6
from .dhcp6_wire import ADVERTISE, REPLY, XID, client_id, duid, ia_address, read, server_id, tlv
from .dhcp_wire import MAC

ADDRESSES = st.sampled_from(
    ["fd00:6e::2", "fd00:6e::3", "fd00:6e::77", "fd00:6e::1:0:0", "2001:db8::1", "::"]
)
MACS = st.integers(0, 40).map(lambda number: MAC[:5] + bytes((number,)))


@st.composite
def associations(draw: st.DrawFn) -> bytes:
    code = draw(st.sampled_from([3, 3, 3, 4, 25]))
    head = draw(st.binary(min_size=4, max_size=4)) + bytes(0 if code == 4 else 8)
    inner = st.one_of(
        ADDRESSES.map(ia_address),
        st.tuples(st.sampled_from([5, 13, 26]), st.binary(max_size=40)).map(lambda one: tlv(*one)),
    )
    return tlv(code, head + b"".join(draw(st.lists(inner, max_size=3))))


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, bytes]:
    mac = draw(MACS)
    other = st.tuples(
        st.sampled_from([1, 2, 3, 6, 8, 9, 13, 14, 16, 39, 250]),
        st.one_of(st.binary(max_size=12), st.binary(max_size=200)),
    ).map(lambda one: tlv(*one))
    parts = [
        draw(st.sampled_from([client_id(duid(mac)), client_id(duid(mac)), b""])),
        draw(st.sampled_from([server_id(), b"", server_id(b"other")])),
        *draw(st.lists(st.one_of(associations(), associations(), other), max_size=5)),
        draw(st.sampled_from([b"", b"", b"\0", b"\0\1\0"])),
    ]
    return bytes((draw(st.integers(0, 14)),)) + XID + b"".join(parts), mac


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=700))
def test_any_bytes(data: bytes) -> None:
    segment = Segment6()
    segment.add("vm1")
    segment.send(data)
    for kind in range(1, 12):
        segment.send(bytes((kind,)) + XID + client_id() + data)
        segment.send(bytes((kind,)) + XID + client_id() + server_id() + tlv(3, data), unicast=bool(kind & 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(messages(), st.integers(0, 2), st.booleans(), st.floats(0, 5000)), max_size=60))
def test_any_conversation(steps: list[tuple[tuple[bytes, bytes], int, bool, float]]) -> None:
    segment = Segment6()
    segment.add("vm1", MAC)
    segment.add("vm2", bytes.fromhex("020000000055"))
    for (data, mac), endpoint, unicast, wait in steps:
        segment.now += wait
        name = ("vm1", "vm2", "gone")[endpoint]
        reply = segment.send(data, name, mac, unicast=unicast)
        if reply is not None:
            said = read(reply)
            assert said.kind in (ADVERTISE, REPLY)
            assert said.xid == XID
            assert len(reply) <= 1232
            given_out = [ip for one in said.ias for ip, times in one.addresses.items() if times[1]]
            assert len(given_out) <= 1
            assert all(segment.book.owner(IPv6Address(ip)) == name for ip in given_out)
        assert len(segment.store) <= 32
        leases = segment.server.leases()
        assert len({lease.ip for lease in leases}) == len(leases), "one address, one holder"
        assert all(lease.expires > segment.now for lease in leases)
    segment.now += 1e6
    segment.server.expire(segment.now)
    assert segment.server.leases() == []
    assert all(len(segment.book.held(name)) <= 1 for name in ("vm1", "vm2"))
