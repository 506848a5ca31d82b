"""The names that are answered here and never asked of others.

- the zone: the gateway, the host, endpoints, and the user's records below it;
- the user's other records, each a zone of its own, so that no name is half ours and half somebody else's;
- an endpoint's bare name;
- the reverse zones of the subnet and of the user's addresses (RFC 1035 section 3.5, RFC 3596 section 2.5);
- names that must not be asked of anybody: localhost and invalid (RFC 6761), onion (RFC 7686), resolver.arpa,
  whose answer would be about the host's resolver and not this one (RFC 9462 section 6.4).

A lookup never follows a CNAME; who asks does that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from threading import Lock

from guestnet.errors import ConfigError
from guestnet.model.frozen_record import FrozenRecord
from guestnet.services.dns.config import DnsConfig
from guestnet.services.dns.labels import Malformed, Rcode, Type, labels_of, parents, to_labels
from guestnet.services.dns.records import OwnRecord, parse_record, record_name

RECORD_TTL = 60
GUEST_TTL = 5
"""Seconds: guests come and go, and what is not there may be there soon."""
_HOST_ALIASES = ("host.docker.internal", "host.containers.internal")
_LOCALHOST = to_labels("localhost")
_EMPTY = tuple(to_labels(name) for name in ("invalid", "onion"))
_RESOLVER = to_labels("resolver.arpa")
_ARPA = to_labels("arpa")
_ARPA4, _ARPA6 = to_labels("in-addr.arpa"), to_labels("ip6.arpa")
_LOOPBACK4 = IPv4Network("127.0.0.0/8")
_LOOPBACK = {Type.A: bytes((127, 0, 0, 1)), Type.AAAA: IPv6Address("::1").packed}
_HEX = frozenset(b"0123456789abcdef")
_ANYTHING = b"\x01*"
_OF_ZONES = (Type.NS, Type.SOA, 43, 48)
"""With DS and DNSKEY: what validating resolvers ask of a top-level domain. A guest that calls itself like one
does not answer for it."""
_RFC8482 = b"\x07RFC8482\x00"
_Names = dict[bytes, tuple[OwnRecord, ...]]


class Found(FrozenRecord, kw_only=False):
    """What is known of a name: records of the type, or why there are none. `apex`: the zone that it is in."""

    apex: bytes
    records: tuple[OwnRecord, ...] = ()
    ttl: int = RECORD_TTL
    rcode: int = Rcode.NOERROR
    serial: int = 1

    def soa(self, server: bytes) -> bytes:
        """The data of the zone's SOA record."""
        times = struct.pack("!IIIII", self.serial, 3600, 600, 86400, GUEST_TTL)
        return server + b"\x0ahostmaster" + self.apex + times


class _Content(FrozenRecord, kw_only=False):
    """The records at one time; changed by replacing it, so that it can be read from any thread."""

    names: _Names
    serial: int
    between: frozenset[bytes]
    """Names that exist only because of others below them (RFC 8020)."""
    reverse: dict[bytes, tuple[OwnRecord, ...]]
    wildcards: bool = False


