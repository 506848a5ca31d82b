"""Which guest has which IPv6 addresses: those that it took by DHCPv6, and those that it was seen to use.

Theory of operation: an address has one owner, the last one that took it. What a guest was seen to use is
bounded, and the oldest makes room, because guests make temporary addresses as they like (RFC 8981).
"""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Network

from guestnet.runtime.endpoint import EndpointRecord

SEEN_MOST = 16
"""Addresses that are kept of those that a guest was seen to use."""
_NAMED = 4
"""Addresses that a name stands for, of those that a guest without a lease was seen to use."""


class Known6:
    """The IPv6 addresses of the guests of one network. The registry's lock protects it."""

    def __init__(self, prefix: IPv6Network | None, gateway: IPv6Address | None) -> None:
        self._prefix, self._gateway = prefix, gateway
        self._owners: dict[IPv6Address, EndpointRecord] = {}

    def owner(self, address: IPv6Address) -> EndpointRecord | None:
        """The endpoint that has the address."""
        return self._owners.get(address)

    def named(self, record: EndpointRecord) -> tuple[IPv6Address, ...]:
        """The addresses that the endpoint's name stands for."""
        # Temporary addresses end without a word, so one that is leased is a better answer.
        return record.leased6 or record.addresses6[:_NAMED]

    def lease(self, record: EndpointRecord, address: IPv6Address | None) -> bool:
        """The guest has this address by DHCPv6 from now on, or none. False when that was known."""
        leased = () if address is None else (address,)
        if record.leased6 == leased:
            return False
        for old in record.leased6:
            del self._owners[old]
        record.leased6 = ()
        if address is not None:
            self._take(record, address)
            record.leased6 = leased
        return True

    def seen(self, record: EndpointRecord, address: IPv6Address) -> bool:
        """The guest uses the address. False when that was known, and for what is no guest's address."""
        outside = self._prefix is None or address not in self._prefix or address == self._gateway
        if outside or self._owners.get(address) is record:
            return False
        while len(record.seen6) >= SEEN_MOST:
            oldest = next(iter(record.seen6))
            del record.seen6[oldest], self._owners[oldest]
        self._take(record, address)
        record.seen6[address] = None
        return True

    def remove(self, record: EndpointRecord) -> None:
        """The endpoint is gone."""
        for address in record.addresses6:
            del self._owners[address]

    def _take(self, record: EndpointRecord, address: IPv6Address) -> None:
        before = self._owners.get(address)
        if before is not None:
            before.seen6.pop(address, None)
            before.leased6 = tuple(one for one in before.leased6 if one != address)
        self._owners[address] = record
