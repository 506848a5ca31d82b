"""PCP messages as bytes: RFC 6887 sections 7, 11.1 and 13.

Theory of operation: a request has 1100 bytes at most, and each byte is read once, so nothing else has to be
bounded. The parser raises nothing but `PcpError`, which becomes the answer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

VERSION = 2
LONGEST = 1100
HEADER = struct.Struct("!BBHI16s")
"""Of a request: version, opcode, reserved, lifetime in seconds, the client's address."""
_ANSWER = struct.Struct("!BBBBII")
"""Of an answer: version, opcode, reserved, result, lifetime and epoch in seconds; 96 bits follow."""
MAP = struct.Struct("!12sB3xHH16s")
"""Nonce, protocol, internal port, external port, external address."""
_OPTION = struct.Struct("!BxH")
ANSWER_BIT = 0x80
_MAPPED = bytes(10) + b"\xff\xff"
"""The prefix of an IPv4 address in a field for IPv6 addresses (RFC 4291 section 2.5.5.2)."""
_OPTIONAL_FROM = 128
"""Options with this code or a higher one may be ignored (RFC 6887 section 7.3)."""
_PREFER_FAILURE = 2


class Opcode(IntEnum):
    """The opcode of a request."""

    ANNOUNCE = 0
    MAP = 1
    PEER = 2


class Result(IntEnum):
    """RFC 6887 section 7.4."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    MALFORMED_REQUEST = 3
    UNSUPP_OPCODE = 4
    UNSUPP_OPTION = 5
    MALFORMED_OPTION = 6
    NETWORK_FAILURE = 7
    NO_RESOURCES = 8
    UNSUPP_PROTOCOL = 9
    USER_EX_QUOTA = 10
    CANNOT_PROVIDE_EXTERNAL = 11
    ADDRESS_MISMATCH = 12
    EXCESSIVE_REMOTE_PEERS = 13


_SHORT, _LONG = 30, 1800
"""Lifetimes of errors in seconds (RFC 6887 section 7.4)."""
_PASSES = frozenset(
    (Result.NETWORK_FAILURE, Result.NO_RESOURCES, Result.USER_EX_QUOTA, Result.CANNOT_PROVIDE_EXTERNAL)
)
_UNREAD = frozenset((Result.UNSUPP_VERSION, Result.MALFORMED_REQUEST, Result.MALFORMED_OPTION))
"""Results for requests that could not be parsed: their answers copy the fields that are zero elsewhere."""


class PcpError(Exception):
    """A request cannot be granted. `lifetime` says for how many seconds this is so, if that is known."""

    def __init__(self, result: Result, lifetime: int | None = None) -> None:
        super().__init__(result.name)
        self.result = result
        self.lifetime = lifetime if lifetime is not None else _SHORT if result in _PASSES else _LONG


@dataclass(frozen=True)
class MapRequest:
    """A MAP request. `lifetime` is in seconds, 0 deletes. `external` None stands for any address."""

    nonce: bytes
    protocol: int
    internal_port: int
    external_port: int
    external: IPv4Address | IPv6Address | None
    lifetime: int
    prefer_failure: bool = False


def read(payload: bytes, source: IPv4Address) -> MapRequest | None:
    """Parses a request of version 2 that came from `source`: MAP, or None for ANNOUNCE. Raises PcpError."""
    if not HEADER.size <= len(payload) <= LONGEST or len(payload) % 4:
        raise PcpError(Result.MALFORMED_REQUEST)
    _version, opcode, _reserved, lifetime, client = HEADER.unpack_from(payload)
    if client != _MAPPED + source.packed:
        raise PcpError(Result.ADDRESS_MISMATCH)
    if opcode == Opcode.ANNOUNCE:
        if _options(payload, HEADER.size):
            raise PcpError(Result.MALFORMED_REQUEST)  # this option belongs to MAP
        return None
    if opcode != Opcode.MAP:
        raise PcpError(Result.UNSUPP_OPCODE)
    if len(payload) < HEADER.size + MAP.size:
        raise PcpError(Result.MALFORMED_REQUEST)
    nonce, protocol, internal_port, external_port, address = MAP.unpack_from(payload, HEADER.size)
    prefer_failure = _options(payload, HEADER.size + MAP.size)
    return MapRequest(
        nonce, protocol, internal_port, external_port, _address(address), lifetime, prefer_failure
    )


def _options(payload: bytes, at: int) -> bool:
    """Parses the options. Returns whether PREFER_FAILURE is among them, the only option that is served."""
    found = False
    while at < len(payload):
        code, length = _OPTION.unpack_from(payload, at)
        at += _OPTION.size + length + -length % 4
        if at > len(payload):
            raise PcpError(Result.MALFORMED_OPTION)
        if code == _PREFER_FAILURE:
            if length or found:
                raise PcpError(Result.MALFORMED_OPTION)
            found = True
        elif code < _OPTIONAL_FROM:
            # THIRD_PARTY too: a guest opens ports for itself only.
            raise PcpError(Result.UNSUPP_OPTION)
    return found


def _address(packed: bytes) -> IPv4Address | IPv6Address | None:
    """The suggested address, None if any will do (section 5: zeros of either family)."""
    if not any(packed) or packed == _MAPPED + bytes(4):
        return None
    return IPv4Address(packed[12:]) if packed.startswith(_MAPPED) else IPv6Address(packed)


def answer_announce(epoch: int) -> bytes:
    """The answer to ANNOUNCE (section 14.1)."""
    return _ANSWER.pack(VERSION, ANSWER_BIT | Opcode.ANNOUNCE, 0, Result.SUCCESS, 0, epoch) + bytes(12)


def answer_map(
    asked: MapRequest, external_port: int, external: IPv4Address, lifetime: int, epoch: int
) -> bytes:
    """The answer that a mapping exists, for `lifetime` seconds from now."""
    head = _ANSWER.pack(VERSION, ANSWER_BIT | Opcode.MAP, 0, Result.SUCCESS, lifetime, epoch) + bytes(12)
    address = _MAPPED + external.packed
    data = MAP.pack(asked.nonce, asked.protocol, asked.internal_port, external_port, address)
    return head + data + (_OPTION.pack(_PREFER_FAILURE, 0) if asked.prefer_failure else b"")


def answer_delete(payload: bytes, epoch: int) -> bytes:
    """The answer that a mapping does not exist (any more). The suggestion is copied (section 15)."""
    head = _ANSWER.pack(VERSION, ANSWER_BIT | Opcode.MAP, 0, Result.SUCCESS, 0, epoch) + bytes(12)
    return head + payload[HEADER.size : HEADER.size + MAP.size]


def answer_error(payload: bytes, error: PcpError, epoch: int) -> bytes:
    """The answer that it cannot be: the request itself with another header (section 8.2)."""
    copy = payload[:LONGEST]
    copy = copy.ljust(max(HEADER.size, len(copy) + -len(copy) % 4), b"\0")
    head = _ANSWER.pack(VERSION, ANSWER_BIT | copy[1], 0, error.result, error.lifetime, epoch)
    reserved = copy[_ANSWER.size : HEADER.size] if error.result in _UNREAD else bytes(12)
    return head + reserved + copy[HEADER.size :]
