"""Mappings: made, renewed, deleted, over, refused (RFC 6887 sections 8.5, 11, 13.2, 15; RFC 6886, 6888)."""

from __future__ import annotations

import asyncio

import pytest

from .pcp_played import (
    CANNOT_PROVIDE_EXTERNAL,
    NETWORK_FAILURE,
    NO_RESOURCES,
    NOT_AUTHORIZED,
    OUTSIDE,
    PREFER_FAILURE,
    SHORT,
    SUCCESS,
    TCP,
    UDP,
    USER_EX_QUOTA,
    VM1,
    VM2,
    Played,
    announce,
    ask_map,
    pmp,
)

OTHER = b"other nonce!"


@pytest.fixture
def played() -> Played:
    return Played()


async def test_rfc6887_create_renew_and_expire(played: Played) -> None:
    said = await played.map(80, lifetime=600)
    assert (said.result, said.lifetime, said.address, said.internal) == (SUCCESS, 600, OUTSIDE, 80)
    port = said.external
    assert 40000 <= port <= 40999
    played.now += 400.5
    # A renewal, or a request that came twice: the same port, whatever is suggested.
    said = await played.map(80, lifetime=900, external=40999, address="198.51.100.7")
    assert (said.external, said.lifetime, said.address) == (port, 900, OUTSIDE)
    assert len(played.opened) == 1
    # It is looked at when it would have ended, and then when it does.
    assert played.server.next_expiry() == 199.5
    played.now += 199.5
    played.server.expire()
    assert played.server.next_expiry() == 700.5
    played.now -= 199.5
    played.now += 899.9
    played.server.expire()
    assert played.host.open_ports
    played.now += 0.1
    assert played.server.mappings() == []
    played.server.expire()
    assert not played.host.open_ports
    assert played.closed == played.opened
    assert played.server.next_expiry() is None


async def test_rfc6887_a_renewal_may_be_for_a_shorter_time(played: Played) -> None:
    await played.map(80, lifetime=3600)
    assert (await played.map(80, lifetime=200)).lifetime == 200
    assert played.server.next_expiry() == 200
    played.now += 200
    played.server.expire()
    assert not played.host.open_ports


async def test_rfc6887_what_is_over_ends_when_anybody_asks(played: Played) -> None:
    await played.map(80, lifetime=600)
    played.now += 600
    await played.ask(announce())
    assert not played.host.open_ports


@pytest.mark.parametrize(("asked", "given"), [(1, 120), (120, 120), (86400, 86400), (0xFFFFFFFF, 86400)])
async def test_rfc6887_lifetimes_have_bounds(played: Played, asked: int, given: int) -> None:
    assert (await played.map(lifetime=asked)).lifetime == given
    played.now += 50
    assert (await played.map(lifetime=asked)).lifetime == given


async def test_rfc6887_the_nonce_is_checked(played: Played) -> None:
    port = (await played.map(80, lifetime=600)).external
    played.now += 100.5
    for lifetime in (3600, 0):
        said = await played.map(80, lifetime=lifetime, nonce=OTHER)
        # For as long as the mapping has left.
        assert (said.result, said.lifetime) == (NOT_AUTHORIZED, 500)
    assert list(played.host.open_ports) == [("tcp", port)]
    # The other protocol is another mapping.
    assert (await played.map(80, protocol=UDP, nonce=OTHER)).result == SUCCESS


async def test_rfc6887_deletion(played: Played) -> None:
    await played.map(80)
    said = await played.map(80, lifetime=0)
    assert (said.result, said.lifetime, said.internal, said.external) == (SUCCESS, 0, 80, 0)
    assert not played.host.open_ports
    # Once more, as when an answer was lost; and of what never was.
    assert (await played.map(80, lifetime=0)).result == SUCCESS
    said = await played.map(81, lifetime=0, external=7, address="198.51.100.7")
    # What was suggested is copied, and means nothing.
    assert (said.result, said.external, said.address) == (SUCCESS, 7, "198.51.100.7")


async def test_rfc6887_deletion_of_all(played: Played) -> None:
    for port in (80, 81):
        await played.map(port)
        await played.map(port, protocol=UDP)
    await played.map(80, client=VM2)
    assert (await played.map(0, lifetime=0, protocol=TCP)).result == SUCCESS
    left = [(m.endpoint_id, m.protocol, m.internal_port) for m in played.server.mappings()]
    assert left == [("vm1", "udp", 80), ("vm1", "udp", 81), ("vm2", "tcp", 80)]
    # The internal port of all protocols is ignored.
    assert (await played.map(80, lifetime=0, protocol=0)).result == SUCCESS
    assert [m.endpoint_id for m in played.server.mappings()] == ["vm2"]
    assert (await played.map(0, lifetime=0, protocol=0)).result == SUCCESS


