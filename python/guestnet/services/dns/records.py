"""Records of the user's own: `name=address`, or `name=TYPE:value` for other types.

The types that people use are encoded here; any other one that dnspython knows (and TYPE12345 by RFC 3597) by
dnspython, which takes 50 ms to import and is imported only then.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address

from guestnet.errors import ConfigError
from guestnet.model.frozen_record import FrozenRecord
from guestnet.services.dns.labels import Malformed, Type, to_labels

_TYPED = re.compile(r"([A-Za-z][A-Za-z0-9-]*):(.*)", re.DOTALL)
_REFUSED = {"SOA", "OPT", "ANY", "AXFR", "IXFR", "TSIG", "TKEY", "RRSIG", "NSEC", "NSEC3", "DNAME"}
"""Those that a server makes itself, or that are no data."""
_NUMBER = 0xFFFF


class OwnRecord(FrozenRecord, kw_only=False):
    """A record: `name` as labels in lower case, `rdata` as bytes. `address` of A and AAAA."""

    name: bytes
    type: int
    rdata: bytes
    address: IPv4Address | IPv6Address | None = None


def record_name(name: str) -> bytes:
    """The labels of a name that was configured; the first may be `*`."""
    if not isinstance(name, str):
        raise TypeError(f"The DNS name {name!r} is not text: write one such as 'web.example'.")
    try:
        found = to_labels(name.lower())
    except Malformed:
        found = b"\0"
    if found == b"\0" or set(name) & set(' \t\r\n\\"/=') or "*" in name[1:]:
        raise ConfigError(f"The DNS name {name!r} is not a domain name: write one such as 'web.example'.")
    return found


def parse_record(name: str, value: str | IPv4Address | IPv6Address) -> OwnRecord:
    """A record from its name and value. Raises ConfigError, or TypeError for a value that is no text."""
    if not isinstance(value, str | IPv4Address | IPv6Address):
        raise TypeError(f"The value {value!r} of {name} is neither text nor an address: write '192.0.2.1'.")
    labels = record_name(name)
    typed = _TYPED.fullmatch(str(value))
    # "AAAA:2001:db8::1" is an address by itself too, but nobody means that one.
    if typed is None or typed[1].upper() not in _KNOWN:
        try:
            address = ip_address(value)
        except ValueError:
            pass
        else:
            return _address(labels, address)
    if typed is None:
        raise ConfigError(
            f"The DNS record {name}={value} has neither an address nor a type: "
            f"write {name}=192.0.2.1 or {name}=TXT:text."
        )
    kind, text = typed[1].upper(), typed[2].strip()
    try:
        if kind in _REFUSED:
            raise ValueError("the server makes that itself")
        if (known := _KNOWN.get(kind)) is not None:
            return known(labels, text)
        return _other(labels, kind, text)
    except (ValueError, Malformed) as error:
        example = _EXAMPLES.get(kind, "")
        raise ConfigError(
            f"The DNS record {name}={value} is not right ({error}): "
            + (
                f"write {name}={kind}:{example}."
                if example
                else "write it as in a zone file, or leave it out."
            )
        ) from None


def _address(name: bytes, address: IPv4Address | IPv6Address) -> OwnRecord:
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise ConfigError(f"The address {address} has a zone: a DNS record has none, leave it out.")
    return OwnRecord(name, Type.A if address.version == 4 else Type.AAAA, address.packed, address)


def _v4(name: bytes, text: str) -> OwnRecord:
    try:
        return _address(name, IPv4Address(text))
    except AddressValueError:
        raise ValueError(f"{text!r} is not an IPv4 address") from None


def _v6(name: bytes, text: str) -> OwnRecord:
    try:
        return _address(name, IPv6Address(text))
    except AddressValueError:
        raise ValueError(f"{text!r} is not an IPv6 address") from None


def _pointing(type_: Type) -> Callable[[bytes, str], OwnRecord]:
    return lambda name, text: OwnRecord(name, type_, _target(text))


def _target(text: str) -> bytes:
    if not text or set(text) & set(' \t\\"'):
        raise ValueError(f"{text!r} is not a name")
    return to_labels(text)


def _numbers(words: list[str]) -> list[int]:
    if not all(word.isascii() and word.isdigit() and int(word) <= _NUMBER for word in words):
        raise ValueError("a number is not between 0 and 65535")
    return [int(word) for word in words]


def _mx(name: bytes, text: str) -> OwnRecord:
    words = text.split()
    if len(words) != 2:
        raise ValueError("not a preference and a name")
    return OwnRecord(name, Type.MX, struct.pack("!H", *_numbers(words[:1])) + _target(words[1]))


def _srv(name: bytes, text: str) -> OwnRecord:
    words = text.split()
    if len(words) != 4:
        raise ValueError("not priority, weight, port and a name")
    return OwnRecord(name, Type.SRV, struct.pack("!HHH", *_numbers(words[:3])) + _target(words[3]))


def _txt(name: bytes, text: str) -> OwnRecord:
    if text.startswith('"'):
        return _other(name, "TXT", text)
    data = text.encode("utf-8")
    if len(data) > 4096:
        raise ValueError("over 4096 bytes")
    parts = [data[at : at + 255] for at in range(0, len(data), 255)] or [b""]
    return OwnRecord(name, Type.TXT, b"".join(bytes((len(part),)) + part for part in parts))


def _other(name: bytes, kind: str, text: str) -> OwnRecord:
    import dns.exception
    import dns.rdata
    import dns.rdataclass
    import dns.rdatatype

    try:
        type_ = dns.rdatatype.from_text(kind)
        if dns.rdatatype.is_metatype(type_):
            raise dns.rdatatype.UnknownRdatatype
        rdata = dns.rdata.from_text(dns.rdataclass.IN, type_, text, relativize=False)
        data = rdata.to_wire()
    except dns.rdatatype.UnknownRdatatype:
        raise ValueError(f"there is no record type {kind}") from None
    except (dns.exception.DNSException, ValueError):
        raise ValueError(f"its value is not written as records of the type {kind} are") from None
    if data is None or len(data) > 4096:
        raise ValueError("over 4096 bytes")
    return OwnRecord(name, int(type_), data)


_KNOWN: dict[str, Callable[[bytes, str], OwnRecord]] = {
    "A": _v4,
    "AAAA": _v6,
    "CNAME": _pointing(Type.CNAME),
    "PTR": _pointing(Type.PTR),
    "NS": _pointing(Type.NS),
    "MX": _mx,
    "SRV": _srv,
    "TXT": _txt,
}
_EXAMPLES = {
    "A": "192.0.2.1",
    "AAAA": "2001:db8::1",
    "CNAME": "other.example",
    "PTR": "web.example",
    "NS": "ns.example",
    "MX": "10 mail.example",
    "SRV": "10 5 5060 sip.example",
    "TXT": "some text",
}
