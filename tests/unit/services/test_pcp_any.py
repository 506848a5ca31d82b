"""Whatever guests send, there is an answer or none, within bounds, and never an exception."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address

from hypothesis import given, settings
from hypothesis import strategies as st

from .pcp_played import VM1, VM2, Played, ask_map, head, read

PORTS = st.one_of(st.sampled_from([0, 1, 80, 40000, 40003, 40007, 65535]), st.integers(0, 65535))
LIFETIMES = st.sampled_from([0, 0, 1, 120, 3600, 0xFFFFFFFF])
OPTIONS = st.lists(
    st.one_of(
        st.just(bytes((2, 0, 0, 0))),
        st.builds(
            lambda code, data, length: (
                bytes((code, 0)) + length.to_bytes(2, "big") + data + bytes(-len(data) % 4)
            ),
            st.integers(0, 255),
            st.binary(max_size=24),
            st.integers(0, 30),
        ),
    ),
    max_size=3,
).map(b"".join)
ADDRESSES = st.sampled_from(["0.0.0.0", "203.0.113.1", "198.51.100.7"])
NONCES = st.sampled_from([b"n" * 12, b"o" * 12])


@st.composite
def maps(draw: st.DrawFn, client: IPv4Address) -> bytes:
    return ask_map(
        draw(PORTS),
        lifetime=draw(LIFETIMES),
        protocol=draw(st.sampled_from([6, 17, 17, 0, 1, 132])),
        external=draw(PORTS),
        address=draw(ADDRESSES),
        nonce=draw(NONCES),
        client=draw(st.sampled_from([client, client, client, VM1])),
        options=draw(st.one_of(st.just(b""), OPTIONS)),
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, IPv4Address, bytes, float]:
    name, client = draw(st.sampled_from([("vm1", VM1), ("vm2", VM2), ("gone", VM2), ("vm1", VM1 + 9)]))
    pmp = st.builds(
        lambda op, a, b, life: (
            bytes((0, op, 0, 0)) + a.to_bytes(2, "big") + b.to_bytes(2, "big") + life.to_bytes(4, "big")
        ),
        st.integers(0, 3),
        PORTS,
        PORTS,
        LIFETIMES,
    )
    payload = draw(
        st.one_of(
            maps(client),
            maps(client),
            pmp,
            st.binary(max_size=80),
            st.builds(lambda data: head(1, 3600, client) + data, st.binary(max_size=60)),
        )
    )
    return name, client, payload, draw(st.sampled_from([0.0, 0.0, 1.0, 119.0, 4000.0]))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=1200))
def test_any_bytes(data: bytes) -> None:
    async def talk() -> None:
        played = Played()
        for payload in (data, b"\x02\x01" + data, b"\0" + data, head(1, 3600) + data, ask_map() + data):
            answer = await played.send(payload)
            if answer is not None and answer[0] == 2:
                read(answer)
            assert answer is None or (answer[0] == 0 and len(answer) <= 16) or answer[0] == 2

    asyncio.run(talk())


@settings(max_examples=150, deadline=None)
@given(st.lists(steps(), max_size=50), st.sets(st.integers(40000, 40009), max_size=6))
def test_any_conversation(talk: list[tuple[str, IPv4Address, bytes, float]], busy: set[int]) -> None:
    async def run() -> None:
        played = Played(40000, 40009, per_endpoint=4, most=6)
        played.host.busy = {("tcp", port) for port in busy}
        for name, source, payload, wait in talk:
            played.now += wait
            answer = await played.send(payload, name, source)
            if answer is not None and answer[0] == 2:
                read(answer)
            found = played.server.mappings()
            held = {(m.protocol, m.external_port): (m.address, m.internal_port) for m in found}
            assert len(held) == len(found), "one port, one guest"
            played.server.expire()
            assert held == played.host.open_ports, "what is listed is open, and nothing else"
            assert len(found) <= 6
            for mapping in found:
                assert 40000 <= mapping.external_port <= 40009
                assert (mapping.endpoint_id, mapping.address) in (("vm1", VM1), ("vm2", VM2))
                assert played.now < mapping.expires <= played.now + 86400
                assert sum(1 for m in found if m.endpoint_id == mapping.endpoint_id) <= 4
                companions = {m.endpoint_id for m in found if m.external_port == mapping.external_port}
                assert len(companions) == 1, "TCP and UDP of a port are of one guest"
        assert len(played.opened) - len(played.closed) == len(played.server.mappings())
        played.now += 1e6
        played.server.expire()
        assert not played.host.open_ports
        assert played.server.next_expiry() is None

    asyncio.run(run())