async def test_rfc6887_deletion_of_all_keeps_those_of_another_nonce(played: Played) -> None:
    await played.map(80, nonce=OTHER, lifetime=700)
    await played.map(81)
    said = await played.map(0, lifetime=0, protocol=0)
    assert (said.result, said.lifetime) == (NOT_AUTHORIZED, 700)
    assert [m.internal_port for m in played.server.mappings()] == [80]


async def test_rfc6887_suggested_ports(played: Played) -> None:
    assert (await played.map(80, external=40077)).external == 40077
    # Taken, of nobody's range, busy on the host: another one.
    played.host.busy.add(("tcp", 40078))
    for wish in (40077, 22, 39999, 41000, 40078):
        said = await played.map(wish, external=wish)
        assert (said.result, said.address) == (SUCCESS, OUTSIDE)
        assert said.external != wish
        assert said.external in range(40000, 41000)
    # Without a wish, the guest's own number where that is free.
    assert (await played.map(40500)).external == 40500
    # The other protocol has the same port.
    assert (await played.map(80, protocol=UDP, external=40077)).external == 40077


async def test_rfc6886_the_companion_port_is_for_nobody_else(played: Played) -> None:
    await played.map(80, external=40077)
    said = await played.map(80, external=40077, protocol=UDP, client=VM2)
    assert said.external != 40077


async def test_rfc6887_prefer_failure(played: Played) -> None:
    async def strictly(internal: int, external: int, address: str = "0.0.0.0") -> tuple[int, int]:
        said = await played.map(internal, external=external, address=address, options=PREFER_FAILURE)
        return said.result, said.lifetime

    assert await strictly(80, 40077) == (SUCCESS, 3600)
    assert await strictly(80, 40077, OUTSIDE) == (SUCCESS, 3600)
    # It is somewhere else already.
    assert await strictly(80, 40078) == (CANNOT_PROVIDE_EXTERNAL, SHORT)
    assert await strictly(80, 40077, "198.51.100.7") == (CANNOT_PROVIDE_EXTERNAL, SHORT)
    # Taken, outside the range, another address, busy.
    played.host.busy.add(("tcp", 40079))
    for port, address in ((40077, OUTSIDE), (22, OUTSIDE), (40100, "198.51.100.7"), (40079, OUTSIDE)):
        assert await strictly(81, port, address) == (CANNOT_PROVIDE_EXTERNAL, SHORT)
    # Without a port, any one will do.
    assert await strictly(82, 0, OUTSIDE) == (SUCCESS, 3600)
    assert len(played.server.mappings()) == 2


async def test_rfc6887_a_guest_maps_to_itself_alone(played: Played) -> None:
    # An address that it uses but was not given, which another guest may get.
    stranger = VM1 + 100
    said = await played.ask(ask_map(client=stranger), "vm1", stranger)
    assert said.result == NOT_AUTHORIZED
    # Of an endpoint that is no more.
    assert (await played.ask(ask_map(), "gone")).result == NOT_AUTHORIZED
    # The same port of two guests is two mappings.
    one, two = await played.map(80), await played.map(80, client=VM2, nonce=OTHER)
    assert one.external != two.external
    assert set(played.host.open_ports.values()) == {(VM1, 80), (VM2, 80)}


async def test_rfc6888_req9_a_guest_has_a_share() -> None:
    played = Played(per_endpoint=3, most=6)
    for port in (1, 2, 3):
        assert (await played.map(port)).result == SUCCESS
    said = await played.map(4)
    assert (said.result, said.lifetime) == (USER_EX_QUOTA, SHORT)
    # What is there can be renewed, and what is given back had again.
    assert (await played.map(3)).result == SUCCESS
    assert (await played.map(3, lifetime=0)).result == SUCCESS
    assert (await played.map(4)).result == SUCCESS
    # The last is for a guest that has none.
    assert [(await played.map(n, client=VM2)).result for n in (1, 2, 3)] == [SUCCESS, SUCCESS, USER_EX_QUOTA]
    played.host.holders["vm3"] = {VM2 + 1}
    said = [await played.ask(ask_map(n, client=VM2 + 1), "vm3", VM2 + 1) for n in (1, 2)]
    assert [one.result for one in said] == [SUCCESS, NO_RESOURCES]


