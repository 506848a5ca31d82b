"""The leases of a network: which client holds which address, and until when.

Theory of operation: the `AddressBook`, which knows the endpoints, gives out the addresses. The store
remembers what was offered and taken, for how long, and how many addresses an endpoint has declined. It holds
a bounded number of entries per endpoint, and never more than the book has addresses. DHCPv6 keeps its leases
in a store of its own, with a book of IPv6 addresses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from threading import RLock
from typing import Generic, Protocol, TypeVar

from guestnet.model.frozen_record import FrozenRecord
from guestnet.services.dhcp.message import DhcpRefusal, Refused

Address = TypeVar("Address", bound=IPv4Address | IPv6Address)

PER_ENDPOINT = 16
"""Clients of one endpoint: the guest, and hosts that are bridged behind it."""
DECLINES = 4
"""Addresses that one endpoint may have declined at a time: a guest must not use up the pool."""
ASIDE = 600.0
"""Seconds for which a declined address is not given out; the book has the same value."""
OFFERED = 60.0
"""Seconds for which an offer is valid."""


class AddressBook(Protocol[Address]):
    """Gives out the addresses of a network."""

    def address_for(
        self, endpoint_id: str, mac: bytes, client_id: bytes | None, requested: Address | None
    ) -> Address | None:
        """The address of a client, the same one until it is given back; None when there is none for it."""

    def release(self, endpoint_id: str, mac: bytes, address: Address) -> None:
        """The client no longer uses the address."""

    def decline(self, endpoint_id: str, mac: bytes, address: Address) -> None:
        """The client found that another host uses the address."""


class Lease(Generic[Address], FrozenRecord, kw_only=False):
    """An address held by a client. `expires` is in seconds of the server's clock."""

    endpoint_id: str
    mac: bytes
    ip: Address
    hostname: str | None
    expires: float


@dataclass
class _Entry(Generic[Address]):
    lease: Lease[Address]
    taken: bool


_Key = tuple[str, bytes]


class LeaseStore(Generic[Address]):
    """The leases of one network. Any thread may read them."""

    def __init__(self, book: AddressBook[Address]) -> None:
        self._book = book
        self._entries: dict[_Key, _Entry[Address]] = {}
        self._per_endpoint: dict[str, int] = {}
        self._declined: dict[str, list[float]] = {}
        self._first = math.inf
        """Nothing expires before this time."""
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(
        self, endpoint_id: str, mac: bytes, client_id: bytes | None, requested: Address | None
    ) -> Address:
        """Returns the client's address. Raises `Refused`."""
        with self._lock:
            if (endpoint_id, mac) not in self._entries and self._count(endpoint_id) >= PER_ENDPOINT:
                raise Refused(DhcpRefusal.NO_ADDRESS)
            address = self._book.address_for(endpoint_id, mac, client_id, requested)
            if address is None:
                raise Refused(DhcpRefusal.NO_ADDRESS)
            return address

    def _count(self, endpoint_id: str) -> int:
        return self._per_endpoint.get(endpoint_id, 0)

    def hostname(self, endpoint_id: str, mac: bytes) -> str | None:
        """Returns the name of the client, if the book knows one."""
        ask = getattr(self._book, "hostname_for", None)
        name = None if ask is None else ask(endpoint_id, mac)
        return name if isinstance(name, str) else None

    def offer(self, endpoint_id: str, mac: bytes, ip: Address, now: float) -> None:
        """Remembers an offer, so that an address that nobody takes becomes free again."""
        with self._lock:
            entry = self._entries.get((endpoint_id, mac))
            if entry is None or not entry.taken:
                self._put(Lease(endpoint_id, mac, ip, None, now + OFFERED), taken=False)

    def take(self, lease: Lease[Address]) -> Lease[Address] | None:
        """Records a lease. Returns the lease that it replaces, if that was for another address."""
        with self._lock:
            before = self._entries.get((lease.endpoint_id, lease.mac))
            self._put(lease, taken=True)
            return (
                before.lease if before is not None and before.taken and before.lease.ip != lease.ip else None
            )

    def _put(self, lease: Lease[Address], *, taken: bool) -> None:
        key = (lease.endpoint_id, lease.mac)
        if key not in self._entries:
            self._per_endpoint[lease.endpoint_id] = self._count(lease.endpoint_id) + 1
        self._entries[key] = _Entry(lease, taken)
        self._first = min(self._first, lease.expires)

    def held(self, endpoint_id: str, mac: bytes) -> Lease[Address] | None:
        """Returns what the client holds, or was offered."""
        entry = self._entries.get((endpoint_id, mac))
        return None if entry is None else entry.lease

    def release(self, endpoint_id: str, mac: bytes, ip: Address) -> Lease[Address]:
        """The client gives its address back. Raises `Refused` if it does not hold it."""
        with self._lock:
            entry = self._entries.get((endpoint_id, mac))
            if entry is None or not entry.taken or entry.lease.ip != ip:
                raise Refused(DhcpRefusal.NOT_LEASED)
            self._drop(entry)
            return entry.lease

    def decline(self, endpoint_id: str, mac: bytes, ip: Address, now: float) -> Lease[Address] | None:
        """Puts the client's address aside. Returns the lease that this ends. Raises `Refused`."""
        with self._lock:
            entry = self._entries.get((endpoint_id, mac))
            if entry is None or entry.lease.ip != ip:
                raise Refused(DhcpRefusal.NOT_LEASED)
            recent = [until for until in self._declined.get(endpoint_id, ()) if until > now]
            if len(recent) >= DECLINES:
                raise Refused(DhcpRefusal.TOO_MANY_DECLINED)
            self._declined[endpoint_id] = [*recent, now + ASIDE]
            self._forget(entry)
            self._book.decline(endpoint_id, mac, ip)
            return entry.lease if entry.taken else None

    def _drop(self, entry: _Entry[Address]) -> None:
        self._forget(entry)
        self._book.release(entry.lease.endpoint_id, entry.lease.mac, entry.lease.ip)

    def _forget(self, entry: _Entry[Address]) -> None:
        lease = entry.lease
        del self._entries[lease.endpoint_id, lease.mac]
        left = self._count(lease.endpoint_id) - 1
        if left:
            self._per_endpoint[lease.endpoint_id] = left
        else:
            del self._per_endpoint[lease.endpoint_id]

    def expire(self, now: float) -> list[Lease[Address]]:
        """Ends what has expired. Returns the leases, not the offers."""
        with self._lock:
            if now < self._first:
                return []
            over = [entry for entry in self._entries.values() if entry.lease.expires <= now]
            for entry in over:
                self._drop(entry)
            self._first = min((entry.lease.expires for entry in self._entries.values()), default=math.inf)
            self._declined = {
                endpoint: kept
                for endpoint, times in self._declined.items()
                if (kept := [until for until in times if until > now])
            }
            return [entry.lease for entry in over if entry.taken]

    def remove(self, endpoint_id: str) -> list[Lease[Address]]:
        """Ends everything that the guest of a removed endpoint held. Returns the leases."""
        with self._lock:
            gone = [entry for key, entry in self._entries.items() if key[0] == endpoint_id]
            for entry in gone:
                self._drop(entry)
            self._declined.pop(endpoint_id, None)
            return [entry.lease for entry in gone if entry.taken]

    def all(self, now: float) -> list[Lease[Address]]:
        """Returns the current leases."""
        with self._lock:
            entries = list(self._entries.values())
        return [entry.lease for entry in entries if entry.taken and entry.lease.expires > now]
