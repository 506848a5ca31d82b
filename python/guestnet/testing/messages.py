"""DHCP (RFC 2131) and DNS (RFC 1035) messages, as far as a client of one lease and one name needs them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface

DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5
_MAGIC = b"\x63\x82\x53\x63"
_BROADCAST_FLAG = 0x8000
_WANTED = bytes([1, 3, 6, 15, 26, 51, 119, 121])


@dataclass(frozen=True)
class DhcpAnswer:
    """The answer of a server."""

    kind: int
    address: IPv4Address
    options: dict[int, bytes]

    def _address(self, code: int) -> IPv4Address:
        return IPv4Address(self.options[code][:4])

    @property
    def interface(self) -> IPv4Interface:
        """The address with the prefix of option 1."""
        return IPv4Interface(f"{self.address}/{self._address(1)}")

    @property
    def router(self) -> IPv4Address:
        """Option 3."""
        return self._address(3)

    @property
    def name_server(self) -> IPv4Address | None:
        """Option 6."""
        return self._address(6) if 6 in self.options else None

    @property
    def lease_seconds(self) -> int:
        """Option 51."""
        return int(struct.unpack("!I", self.options[51])[0]) if 51 in self.options else 0

    def request(self) -> dict[int, bytes]:
        """The options of the REQUEST that takes this offer."""
        return {50: self.address.packed, 54: self.options[54]}


def dhcp_message(transaction: bytes, mac: bytes, kind: int, options: dict[int, bytes] | None = None) -> bytes:
    """A client's message. It asks for a broadcast answer, because the client has no address yet."""
    head = (
        struct.pack("!BBBB4sHH16s", 1, 1, 6, 0, transaction, 0, _BROADCAST_FLAG, b"") + mac + bytes(10 + 192)
    )
    every = {53: bytes([kind]), **(options or {}), 55: _WANTED}
    body = b"".join(struct.pack("BB", code, len(value)) + value for code, value in every.items())
    return head + _MAGIC + body + b"\xff"


def dhcp_answer(data: bytes, transaction: bytes) -> DhcpAnswer | None:
    """A server's message to this transaction, None for anything else."""
    if len(data) < 240 or data[0] != 2 or data[4:8] != transaction or data[236:240] != _MAGIC:
        return None
    options: dict[int, bytes] = {}
    at = 240
    while at + 1 < len(data) and data[at] != 255:
        if data[at] == 0:
            at += 1
            continue
        end = at + 2 + data[at + 1]
        options[data[at]] = data[at + 2 : end]
        at = end
    kind = options.get(53, b"\0")
    return DhcpAnswer(kind[0] if kind else 0, IPv4Address(data[16:20]), options)


def dns_name(name: str) -> bytes:
    """A name as labels."""
    return (
        b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.rstrip(".").split(".")) + b"\0"
    )


def dns_query(identity: int, name: str) -> bytes:
    """A query for the A records of a name."""
    return struct.pack("!HHHHHH", identity, 0x0100, 1, 0, 0, 0) + dns_name(name) + b"\0\1\0\1"


def dns_addresses(data: bytes, identity: int) -> list[IPv4Address] | None:
    """The A records of an answer (empty if there are none), None if it does not answer the query."""
    if len(data) < 12 or struct.unpack_from("!H", data)[0] != identity or not data[2] & 0x80:
        return None
    questions, answers = struct.unpack_from("!HH", data, 4)
    at = 12
    for _ in range(questions):
        at = _skip_name(data, at) + 4
    found = []
    for _ in range(answers):
        at = _skip_name(data, at)
        kind, _, _, length = struct.unpack_from("!HHIH", data, at)
        at += 10
        if kind == 1 and length == 4:
            found.append(IPv4Address(data[at : at + 4]))
        at += length
    return found


def _skip_name(data: bytes, at: int) -> int:
    while data[at]:
        if data[at] & 0xC0:
            return at + 2
        at += 1 + data[at]
    return at + 1
