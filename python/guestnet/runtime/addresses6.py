"""Which guest has which IPv6 address by DHCPv6: the AddressBook of that service.

Theory of operation: a guest's IPv6 address has the number of its IPv4 address within the subnet
(192.168.64.2 and PREFIX::2), so that the two are recognised as one guest's. An address that a static lease
reserves, that its own guest declined, or that another still has, is replaced by one of a range of 2^32, from
which also hosts that are bridged behind a guest get theirs. All of it is bounded by the number of endpoints,
and for each endpoint by `EXTRA_MACS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from threading import RLock

from guestnet.model.ipam import IpAllocator, format_mac
from guestnet.runtime.registry import Registry

EXTRA_MACS = 15
"""Addresses that one endpoint can have besides its own, for what is bridged behind it."""
_OTHERS = 1 << 32
"""The first number of the range for all others."""
_DECLINED_SECONDS = 600.0
_DECLINED_MOST = 4096
"""Addresses that are put aside. The range has so many that a bound on memory is all that is needed."""

_Key = tuple[str, str]
"""Endpoint and MAC."""


class Addresses6:
    """The IPv6 addresses of the clients of one network. Any thread may use it.

    Args:
        registry: The endpoints.
        subnet: The IPv4 subnet, by whose numbers guests have their addresses.
        prefix: The /64 of the network.
        reserved: Addresses by MAC that nobody else gets.
        taken: Addresses that no guest gets: the gateway's.
        clock: The time in seconds.
    """

    def __init__(
        self,
        registry: Registry,
        subnet: IPv4Network,
        prefix: IPv6Network,
        reserved: Mapping[str, IPv6Address],
        taken: Iterable[IPv6Address] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._subnet, self._prefix = registry, subnet, prefix
        self._reserved, self._clock = dict(reserved), clock
        first = prefix.network_address + _OTHERS
        self._pool: IpAllocator[IPv6Address] = IpAllocator(first, first + (_OTHERS - 1))
        self._not_free = frozenset((*self._reserved.values(), *taken))
        for address in self._not_free:
            self._pool.allocate_specific(address)
        self._held: dict[_Key, IPv6Address] = {}
        self._owners: dict[IPv6Address, _Key] = {}
        self._declined: dict[IPv6Address, float] = {}
        self._lock = RLock()

    def address_for(
        self,
        endpoint_id: str,
        mac: bytes,
        client_id: bytes | None = None,
        requested: IPv6Address | None = None,
    ) -> IPv6Address | None:
        """The address that the client with this MAC has, None when there is none for it."""
        with self._lock:
            self._tidy()
            endpoint = self._registry.recognise(endpoint_id, mac)
            key = endpoint_id, format_mac(mac)
            if key in self._held:
                return self._held[key]
            if endpoint is not None:
                own = self._reserved.get(endpoint.mac)
                if own is None or own in self._owners or own in self._declined:
                    number = int(endpoint.ip) - int(self._subnet.network_address)
                    own = self._prefix.network_address + number
                    if endpoint.ip not in self._subnet or not self._is_free(own):
                        own = self._any()
            elif self._registry.get(endpoint_id) is None or self._registry.is_of_guest(key[1]):
                return None
            else:
                if sum(1 for owner, _ in self._held if owner == endpoint_id) > EXTRA_MACS:
                    return None
                own = self._any() if requested is None or not self._take(requested) else requested
            if own is not None:
                self._held[key] = own
                self._owners[own] = key
            return own

    def hostname_for(self, endpoint_id: str, mac: bytes) -> str | None:
        """The name that a client is told it has."""
        return self._registry.hostname_for(endpoint_id, mac)

    def release(self, endpoint_id: str, mac: bytes, address: IPv6Address) -> None:
        """The client gives its address back. A guest's own stays reserved for it."""
        with self._lock:
            endpoint, text = self._registry.get(endpoint_id), format_mac(mac)
            if endpoint is None or endpoint.mac != text:
                self._drop((endpoint_id, text), address)

    def decline(self, endpoint_id: str, mac: bytes, address: IPv6Address) -> None:
        """The client found that another host uses the address: it gets another, and nobody gets this one
        for a while."""
        with self._lock:
            if self._drop((endpoint_id, format_mac(mac)), address):
                while len(self._declined) >= _DECLINED_MOST:
                    del self._declined[next(iter(self._declined))]
                self._declined[address] = self._clock() + _DECLINED_SECONDS

    def remove(self, endpoint_id: str) -> None:
        """The endpoint is gone, and its addresses are free."""
        with self._lock:
            for key in [key for key in self._held if key[0] == endpoint_id]:
                self._drop(key, self._held[key])

    def held(self, endpoint_id: str) -> list[IPv6Address]:
        """The addresses of an endpoint, its guest's own first."""
        endpoint = self._registry.get(endpoint_id)
        with self._lock:
            found = {mac: address for (owner, mac), address in self._held.items() if owner == endpoint_id}
        own = None if endpoint is None else found.pop(endpoint.mac, None)
        return [*([] if own is None else [own]), *found.values()]

    def owner(self, address: IPv6Address) -> str | None:
        """The id of the endpoint that has the address."""
        key = self._owners.get(address)
        return None if key is None else key[0]

    def _drop(self, key: _Key, address: IPv6Address) -> bool:
        if self._held.get(key) != address:
            return False
        del self._held[key]
        del self._owners[address]
        if address not in self._not_free:
            self._pool.release(address)
        return True

    def _is_free(self, address: IPv6Address) -> bool:
        return not (address in self._owners or address in self._declined or address in self._not_free)

    def _take(self, address: IPv6Address) -> bool:
        return self._is_free(address) and self._pool.allocate_specific(address)

    def _any(self) -> IPv6Address | None:
        passed = []
        while (found := self._pool.allocate()) is not None and found in self._declined:
            passed.append(found)
        for address in passed:
            self._pool.release(address)
        return found

    def _tidy(self) -> None:
        now = self._clock()
        while self._declined:
            address, until = next(iter(self._declined.items()))
            if until > now:
                break
            del self._declined[address]
