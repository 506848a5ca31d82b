"""PCP, message by message: what RFC 6887 sections 7 to 9, 11, 13 and 14 say of bytes and refusals."""

from __future__ import annotations

import pytest

from .pcp_played import (
    ADDRESS_MISMATCH,
    LONG,
    MALFORMED_OPTION,
    MALFORMED_REQUEST,
    NONCE,
    NOT_AUTHORIZED,
    OUTSIDE,
    PREFER_FAILURE,
    SCTP,
    SUCCESS,
    TCP,
    UDP,
    UNSUPP_OPCODE,
    UNSUPP_OPTION,
    UNSUPP_PROTOCOL,
    UNSUPP_VERSION,
    VM2,
    Played,
    announce,
    ask_map,
    head,
    mapped,
)


@pytest.fixture
def played() -> Played:
    return Played()


async def test_rfc6887_map_byte_for_byte(played: Played) -> None:
    played.now += 7.9  # the epoch is of whole seconds, and seven have passed
    asked = bytes.fromhex(
        "02 01 0000 00000e10 00000000000000000000ffffc0a84002"
        "000102030405060708090a0b 06 000000 0050 9c45 00000000000000000000ffff00000000"
    )
    assert await played.send(asked) == bytes.fromhex(
        "02 81 00 00 00000e10 00000007 000000000000000000000000"
        "000102030405060708090a0b 06 000000 0050 9c45 00000000000000000000ffffcb007101"
    )
    assert played.host.open_ports == {("tcp", 40005): (played.opened[0].address, 80)}


async def test_rfc6887_delete_byte_for_byte(played: Played) -> None:
    await played.map(80, protocol=UDP, external=40005, nonce=bytes(range(12)))
    asked = bytes.fromhex(
        "02 01 0000 00000000 00000000000000000000ffffc0a84002"
        "000102030405060708090a0b 11 000000 0050 0000 00000000000000000000ffff00000000"
    )
    assert await played.send(asked) == bytes.fromhex(
        "02 81 00 00 00000000 00000000 000000000000000000000000"
        "000102030405060708090a0b 11 000000 0050 0000 00000000000000000000ffff00000000"
    )
    assert not played.host.open_ports


async def test_rfc6887_announce_byte_for_byte(played: Played) -> None:
    played.now += 300
    # The requested lifetime is ignored (section 14.1.2).
    answer = await played.send(bytes.fromhex("02 00 0000 00000e10 00000000000000000000ffffc0a84002"))
    assert answer == bytes.fromhex("02 80 00 00 00000000 0000012c 000000000000000000000000")


async def test_rfc6887_reserved_fields_are_ignored(played: Played) -> None:
    asked = bytearray(ask_map(external=40001))
    asked[2:4] = b"\xff\xff"
    asked[37:40] = b"\xff\xff\xff"
    said = await played.ask(bytes(asked))
    assert (said.result, said.external, said.data[13:16]) == (SUCCESS, 40001, bytes(3))


@pytest.mark.parametrize("version", [1, 3, 255])
async def test_rfc6887_other_versions_are_told_ours(played: Played, version: int) -> None:
    said = await played.ask(head(1, 3600, version=version) + bytes(12))
    assert (said.result, said.opcode, said.lifetime) == (UNSUPP_VERSION, 1, LONG)
    # Also of a message that is shorter than any of ours.
    said = await played.ask(bytes((version, 0)))
    assert (said.result, said.opcode) == (UNSUPP_VERSION, 0)
    assert played.refusals() == {"unsupp_version": 2}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too_short"),
        (b"\x02", "too_short"),
        (b"\x02\x81" + announce()[2:], "not_a_request"),
        (b"\x00\x80\0\0" + bytes(8), "not_a_request"),
        (b"\x09\xff", "not_a_request"),
    ],
)
async def test_rfc6887_dropped_without_an_answer(played: Played, data: bytes, reason: str) -> None:
    assert await played.send(data) is None
    assert played.refusals() == {reason: 1}


@pytest.mark.parametrize(
    "data",
    [
        b"\x02\x01",
        announce()[:23],
        announce()[:-1],
        announce() + b"\0",
        head(1, 3600) + bytes(32),
        ask_map()[:-4],
        ask_map() + b"\xff",
        ask_map(options=bytes((200, 0, 0, 4, 0, 0, 0, 0)) * 130 + PREFER_FAILURE),  # 1104 bytes
    ],
)
async def test_rfc6887_malformed_requests(played: Played, data: bytes) -> None:
    answer = await played.send(data)
    said = await played.ask(data)
    assert (said.result, said.opcode, said.lifetime) == (MALFORMED_REQUEST, data[1], LONG)
    # The request itself comes back, filled up with zeros, cut at 1100 bytes; where it has the client's
    # address, the last 96 bits of that stand in the reserved field.
    whole = data[:1100].ljust(24, b"\0")
    whole += bytes(-len(whole) % 4)
    assert answer is not None
    assert answer[12:] == whole[12:]
    assert not played.opened