class Zones:
    """The own names of one DNS server."""

    def __init__(self, config: DnsConfig) -> None:
        self._config = config
        self._zone = record_name(config.zone)
        self._lock = Lock()
        self.gateway = b"\x07gateway" + self._zone
        """The name of the server itself."""
        names: dict[bytes, list[OwnRecord]] = {}
        self._fixed = {self.gateway}
        _add(names, parse_record(f"gateway.{config.zone}", config.gateway))
        if config.gateway6 is not None:
            _add(names, parse_record(f"gateway.{config.zone}", config.gateway6))
        self._apex6 = None if config.subnet6 is None else _pointer(config.subnet6)
        # Where guests read their rules, if the owner of the network lets them.
        self._fixed.add(record_name(f"policy.{config.zone}"))
        _add(names, parse_record(f"policy.{config.zone}", config.gateway))
        if config.host is not None:
            for name in (f"host.{config.zone}", *_HOST_ALIASES):
                own = parse_record(name, config.host)
                self._fixed.add(own.name)
                _add(names, own)
        self._texts: dict[bytes, tuple[str, tuple[str, ...]]] = {}
        """The records of the network's owner as they were given, by their name as labels."""
        for name, values in config.records.items():
            self._texts[record_name(name)] = (name, tuple(map(str, values)))
            if record_name(name) in self._fixed:
                # The user's word counts more.
                names.pop(record_name(name), None)
                self._fixed.discard(record_name(name))
            for value in values:
                _add(names, parse_record(name, value))
        self._content = self._index({name: tuple(records) for name, records in names.items()}, 1)

    def add(self, name: str, value: str) -> None:
        """Adds a record. Raises ConfigError."""
        with self._lock:
            own = parse_record(name, value)
            names = {name: list(records) for name, records in self._content.names.items()}
            _add(names, own)
            done = {name: tuple(records) for name, records in names.items()}
            given, before = self._texts.get(own.name, (name, ()))
            self._texts[own.name] = (given, (*before, str(value)))
            self._content = self._index(done, self._content.serial + 1)

    def remove(self, name: str) -> bool:
        """Removes all records of a name; False when there were none."""
        with self._lock:
            key = record_name(name)
            self._texts.pop(key, None)
            if key not in self._content.names:
                return False
            left = {known: records for known, records in self._content.names.items() if known != key}
            self._content = self._index(left, self._content.serial + 1)
            return True

    def texts(self) -> dict[str, tuple[str, ...]]:
        """The records of the network's owner as they were given, by name."""
        with self._lock:
            return dict(self._texts.values())

    def _index(self, names: _Names, serial: int) -> _Content:
        between: set[bytes] = set()
        reverse: dict[bytes, tuple[OwnRecord, ...]] = {}
        tops = {self._zone} | {name[len(_ANYTHING) :] for name in names if name.startswith(_ANYTHING)}
        for name, records in names.items():
            above: list[bytes] = []
            for parent in parents(name)[1:]:
                if parent in tops:
                    # Below the zone and below what a wildcard is for, all names are ours.
                    between.update(above if parent == self._zone else (*above, parent))
                    break
                above.append(parent)
            for own in records:
                if own.address is not None and not name.startswith(_ANYTHING):
                    key = to_labels(own.address.reverse_pointer)
                    pointer = OwnRecord(key, Type.PTR, name)
                    # The server's own name is the one for its address, not an alias that a user gave it.
                    own_name = name in self._fixed and not name.endswith(to_labels("internal"))
                    if own_name or key not in reverse:
                        reverse[key] = (pointer,)
        wildcards = any(name.startswith(_ANYTHING) for name in names)
        return _Content(names, serial, frozenset(between), reverse, wildcards)

    def apexes(self) -> list[bytes]:
        """Names that, with all below them and all of one label, `find` may know something of."""
        tops = {self._zone, _LOCALHOST, *_EMPTY, _ARPA}
        return [*tops, *(name.removeprefix(_ANYTHING) for name in self._content.names)]

    def owns(self, name: str) -> bool:
        """Whether records stand for a bare name, or for that name in the zone."""
        content = self._content
        try:
            labels = to_labels(name.lower())
        except Malformed:
            return False
        in_zone = labels[:-1] + self._zone
        return any(
            key in content.names or key in content.between or self._wildcard(content, key) is not None
            for key in (labels, in_zone)
        )

    def _in_zone(self, key: bytes) -> bool:
        return key == self._zone or _below(key, self._zone)

    # --- looking up ---

    def find(self, key: bytes, type_: int) -> Found | None:  # noqa: PLR0911
        """What is known of a name in lower case; None: it is not ours, ask somebody else."""
        content = self._content
        special = self._special(key, type_)
        if special is not None:
            return special
        inside = self._in_zone(key)
        apex = self._zone if inside else key
        if (records := content.names.get(key)) is not None:
            return self._choose(apex, records, type_, content)
        guest = self._guest(key, inside) if inside or type_ not in _OF_ZONES else ()
        if guest:
            return self._choose(apex, guest, type_, content, GUEST_TTL)
        if key in content.between:
            return Found(apex, serial=content.serial)
        if content.wildcards and (synthesized := self._wildcard(content, key)) is not None:
            return self._choose(apex, synthesized, type_, content)
        if key == self._zone:
            return self._apex(key, type_, content)
        if inside:
            return Found(self._zone, rcode=Rcode.NXDOMAIN, serial=content.serial)
        return self._reverse(key, type_, content)

    def searched(self, key: bytes, found: Found) -> bytes | None:
        """The name that a stub resolver put the zone behind, as its search list says, when that made a name
        that does not exist; None when the name exists, or what is before the zone is no name of others."""
        if found.rcode != Rcode.NXDOMAIN or found.apex != self._zone or not self._in_zone(key):
            return None
        before = key[: -len(self._zone)] + b"\0"
        return before if len(labels_of(before)) > 1 and self.find(before, Type.A) is None else None

    def _choose(
        self,
        apex: bytes,
        records: tuple[OwnRecord, ...],
        type_: int,
        content: _Content,
        ttl: int = RECORD_TTL,
    ) -> Found:
        if type_ == Type.ANY:
            # RFC 8482: some record, so that nobody takes it for the end of the matter.
            records = (OwnRecord(records[0].name, Type.HINFO, _RFC8482),)
            return Found(apex, records, ttl, serial=content.serial)
        chosen = tuple(own for own in records if own.type in (type_, Type.CNAME))
        if not chosen and records[0].name == apex:
            return self._apex(apex, type_, content)
        return Found(apex, chosen, ttl, serial=content.serial)

    def _apex(self, apex: bytes, type_: int, content: _Content) -> Found:
        """The records that each zone has at its top."""
        nothing = Found(apex, serial=content.serial)
        if type_ == Type.SOA:
            return Found(apex, (OwnRecord(apex, type_, nothing.soa(self.gateway)),), serial=content.serial)
        if type_ == Type.NS:
            return Found(apex, (OwnRecord(apex, type_, self.gateway),), serial=content.serial)
        if type_ == Type.ANY:
            return Found(apex, (OwnRecord(apex, Type.HINFO, _RFC8482),), serial=content.serial)
        return nothing

    def _guest(self, key: bytes, inside: bool) -> tuple[OwnRecord, ...]:
        labels = labels_of(key)
        if inside:
            labels = labels[: len(labels) - len(labels_of(self._zone))]
        elif len(labels) != 1:
            return ()
        try:
            name = b".".join(labels).decode("ascii")
        except UnicodeDecodeError:
            return ()
        if not name:
            return ()
        # What a guest says of itself does not stand for the owner's name, however that is spelled.
        addresses = self._config.directory.addresses_named(name, told=not self.owns(name))
        kinds = {4: Type.A, 6: Type.AAAA}
        return tuple(OwnRecord(key, kinds[one.version], one.packed, one) for one in addresses)

    def _wildcard(self, content: _Content, key: bytes) -> tuple[OwnRecord, ...] | None:
        """RFC 4592: the record of the closest name above that exists."""
        for parent in parents(key)[1:]:
            records = content.names.get(_ANYTHING + parent)
            if records is not None:
                return tuple(OwnRecord(key, own.type, own.rdata, own.address) for own in records)
            if parent in content.names or parent in content.between:
                return None
        return None

    def _special(self, key: bytes, type_: int) -> Found | None:
        if key == _LOCALHOST or _below(key, _LOCALHOST):
            data = _LOOPBACK.get(Type(type_)) if type_ in _LOOPBACK else None
            return Found(_LOCALHOST, () if data is None else (OwnRecord(key, type_, data),))
        for name in _EMPTY:
            if key == name or _below(key, name):
                return Found(name, rcode=Rcode.NXDOMAIN)
        if key == _RESOLVER or _below(key, _RESOLVER):
            return Found(_RESOLVER)
        return None

    # --- addresses to names ---

    def _reverse(self, key: bytes, type_: int, content: _Content) -> Found | None:  # noqa: PLR0911
        if (records := content.reverse.get(key)) is not None:
            return self._choose(self._reverse_apex(key), records, type_, content)
        if self._apex6 is not None and (key == self._apex6 or _below(key, self._apex6)):
            return self._reverse6(key, self._apex6, type_, content)
        if not (_below(key, _ARPA4)):
            return None
        network = _reversed(key)
        if network is None:
            # More labels than an address has, or one that is no number: below an address of ours?
            above = next((parent for parent in parents(key)[1:-2] if _reversed(parent) is not None), key)
            if self._owner(_reversed(above)) is None:
                return None
            return Found(self._reverse_apex(above), rcode=Rcode.NXDOMAIN, serial=content.serial)
        owner = self._owner(network)
        if owner is None:
            return None
        apex = self._reverse_apex(key)
        if network.prefixlen < 32:
            return self._apex(key, type_, content) if key == apex else Found(apex, serial=content.serial)
        name = self._name_of(network.network_address)
        if name is None:
            return Found(apex, ttl=GUEST_TTL, rcode=Rcode.NXDOMAIN, serial=content.serial)
        return self._choose(apex, (OwnRecord(key, Type.PTR, name),), type_, content, GUEST_TTL)

    def _reverse6(self, key: bytes, apex: bytes, type_: int, content: _Content) -> Found:
        """A name below that of the IPv6 prefix (RFC 3596 section 2.5)."""
        digits = b"".join(labels_of(key)[:-2][::-1])
        if (
            any(len(label) != 1 for label in labels_of(key)[:-2])
            or not set(digits) <= _HEX
            or len(digits) > 32
        ):
            return Found(apex, rcode=Rcode.NXDOMAIN, serial=content.serial)
        if len(digits) < 32:
            return self._apex(key, type_, content) if key == apex else Found(apex, serial=content.serial)
        name = self._name_of(IPv6Address(bytes.fromhex(digits.decode("ascii"))))
        if name is None:
            return Found(apex, ttl=GUEST_TTL, rcode=Rcode.NXDOMAIN, serial=content.serial)
        return self._choose(apex, (OwnRecord(key, Type.PTR, name),), type_, content, GUEST_TTL)

    def _owner(self, network: IPv4Network | None) -> IPv4Network | None:
        owners = (_LOOPBACK4, self._config.subnet)
        return next(
            (o for o in owners if o is not None and network is not None and network.subnet_of(o)), None
        )

    def _name_of(self, address: IPv4Address | IPv6Address) -> bytes | None:
        if isinstance(address, IPv4Address) and address in _LOOPBACK4:
            return _LOCALHOST if address == IPv4Address("127.0.0.1") else None
        name = self._config.directory.name_of(address)
        try:
            return None if name is None else to_labels(f"{name}.{self._config.zone}".lower())
        except Malformed:
            return None

    def _reverse_apex(self, key: bytes) -> bytes:
        """The largest zone around a reverse name that is all ours: whole octets of the prefix."""
        if self._apex6 is not None and _below(key, self._apex6):
            return self._apex6
        owner = self._owner(_reversed(key))
        if owner is None:
            return key
        octets = (owner.prefixlen + 7) // 8
        return parents(key)[-(octets + 2) :][0]


