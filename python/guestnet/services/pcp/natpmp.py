"""NAT-PMP messages as bytes: RFC 6886 section 3. Version 0 of what PCP is version 2 of, on the same port."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address

VERSION = 0
_HEAD = struct.Struct("!BBHI")
"""Of an answer: version, opcode, result, seconds since the epoch."""
_MAP_REQUEST = struct.Struct("!BBxxHHI")
"""Version, opcode, internal port, external port, lifetime in seconds."""
_MAP_ANSWER = struct.Struct("!HHI")
_ANSWER_BIT = 128
_ADDRESS, _UDP, _TCP = 0, 1, 2
_ADDRESS_REQUEST = 2
"""Bytes."""


class PmpResult(IntEnum):
    """RFC 6886 section 3.5."""

    SUCCESS = 0
    UNSUPPORTED_VERSION = 1
    NOT_AUTHORIZED = 2
    NETWORK_FAILURE = 3
    OUT_OF_RESOURCES = 4
    UNSUPPORTED_OPCODE = 5


class UnsupportedOpcode(Exception):
    """An opcode that RFC 6886 does not have."""


class WrongLength(Exception):
    """Not as long as a request with its opcode is: dropped."""


@dataclass(frozen=True)
class PmpRequest:
    """A request for a mapping. `lifetime` in seconds, 0 deletes; `internal_port` 0 means all then."""

    protocol: str
    internal_port: int
    external_port: int
    lifetime: int


def read(payload: bytes) -> PmpRequest | None:
    """A request of at least two bytes; None asks for the external address."""
    opcode = payload[1]
    if opcode == _ADDRESS:
        if len(payload) != _ADDRESS_REQUEST:
            raise WrongLength
        return None
    if opcode not in (_UDP, _TCP):
        raise UnsupportedOpcode
    if len(payload) != _MAP_REQUEST.size:
        raise WrongLength
    _version, _opcode, internal_port, external_port, lifetime = _MAP_REQUEST.unpack(payload)
    return PmpRequest("udp" if opcode == _UDP else "tcp", internal_port, external_port, lifetime)


def answer_address(result: PmpResult, external: IPv4Address | None, epoch: int) -> bytes:
    """The external address; zero where the result is an error."""
    packed = bytes(4) if external is None else external.packed
    return _HEAD.pack(VERSION, _ANSWER_BIT | _ADDRESS, result, epoch) + packed


def answer_map(asked: PmpRequest, result: PmpResult, external_port: int, lifetime: int, epoch: int) -> bytes:
    """What became of a request for a mapping."""
    opcode = _ANSWER_BIT | (_UDP if asked.protocol == "udp" else _TCP)
    head = _HEAD.pack(VERSION, opcode, result, epoch)
    return head + _MAP_ANSWER.pack(asked.internal_port, external_port, lifetime)


def answer_opcode(opcode: int, epoch: int) -> bytes:
    """The opcode is not one."""
    return _HEAD.pack(VERSION, _ANSWER_BIT | opcode, PmpResult.UNSUPPORTED_OPCODE, epoch)
