"""The DNS authority of a network: what is said of its own names, and which name servers are asked for others.

Queries are read, forwarded, cached and answered by the DNS forwarder in Rust. It asks here for names that may
be the network's own; the answer is records, which it makes a message of.
"""

from __future__ import annotations

from collections.abc import Callable

from guestnet.model.frozen_record import FrozenRecord
from guestnet.services.dns.config import DnsConfig
from guestnet.services.dns.labels import Rcode, Type
from guestnet.services.dns.records import OwnRecord
from guestnet.services.dns.resolvers import Resolvers, ResolverSource
from guestnet.services.dns.zones import GUEST_TTL, Found, Zones

_LONGEST_CHAIN = 8
"""CNAMEs in a row."""

Record = tuple[bytes, int, int, bytes]
"""Name as labels, type, TTL in seconds, data."""


class Answer(FrozenRecord, kw_only=False):
    """What is said of an own name.

    Attributes:
        rcode: the response code.
        answers: records of the answer section.
        authority: records of the authority section.
        searched: the name before the search domain, where that is a name of others and the whole does not
            exist. While it cannot be resolved, this answer is a temporary failure too.
        target: the last of `answers` is an alias of this name, which is a name of others.
    """

    rcode: int
    answers: tuple[Record, ...] = ()
    authority: tuple[Record, ...] = ()
    searched: bytes | None = None
    target: bytes | None = None


_NOT_FORWARDED = Resolvers(())


class DnsServer:
    """The DNS authority of one network, `network.services.dns`. Safe to be used from any thread.

    Example:
        >>> from guestnet import NatNetwork
        >>> dns = NatNetwork().services.dns
        >>> dns.add_record("later.example", "192.0.2.6")
        >>> dns.add_record("later.example", "TXT:some text")
        >>> dns.remove_record("later.example"), dns.remove_record("later.example")
        (True, False)
    """

    def __init__(self, config: DnsConfig) -> None:
        self._zones = Zones(config)
        self._forwarding = True
        self._source = ResolverSource(config.resolvers, config.resolv_conf)
        self.changed: Callable[[], object] = lambda: None
        """Called, in any thread, when other records may make earlier answers wrong."""

    def add_record(self, name: str, value: str) -> None:
        """Adds a record. It takes effect at once.

        Args:
            name: The name; `*.example` stands for all names below `example`.
            value: An address, or `TYPE:value`.

        Raises:
            ConfigError: The name or the value is wrong.
        """
        self._zones.add(name, value)
        self.changed()

    def remove_record(self, name: str) -> bool:
        """Removes the records of a name, whether they were added or configured.

        Args:
            name: The name.

        Returns:
            Whether there were any.
        """
        removed = self._zones.remove(name)
        if removed:
            self.changed()
        return removed

    def records(self) -> dict[str, tuple[str, ...]]:
        """The records that were configured or added, and not removed.

        Returns:
            The values of each name, as they were given.
        """
        return self._zones.texts()

    def owns(self, name: str) -> bool:
        """Whether a bare name, or that name in the zone, stands for a record of the network's owner."""
        return self._zones.owns(name)

    def own_names(self) -> list[bytes]:
        """Names that `lookup` may know something of, with all below them; names of one label come besides."""
        return self._zones.apexes()

    def name_servers(self) -> Resolvers:
        """Returns the upstream name servers for all names that are not the network's own.

        Returns:
            The name servers; the same object until the configuration of the host changes.
        """
        return self._source.current() if self._forwarding else _NOT_FORWARDED

    def set_forwarding(self, on: bool) -> None:
        """Turns the forwarding of queries to upstream name servers on or off.

        Args:
            on: whether names that are not the network's own are forwarded.
        """
        self._forwarding = on

    def lookup(self, name: bytes, kind: int) -> Answer | None:
        """What is said of a name.

        Args:
            name: labels in lower case.
            kind: the type that is asked for.

        Returns:
            The answer; None when the name is not the network's own.
        """
        chain, found, last = self._follow(name, kind)
        if found is None:
            return Answer(Rcode.NOERROR, _records(chain), target=last) if chain else None
        if found.rcode == Rcode.SERVFAIL:
            return Answer(Rcode.SERVFAIL)
        authority: tuple[Record, ...] = ()
        if not found.records:
            # RFC 2308 section 3: the SOA says for how long there is nothing.
            authority = ((found.apex, Type.SOA, GUEST_TTL, found.soa(self._zones.gateway)),)
        return Answer(found.rcode, _records(chain), authority, self._zones.searched(name, found))

    def _follow(self, name: bytes, kind: int) -> tuple[list[tuple[OwnRecord, int]], Found | None, bytes]:
        """Follows own CNAMEs: the records found, the last verdict (None: not ours), and the last name."""
        chain: list[tuple[OwnRecord, int]] = []
        followed = 0
        while (found := self._zones.find(name, kind)) is not None:
            chain.extend((own, found.ttl) for own in found.records)
            alias = found.records[0] if found.records else None
            if alias is None or alias.type != Type.CNAME or kind == Type.CNAME:
                return chain, found, name
            name, followed = alias.rdata.lower(), followed + 1
            if followed > _LONGEST_CHAIN:
                return [], Found(found.apex, rcode=Rcode.SERVFAIL), name
        return chain, None, name


def _records(chain: list[tuple[OwnRecord, int]]) -> tuple[Record, ...]:
    return tuple((own.name, own.type, ttl, own.rdata) for own, ttl in chain)
