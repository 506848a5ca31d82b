"""DHCPv6 messages as bytes: RFC 8415 sections 8 and 21.

Theory of operation: the parser reads everything that the server acts on, nested options included, and refuses
what is cut off, doubled or of the wrong length, with a reason. It raises nothing but `Refused6`. One thread
answers all guests, so a message is bounded in bytes, options and identity associations.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum, StrEnum
from ipaddress import IPv6Address

from guestnet.model.frozen_record import FrozenRecord

LONGEST = 1452
"""Bytes of the longest message of a client: the UDP payload of an Ethernet frame. Clients send 50 to 200."""
FOREVER = 0xFFFFFFFF
"""A time without end."""
_HEADER = 4
_OPTIONS = 64
_IAS = 8
_ADDRESSES = 4
_DUID_SHORTEST, _DUID_LONGEST = 3, 130
"""Bytes of a DUID with its type (RFC 8415 section 11.1)."""
_IA_HEADS = {3: 12, 4: 4, 25: 12}
_IA_ADDRESS = 24
_LENGTHS = {8: 2, 14: 0}


class Kind(IntEnum):
    """Types of messages."""

    SOLICIT = 1
    ADVERTISE = 2
    REQUEST = 3
    CONFIRM = 4
    RENEW = 5
    REBIND = 6
    REPLY = 7
    RELEASE = 8
    DECLINE = 9
    RECONFIGURE = 10
    INFORMATION_REQUEST = 11
    RELAY_FORW = 12
    RELAY_REPL = 13


class Option(IntEnum):
    """Codes of options."""

    CLIENT_ID = 1
    SERVER_ID = 2
    IA_NA = 3
    IA_TA = 4
    IA_ADDRESS = 5
    REQUESTED = 6
    PREFERENCE = 7
    ELAPSED = 8
    STATUS = 13
    RAPID_COMMIT = 14
    DNS_SERVERS = 23
    SEARCH_LIST = 24
    IA_PD = 25
    REFRESH_TIME = 32
    CLIENT_FQDN = 39
    SOL_MAX_RT = 82
    INF_MAX_RT = 83


class Status(IntEnum):
    """Status codes (RFC 8415 section 21.13)."""

    SUCCESS = 0
    UNSPECIFIED = 1
    NO_ADDRESSES = 2
    NO_BINDING = 3
    NOT_ON_LINK = 4
    USE_MULTICAST = 5
    NO_PREFIX = 6


class Dhcp6Refusal(StrEnum):
    """Why a message gets no answer."""

    TOO_SHORT = "too_short"
    """Not even a type and a transaction id."""
    TOO_LONG = "too_long"
    """Longer than the messages of any client."""
    RELAYED = "relayed"
    """From a relay agent: a network is one segment."""
    NOT_A_REQUEST = "not_a_request"
    """A server's message, from a guest."""
    BAD_TYPE = "bad_type"
    """A type that RFC 8415 does not have."""
    BAD_OPTIONS = "bad_options"
    """Options that are cut off, doubled, too many, or have the wrong length."""
    NO_CLIENT_ID = "no_client_id"
    """A message of this type must say which client sends it."""
    UNEXPECTED_OPTION = "unexpected_option"
    """An option that a message of this type must not have."""
    OTHER_SERVER = "other_server"
    """Meant for another server, or for none where it must name one."""
    UNICAST = "unicast"
    """Sent to the server's own address, which a message of this type must not be."""
    NOTHING_TO_CONFIRM = "nothing_to_confirm"
    """A Confirm without addresses (RFC 8415 section 18.3.3)."""


class Refused6(Exception):
    """A message that gets no answer."""

    def __init__(self, reason: Dhcp6Refusal) -> None:
        super().__init__(reason)
        self.reason = reason


class IaAddress(FrozenRecord, kw_only=False):
    """An address of an identity association. The lifetimes are in seconds."""

    ip: IPv6Address
    preferred: int = 0
    valid: int = 0

    def emit(self) -> bytes:
        """As an IA Address option."""
        value = self.ip.packed + struct.pack("!II", self.preferred, self.valid)
        return option(Option.IA_ADDRESS, value)


class IaOption(FrozenRecord, kw_only=False):
    """An identity association. `code` is IA_NA, IA_TA or IA_PD; prefixes of an IA_PD are not read."""

    code: int
    iaid: int
    addresses: tuple[IaAddress, ...] = ()

    def emit(self, *contents: bytes, renew: int = 0, rebind: int = 0) -> bytes:
        """The option with these options in it, for an answer. `renew` and `rebind` are T1 and T2."""
        head = struct.pack("!I", self.iaid)
        if self.code != Option.IA_TA:
            head += struct.pack("!II", renew, rebind)
        return option(self.code, head + b"".join(contents))


class ClientName(FrozenRecord, kw_only=False):
    """The Client FQDN option (RFC 4704)."""

    server_updates: bool
    no_updates: bool
    labels: tuple[bytes, ...]


