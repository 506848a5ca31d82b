"""The mappings of a network: which port of the host leads to which port of which guest until when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

Key = tuple[IPv4Address, str, int]
"""The guest's address, the protocol, the guest's port."""


@dataclass
class Mapping:
    """A port of the host that a guest has opened. `expires` in seconds of the server's clock."""

    endpoint_id: str
    address: IPv4Address
    protocol: str
    """ "tcp" or "udp"."""
    internal_port: int
    external_port: int
    nonce: bytes | None
    """Who knows it may renew and delete; None of NAT-PMP, which has none."""
    expires: float
    handle: Any = None

    @property
    def key(self) -> Key:
        """What it is found by."""
        return self.address, self.protocol, self.internal_port


class MappingTable:
    """All mappings; there are at most as many as the server says."""

    def __init__(self) -> None:
        self._by_key: dict[Key, Mapping] = {}
        self._count: dict[str, int] = {}
        self._first = math.inf
        """Nothing ends before."""

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: Key) -> Mapping | None:
        """The mapping of a guest's port."""
        return self._by_key.get(key)

    def count(self, endpoint_id: str) -> int:
        """How many an endpoint has."""
        return self._count.get(endpoint_id, 0)

    def all(self) -> list[Mapping]:
        """All of them, oldest first."""
        return list(self._by_key.values())

    def add(self, mapping: Mapping) -> None:
        """One more, whose key is not here yet."""
        self._by_key[mapping.key] = mapping
        self._first = min(self._first, mapping.expires)
        self._count[mapping.endpoint_id] = self.count(mapping.endpoint_id) + 1

    def remove(self, mapping: Mapping) -> None:
        """Takes one out."""
        del self._by_key[mapping.key]
        left = self._count.pop(mapping.endpoint_id) - 1
        if left:
            self._count[mapping.endpoint_id] = left

    def renew(self, mapping: Mapping, expires: float) -> None:
        """Has it end at another time."""
        mapping.expires = expires
        self._first = min(self._first, expires)

    def over(self, now: float) -> list[Mapping]:
        """Those whose time is over; nothing is looked through before that can be."""
        if now < self._first:
            return []
        self._first = min((m.expires for m in self._by_key.values() if m.expires > now), default=math.inf)
        return [mapping for mapping in self._by_key.values() if mapping.expires <= now]

    def look_at(self) -> float | None:
        """When to look for those that are over; None while there is none."""
        return self._first if self._by_key else None