async def test_rfc6887_the_longest_request(played: Played) -> None:
    filled = bytes((200, 0)) + (1100 - 60 - 4).to_bytes(2, "big") + b"x" * (1100 - 60 - 4)
    assert len(ask_map(options=filled)) == 1100
    assert (await played.map(options=filled)).result == SUCCESS


async def test_rfc6887_address_mismatch(played: Played) -> None:
    """Somebody translates on the way, or a guest speaks for another."""
    said = await played.ask(ask_map(client=VM2))
    assert (said.result, said.lifetime) == (ADDRESS_MISMATCH, LONG)
    said = await played.ask(announce(VM2))
    assert said.result == ADDRESS_MISMATCH
    # All 96 bits in front are looked at (section 5).
    asked = bytearray(ask_map())
    asked[8] = 1
    assert (await played.ask(bytes(asked))).result == ADDRESS_MISMATCH
    assert not played.opened


@pytest.mark.parametrize("opcode", [2, 3, 96, 127])
async def test_rfc6887_other_opcodes(played: Played, opcode: int) -> None:
    """PEER (2) is not served."""
    said = await played.ask(head(opcode, 3600) + bytes(56))
    assert (said.result, said.opcode, said.lifetime, said.reserved) == (
        UNSUPP_OPCODE,
        opcode,
        LONG,
        bytes(12),
    )


THIRD_PARTY = bytes((1, 0, 0, 16)) + mapped(VM2)
FILTER = bytes((3, 0, 0, 20, 0, 128, 0, 0)) + mapped("198.51.100.7")


@pytest.mark.parametrize("option", [THIRD_PARTY, FILTER, bytes(4), bytes((127, 0, 0, 1, 9, 0, 0, 0))])
async def test_rfc6887_mandatory_options_that_are_not_served(played: Played, option: bytes) -> None:
    said = await played.map(options=option)
    assert (said.result, said.lifetime, said.options) == (UNSUPP_OPTION, LONG, option)
    assert not played.opened
    # A request for oneself by THIRD_PARTY is refused alike, and so is a deletion.
    said = await played.map(lifetime=0, options=option)
    assert said.result == UNSUPP_OPTION


async def test_rfc6887_optional_options_are_ignored(played: Played) -> None:
    unknown = bytes((128, 0, 0, 5)) + b"12345\0\0\0" + bytes((255, 9, 0, 0))
    said = await played.map(external=40002, options=unknown + PREFER_FAILURE + unknown)
    # What was done comes back, what was not does not (section 7.3).
    assert (said.result, said.external, said.options) == (SUCCESS, 40002, PREFER_FAILURE)
    assert (await played.ask(announce() + unknown)).result == SUCCESS


@pytest.mark.parametrize(
    "options",
    [
        bytes((2, 0, 0, 4)) + bytes(4),  # PREFER_FAILURE has no data
        PREFER_FAILURE * 2,
        bytes((200, 0, 0, 1)),  # beyond the end
        bytes((200, 0, 255, 255)) + bytes(8),
    ],
)
async def test_rfc6887_malformed_options(played: Played, options: bytes) -> None:
    said = await played.map(options=options)
    assert (said.result, said.lifetime) == (MALFORMED_OPTION, LONG)
    assert not played.opened


async def test_rfc6887_prefer_failure_is_of_map_alone(played: Played) -> None:
    assert (await played.ask(announce() + PREFER_FAILURE)).result == MALFORMED_REQUEST


@pytest.mark.parametrize(
    "values",
    [
        {"protocol": SCTP},
        {"protocol": 1},
        {"protocol": SCTP, "lifetime": 0},
        {"protocol": 0, "internal": 0},  # everything
        {"protocol": 0, "internal": 80},
        {"protocol": TCP, "internal": 0},  # all of TCP
    ],
)
async def test_rfc6887_protocols(played: Played, values: dict[str, int]) -> None:
    said = await played.map(**{"internal": 80} | values)
    assert (said.result, said.lifetime) == (UNSUPP_PROTOCOL, LONG)


async def test_rfc6887_an_error_repeats_the_request(played: Played) -> None:
    await played.map(80)
    asked = ask_map(80, nonce=b"another nonc", external=40123, address="198.51.100.7", options=PREFER_FAILURE)
    answer = await played.send(asked)
    assert answer is not None
    assert (answer[3], answer[12:24], answer[24:]) == (NOT_AUTHORIZED, bytes(12), asked[24:])


async def test_rfc6887_a_zero_nonce_is_a_nonce(played: Played) -> None:
    assert (await played.map(nonce=bytes(12))).result == SUCCESS
    assert (await played.map(nonce=NONCE)).result == NOT_AUTHORIZED
    said = await played.map(nonce=bytes(12), lifetime=0)
    assert (said.result, said.nonce, said.protocol) == (SUCCESS, bytes(12), TCP)


async def test_rfc6887_zeros_of_either_family_are_any_address(played: Played) -> None:
    asked = bytearray(ask_map(options=PREFER_FAILURE))
    asked[44:60] = bytes(16)
    assert (await played.ask(bytes(asked))).address == OUTSIDE