class Message6(FrozenRecord):
    """A message of a client."""

    kind: Kind
    transaction: bytes
    client_id: bytes | None = None
    server_id: bytes | None = None
    ias: tuple[IaOption, ...] = ()
    requested: frozenset[int] = frozenset()
    rapid_commit: bool = False
    name: ClientName | None = None


def option(code: int, value: bytes) -> bytes:
    """An option as bytes."""
    return struct.pack("!HH", code, len(value)) + value


def status(code: Status) -> bytes:
    """A Status Code option."""
    return option(Option.STATUS, struct.pack("!H", code))


def emit(kind: Kind, transaction: bytes, *options: bytes) -> bytes:
    """A message as bytes."""
    return bytes((kind,)) + transaction + b"".join(options)


def parse(data: bytes) -> Message6:
    """Parses a message of a client. Raises `Refused6`."""
    if len(data) < _HEADER:
        raise Refused6(Dhcp6Refusal.TOO_SHORT)
    if len(data) > LONGEST:
        raise Refused6(Dhcp6Refusal.TOO_LONG)
    try:
        kind = Kind(data[0])
    except ValueError:
        raise Refused6(Dhcp6Refusal.BAD_TYPE) from None
    if kind in _REFUSED:
        raise Refused6(_REFUSED[kind])
    single: dict[int, bytes] = {}
    ias: list[IaOption] = []
    for code, value in _options(data[_HEADER:], _OPTIONS):
        if code in _IA_HEADS:
            ias.append(_read_ia(code, value))
        elif code in single:
            raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
        elif code in _READ:
            single[code] = value
    if len(ias) > _IAS:
        raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
    for code, length in _LENGTHS.items():
        if code in single and len(single[code]) != length:
            raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
    asked = single.get(Option.REQUESTED, b"")
    if len(asked) % 2:
        raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
    return Message6(
        kind=kind,
        transaction=data[1:_HEADER],
        client_id=_duid(single.get(Option.CLIENT_ID)),
        server_id=_duid(single.get(Option.SERVER_ID)),
        ias=tuple(ias),
        requested=frozenset(code for (code,) in struct.iter_unpack("!H", asked)),
        rapid_commit=Option.RAPID_COMMIT in single,
        name=_read_name(single.get(Option.CLIENT_FQDN)),
    )


_REFUSED = {
    Kind.RELAY_FORW: Dhcp6Refusal.RELAYED,
    Kind.RELAY_REPL: Dhcp6Refusal.RELAYED,
    Kind.ADVERTISE: Dhcp6Refusal.NOT_A_REQUEST,
    Kind.REPLY: Dhcp6Refusal.NOT_A_REQUEST,
    Kind.RECONFIGURE: Dhcp6Refusal.NOT_A_REQUEST,
}
_READ = frozenset(
    (
        Option.CLIENT_ID,
        Option.SERVER_ID,
        Option.REQUESTED,
        Option.ELAPSED,
        Option.RAPID_COMMIT,
        Option.CLIENT_FQDN,
    )
)


def _options(area: bytes, most: int) -> Iterator[tuple[int, bytes]]:
    at = count = 0
    while at < len(area):
        count += 1
        if count > most or at + 4 > len(area):
            raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
        code, length = struct.unpack_from("!HH", area, at)
        end = at + 4 + length
        if end > len(area):
            raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
        yield code, area[at + 4 : end]
        at = end


def _duid(value: bytes | None) -> bytes | None:
    if value is not None and not _DUID_SHORTEST <= len(value) <= _DUID_LONGEST:
        raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
    return value


def _read_ia(code: int, value: bytes) -> IaOption:
    head = _IA_HEADS[code]
    if len(value) < head:
        raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
    (iaid,) = struct.unpack_from("!I", value)
    found: list[IaAddress] = []
    for inner, content in _options(value[head:], _OPTIONS):
        if inner != Option.IA_ADDRESS or code == Option.IA_PD:
            continue
        if len(content) < _IA_ADDRESS or len(found) >= _ADDRESSES:
            raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
        for _ in _options(content[_IA_ADDRESS:], _OPTIONS):
            pass  # nothing of a client's is used, and it must be whole
        preferred, valid = struct.unpack_from("!II", content, 16)
        found.append(IaAddress(IPv6Address(content[:16]), preferred, valid))
    return IaOption(code, iaid, tuple(found))


def _read_name(value: bytes | None) -> ClientName | None:
    if value is None:
        return None
    if not value or len(value) > 256:
        raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
    labels: list[bytes] = []
    at = 1
    while at < len(value) and value[at]:
        end = at + 1 + value[at]
        if value[at] > 63 or end > len(value):
            raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
        labels.append(value[at + 1 : end])
        at = end
    if at + 1 < len(value):
        raise Refused6(Dhcp6Refusal.BAD_OPTIONS)
    return ClientName(bool(value[0] & 1), bool(value[0] & 4), tuple(labels))
