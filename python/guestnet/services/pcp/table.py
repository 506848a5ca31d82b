"""The mappings of a network: which port of the host leads to which port of which guest, and until when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

Key = tuple[IPv4Address, str, int]
"""The guest's address, the protocol, the guest's port."""


@dataclass
class Mapping:
    """A port of the host that a guest opened. `expires` is in seconds of the server's clock."""

    endpoint_id: str
    address: IPv4Address
    protocol: str
    """ "tcp" or "udp"."""
    internal_port: int
    external_port: int
    nonce: bytes | None
    """A client that knows it may renew and delete; None with NAT-PMP, which has no nonce."""
    expires: float
    handle: Any = None

    @property
    def key(self) -> Key:
        """The key in the table."""
        return self.address, self.protocol, self.internal_port


class MappingTable:
    """All mappings. The server bounds their number."""

    def __init__(self) -> None:
        self._by_key: dict[Key, Mapping] = {}
        self._count: dict[str, int] = {}
        self._first = math.inf
        """No mapping expires before this time."""

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: Key) -> Mapping | None:
        """Returns the mapping of a guest's port."""
        return self._by_key.get(key)

    def count(self, endpoint_id: str) -> int:
        """Returns how many mappings an endpoint has."""
        return self._count.get(endpoint_id, 0)

    def all(self) -> list[Mapping]:
        """Returns all mappings, oldest first."""
        return list(self._by_key.values())

    def add(self, mapping: Mapping) -> None:
        """Adds a mapping whose key is not in the table."""
        self._by_key[mapping.key] = mapping
        self._first = min(self._first, mapping.expires)
        self._count[mapping.endpoint_id] = self.count(mapping.endpoint_id) + 1

    def remove(self, mapping: Mapping) -> None:
        """Removes a mapping."""
        del self._by_key[mapping.key]
        left = self._count.pop(mapping.endpoint_id) - 1
        if left:
            self._count[mapping.endpoint_id] = left

    def renew(self, mapping: Mapping, expires: float) -> None:
        """Changes the time when a mapping expires."""
        mapping.expires = expires
        self._first = min(self._first, expires)

    def over(self, now: float) -> list[Mapping]:
        """Returns the mappings that have expired. Before the first can have, nothing is searched."""
        if now < self._first:
            return []
        self._first = min((m.expires for m in self._by_key.values() if m.expires > now), default=math.inf)
        return [mapping for mapping in self._by_key.values() if mapping.expires <= now]

    def look_at(self) -> float | None:
        """Returns when the first mapping may expire; None while there is none."""
        return self._first if self._by_key else None