@pytest.mark.parametrize("ports", [2, 3, 10, 16])
async def test_rfc6888_req9_one_guest_does_not_have_all_ports(ports: int) -> None:
    played = Played(40000, 40000 + ports - 1)
    had = [(await played.map(n)).result for n in range(1, ports + 1)]
    assert USER_EX_QUOTA in had, "there are some left for others"
    assert had.count(SUCCESS) >= max(1, ports // 2)
    assert (await played.map(1, client=VM2)).result == SUCCESS
    # Ports of the other protocol are others.
    assert (await played.map(1, protocol=UDP)).result == SUCCESS


async def test_rfc6887_no_port_is_free() -> None:
    played = Played(40000, 40003)
    assert (await played.map(80)).result == SUCCESS
    played.host.busy |= {("tcp", port) for port in range(40000, 40004)}
    said = await played.map(81)
    assert (said.result, said.lifetime) == (NO_RESOURCES, SHORT)
    assert len(set(played.host.tried)) == len(played.host.tried), "each port is tried once"


async def test_rfc6887_the_host_refuses(played: Played) -> None:
    played.host.broken = True
    said = await played.map(80)
    assert (said.result, said.lifetime) == (NO_RESOURCES, SHORT)
    assert len(played.host.tried) == 1, "another port would not do better"
    played.host.broken = False
    assert (await played.map(80)).result == SUCCESS


async def test_rfc6887_a_busy_host_is_not_searched_without_end() -> None:
    played = Played(1024, 65535)
    played.host.busy = {("tcp", port) for port in range(65536)}
    assert (await played.map(80)).result == NO_RESOURCES
    assert len(played.host.tried) == 64


async def test_rfc6887_no_way_out(played: Played) -> None:
    played.host.address = None
    said = await played.map(80)
    assert (said.result, said.lifetime) == (NETWORK_FAILURE, SHORT)
    assert (await played.map(80, lifetime=0)).result == SUCCESS
    assert (await played.ask(announce())).result == SUCCESS


async def test_rfc6887_the_epoch_begins_again_with_another_address(played: Played) -> None:
    played.now += 1000
    assert (await played.map(80)).epoch == 1000
    played.host.address = "198.51.100.9"
    said = await played.map(80)
    assert (said.epoch, said.address) == (0, "198.51.100.9")
    played.now += 5
    assert (await played.ask(announce())).epoch == 5
    # And with the server.
    played.server.stop()
    assert not played.host.open_ports
    played.server.start(played.host)
    assert (await played.ask(announce())).epoch == 0


async def test_rfc6888_req9_a_port_rests(played: Played) -> None:
    await played.map(80, external=40077)
    await played.map(80, lifetime=0)
    # For others, of either protocol, it rests; the guest itself has it again at once.
    assert (await played.map(80, external=40077, client=VM2)).external != 40077
    assert (await played.map(81, external=40077, client=VM2, protocol=UDP)).external != 40077
    assert (await played.map(82, external=40077)).external == 40077
    await played.map(82, lifetime=0)
    played.now += 119
    assert (await played.map(83, external=40077, client=VM2)).external != 40077
    played.now += 1
    assert (await played.map(84, external=40077, client=VM2)).external == 40077


async def test_rfc6888_req9_rest_is_shorter_where_nothing_else_is_left() -> None:
    played = Played(40000, 40001)
    for external in (40001, 40000):
        await played.map(80, external=external)
        await played.map(80, lifetime=0)
        played.now += 10
    assert (await played.map(81, external=40000, client=VM2, options=PREFER_FAILURE)).result == (
        CANNOT_PROVIDE_EXTERNAL
    )
    # The one that has rested longest.
    said = await played.map(80, client=VM2)
    assert (said.result, said.external) == (SUCCESS, 40001)


async def test_mappings_end_with_the_endpoint_and_the_address(played: Played) -> None:
    played.host.holders["vm1"].add(VM1 + 50)
    await played.map(80)
    await played.ask(ask_map(80, client=VM1 + 50), "vm1", VM1 + 50)
    await played.map(80, client=VM2)
    played.server.remove_address(VM1 + 50)
    assert [m.address for m in played.server.mappings()] == [VM1, VM2]
    played.server.remove_endpoint("vm1")
    assert [m.address for m in played.server.mappings()] == [VM2]
    assert set(played.host.open_ports.values()) == {(VM2, 80)}
    assert [m.endpoint_id for m in played.closed] == ["vm1", "vm1"]


@pytest.mark.parametrize("ends", ["endpoint", "address", "stop"])
async def test_a_guest_that_goes_while_it_is_served_leaves_nothing(played: Played, ends: str) -> None:
    played.host.gate = asyncio.Event()
    task = asyncio.create_task(played.send(ask_map(80)))
    await played.host.waits.wait()
    if ends == "endpoint":
        played.server.remove_endpoint("vm1")
    elif ends == "address":
        played.server.remove_address(VM1)
    else:
        played.server.stop()
    played.host.gate.set()
    assert await task is None
    assert not played.host.open_ports
    assert not played.server.mappings()
    assert played.refusals() == {"guest_gone": 1}


async def test_a_request_that_comes_twice_opens_one_port(played: Played) -> None:
    played.host.gate = asyncio.Event()
    tasks = [asyncio.create_task(played.ask(ask_map(80))) for _ in range(3)]
    tasks.append(asyncio.create_task(played.ask(ask_map(80, client=VM2, nonce=OTHER), "vm2", VM2)))
    await played.host.waits.wait()
    played.host.gate.set()
    said = await asyncio.gather(*tasks)
    assert len({one.external for one in said[:3]}) == 1
    assert {one.result for one in said} == {SUCCESS}
    assert len(played.host.open_ports) == 2


async def test_a_port_that_the_owner_takes_back(played: Played) -> None:
    port = (await played.map(80)).external
    played.host.drop(("tcp", port))
    played.server.closed(played.opened[0].handle)
    assert played.closed == played.opened
    assert not played.server.mappings()
    assert (await played.map(80)).result == SUCCESS


# --- NAT-PMP, on the same port for older clients ---


async def test_rfc6886_external_address(played: Played) -> None:
    played.now += 258
    assert await played.send(b"\0\0") == bytes.fromhex("00 80 0000 00000102 cb007101")
    played.host.address = None
    assert await played.send(b"\0\0") == bytes.fromhex("00 80 0003 00000102 00000000")


@pytest.mark.parametrize(("opcode", "protocol"), [(1, "udp"), (2, "tcp")])
async def test_rfc6886_map_renew_and_delete(played: Played, opcode: int, protocol: str) -> None:
    op = f"{opcode:02x}"
    asked = bytes.fromhex(f"00 {op} 0000 1f90 9c45 00001c20")
    assert await played.send(asked) == bytes.fromhex(f"00 8{opcode} 0000 00000000 1f90 9c45 00001c20")
    assert played.host.open_ports == {(protocol, 40005): (VM1, 8080)}
    played.now += 16
    answer = await played.send(bytes.fromhex(f"00 {op} 0000 1f90 0000 00000001"))
    assert answer == bytes.fromhex(f"00 8{opcode} 0000 00000010 1f90 9c45 00000078")
    answer = await played.send(bytes.fromhex(f"00 {op} 0000 1f90 9c45 00000000"))
    assert answer == bytes.fromhex(f"00 8{opcode} 0000 00000010 1f90 0000 00000000")
    assert not played.host.open_ports
    # Of what is not there, too.
    assert await played.send(asked[:-4] + bytes(4)) == answer


async def test_rfc6886_deletion_of_all(played: Played) -> None:
    for port in (80, 81):
        await played.send(pmp(1, port, 0, 3600))
        await played.send(pmp(2, port, 0, 3600))
    assert await played.send(pmp(2, 0, 0, 0)) == bytes.fromhex("00 82 0000 00000000 0000 0000 00000000")
    assert [m.protocol for m in played.server.mappings()] == ["udp", "udp"]


async def test_rfc6886_refusals(played: Played) -> None:
    async def result(payload: bytes) -> int:
        answer = await played.send(payload)
        assert answer is not None
        return int.from_bytes(answer[2:4], "big")

    assert await played.send(bytes((0, 77))) == bytes.fromhex("00 cd 0005 00000000")
    assert await result(pmp(2, 0, 0, 3600)) == 2  # all ports
    played.host.broken = True
    assert await result(pmp(2, 80, 0, 3600)) == 4
    assert await played.send(pmp(2, 80, 40001, 3600)) == bytes.fromhex(
        "00 82 0004 00000000 0050 0000 00000000"
    )
    played.host.broken = False
    played.host.address = None
    assert await result(pmp(2, 80, 0, 3600)) == 3
    # As long as they are to be, or nothing.
    for payload in (b"\0\0\0", b"\0\x01", pmp(1, 80, 0, 3600)[:-1], pmp(2, 80, 0, 3600) + b"\0"):
        assert await played.send(payload) is None
    assert played.refusals()["malformed_request"] == 4


async def test_mappings_of_one_protocol_are_not_the_other_s(played: Played) -> None:
    """A PCP mapping has a nonce that its client alone knows; one of NAT-PMP has none."""
    await played.map(80)
    for payload in (pmp(2, 80, 0, 3600), pmp(2, 80, 0, 0), pmp(2, 0, 0, 0)):
        answer = await played.send(payload)
        assert answer is not None
        assert answer[3] == 2
    await played.send(pmp(2, 81, 0, 3600))
    assert (await played.map(81)).result == NOT_AUTHORIZED
    assert (await played.map(81, lifetime=0, nonce=bytes(12))).result == NOT_AUTHORIZED
    assert len(played.server.mappings()) == 2