def _below(key: bytes, zone: bytes) -> bool:
    return len(key) > len(zone) and key.endswith(zone) and zone in parents(key)


def _pointer(prefix: IPv6Network) -> bytes:
    """The name in ip6.arpa of a prefix of whole digits."""
    digits = prefix.network_address.exploded.replace(":", "")[: prefix.prefixlen // 4]
    return to_labels(".".join((*reversed(digits), "ip6.arpa")))


def _reversed(key: bytes) -> IPv4Network | None:
    """The addresses that a name in in-addr.arpa is about."""
    labels = labels_of(key)[:-2]
    if not 0 < len(labels) <= 4:
        return None
    if not all(label.isdigit() and len(label) <= 3 and int(label) <= 255 for label in labels):
        return None
    if any(len(label) > 1 and label[:1] == b"0" for label in labels):
        return None
    octets = bytes(int(label) for label in reversed(labels))
    return IPv4Network((octets.ljust(4, b"\0"), 8 * len(octets)))


def _add(names: dict[bytes, list[OwnRecord]], own: OwnRecord) -> None:
    """Adds a record to those of its name.

    Raises ConfigError for a CNAME with others (RFC 2181 section 10.1).
    """
    records: Iterable[OwnRecord] = names.get(own.name, ())
    if own in records:
        return
    if any(Type.CNAME in (own.type, other.type) for other in records):
        said = b".".join(labels_of(own.name)).decode("ascii")
        raise ConfigError(f"The DNS name {said!r} has a CNAME beside another record: leave one of them out.")
    names.setdefault(own.name, []).append(own)
