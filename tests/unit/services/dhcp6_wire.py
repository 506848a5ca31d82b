"""A DHCPv6 client's side of the wire, written apart from the server's, by the tables of RFC 8415."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv6Address

from .dhcp_wire import MAC

SOLICIT, ADVERTISE, REQUEST, CONFIRM, RENEW, REBIND, REPLY = range(1, 8)
RELEASE, DECLINE, RECONFIGURE, INFORMATION = range(8, 12)
NO_ADDRS, NO_BINDING, NOT_ON_LINK, USE_MULTICAST, NO_PREFIX = range(2, 7)
IA_NA, IA_TA, IA_PD = 3, 4, 25
GATEWAY_MAC = bytes.fromhex("02676ea84001")
SERVER_DUID = bytes.fromhex("00030001") + GATEWAY_MAC
XID = bytes.fromhex("a1b2c3")


def duid(mac: bytes = MAC) -> bytes:
    """DUID-LL."""
    return bytes.fromhex("00030001") + mac


def tlv(code: int, value: bytes = b"") -> bytes:
    return code.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value


def client_id(value: bytes | None = None) -> bytes:
    return tlv(1, duid() if value is None else value)


def server_id(value: bytes = SERVER_DUID) -> bytes:
    return tlv(2, value)


def ia_address(ip: str, preferred: int = 0, valid: int = 0) -> bytes:
    times = preferred.to_bytes(4, "big") + valid.to_bytes(4, "big")
    return tlv(5, IPv6Address(ip).packed + times)


def ia(*addresses: str, code: int = IA_NA, iaid: int = 7) -> bytes:
    head = iaid.to_bytes(4, "big") + bytes(0 if code == IA_TA else 8)
    return tlv(code, head + b"".join(map(ia_address, addresses)))


def requested(*codes: int) -> bytes:
    return tlv(6, b"".join(code.to_bytes(2, "big") for code in codes))


def ask(kind: int, *options: bytes, xid: bytes = XID) -> bytes:
    return bytes((kind,)) + xid + b"".join(options)


@dataclass
class SaidIa:
    code: int
    iaid: int
    times: tuple[int, int] = (0, 0)
    addresses: dict[str, tuple[int, int]] = field(default_factory=dict)
    status: int = 0


@dataclass
class Said6:
    """An answer."""

    kind: int
    xid: bytes
    options: dict[int, bytes] = field(default_factory=dict)
    ias: list[SaidIa] = field(default_factory=list)

    @property
    def status(self) -> int:
        return int.from_bytes(self.options[13][:2], "big")

    @property
    def ia(self) -> SaidIa:
        (one,) = self.ias
        return one

    @property
    def address(self) -> str:
        """The only address that is given."""
        (one,) = (ip for said in self.ias for ip, (_, valid) in said.addresses.items() if valid)
        return one


def _walk(area: bytes) -> list[tuple[int, bytes]]:
    found = []
    at = 0
    while at < len(area):
        code, length = int.from_bytes(area[at : at + 2], "big"), int.from_bytes(area[at + 2 : at + 4], "big")
        assert at + 4 + length <= len(area), "an option beyond the end"
        found.append((code, area[at + 4 : at + 4 + length]))
        at += 4 + length
    return found


def read(data: bytes) -> Said6:
    said = Said6(data[0], data[1:4])
    for code, value in _walk(data[4:]):
        if code not in (IA_NA, IA_TA, IA_PD):
            assert code not in said.options, f"option {code} twice"
            said.options[code] = value
            continue
        head = 4 if code == IA_TA else 12
        one = SaidIa(code, int.from_bytes(value[:4], "big"))
        if head == 12:
            one.times = int.from_bytes(value[4:8], "big"), int.from_bytes(value[8:12], "big")
        for inner, content in _walk(value[head:]):
            if inner == 5:
                ip = str(IPv6Address(content[:16]))
                assert ip not in one.addresses
                times = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
                assert times[0] <= times[1], "preferred for longer than valid"
                one.addresses[ip] = times
            elif inner == 13:
                one.status = int.from_bytes(content[:2], "big")
        said.ias.append(one)
    return said
