"""Who is on a network: endpoints, their addresses, and what is kept of those that left.

It opens nothing and waits for nothing. DHCP asks it for addresses (the AddressBook of the DHCP service), DNS
for names. A lock makes it safe to be read and, while the network does not run, changed from any thread.
"""

from __future__ import annotations

import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from threading import RLock

from guestnet.errors import (
    AddressInUse,
    AddressPoolExhausted,
    ConfigError,
    EndpointExists,
    EndpointNotFound,
)
from guestnet.model.ipam import IpAllocator, format_mac, generate_mac, parse_mac
from guestnet.model.shares import fair_share
from guestnet.model.spec import NatConfig, NetMode, StaticLease
from guestnet.model.values import domain
from guestnet.runtime.endpoint import Endpoint, EndpointNetwork, EndpointRecord
from guestnet.runtime.known6 import Known6

NOWHERE = IPv4Address(0)
"""The address of an endpoint that has shown none, where addresses are not given here."""
_REMEMBERED = 1024
"""Guests that left whose name and address are kept for when they come again."""
_EXTRA_MACS = 15
"""Addresses that one endpoint can have besides its own, for what is bridged behind it."""
_SEEN_MOST = 16
"""Addresses that are kept of those that a guest was seen to use."""
_DECLINED_SECONDS = 600.0
"""How long an address is not given again after a guest found that somebody else uses it."""
_DECLINED_PART = 4
"""One in so many addresses of the pool may be put aside like that: guests that come, decline and go must not
leave none for others."""

_NOT_FOR_GUESTS = frozenset(
    (
        "gateway",
        "host",
        "localhost",
        "local",
        "internal",
        "invalid",
        "onion",
        "wpad",
        "isatap",
        "broadcasthost",
    )
)
"""Names that mean the host or the network, or that machines look for by themselves and are configured by what
they find (WPAD, ISATAP): no guest gives itself one."""
_NUMBERED = re.compile(r"vm[0-9]+")
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def is_automatic(id: str) -> bool:
    """Whether an id is one of those that guests of listeners get by order of arrival."""
    return _NUMBERED.fullmatch(id) is not None


def _host_name() -> str:
    """The first label of this host's own name."""
    return socket.gethostname().partition(".")[0].lower()


def check_id(value: object) -> str:
    """An endpoint's id."""
    if not isinstance(value, str) or not 0 < len(value) <= 63 or not set(value) <= _ID_CHARACTERS:
        raise ConfigError(
            f"The endpoint id {value!r} is not 1 to 63 letters, digits, hyphens, underscores or dots: "
            "write one such as 'vm1'."
        )
    return value


class Registry:
    """The endpoints of one network. `moved` is called when an endpoint's address changes, `removed` when an
    endpoint is gone, `renamed` when the answer about a guest's name or address may be another one."""

    def __init__(self, config: NatConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._bridged = config.mode is NetMode.BRIDGED
        self._clock = clock
        self._lock = RLock()
        self._pool: IpAllocator[IPv4Address] = IpAllocator(config.dhcp_start, config.dhcp_end)
        self._outside: set[IPv4Address] = set()
        """Taken addresses of the subnet that are not of the pool."""
        self._endpoints: dict[str, Endpoint] = {}
        self._records: dict[str, EndpointRecord] = {}
        self._by_ip: dict[IPv4Address, Endpoint] = {}
        self._known6 = Known6(config.subnet6, config.gateway6)
        self._proposed: set[str] = set()
        """Endpoints whose MAC was generated, and whose guest has not shown another yet."""
        self._extra: dict[tuple[str, str], IPv4Address] = {}
        self._declined: list[tuple[float, IPv4Address]] = []
        self._left: OrderedDict[str, tuple[str, IPv4Address]] = OrderedDict()
        self._kept: dict[str, IPv4Address] = {}
        """Addresses of guests of an earlier run that have not come yet, by MAC."""
        self._number = 0
        self._leases = {lease.mac: lease for lease in config.static_leases}
        self.moved: Callable[[Endpoint, IPv4Address], object] = lambda _endpoint, _old: None
        self.removed: Callable[[str], object] = lambda _id: None
        self.renamed: Callable[[], object] = lambda: None
        self.owned: Callable[[str], bool] = lambda _name: False
        """Whether a name is one of the records of the network's owner."""
        self.network: Callable[[], EndpointNetwork | None] = lambda: None
        """The network, for what endpoints do by themselves; endpoints do not keep it running."""
        self._reserved = {lease.ip for lease in config.static_leases if lease.ip is not None}
        for address in (config.gateway, config.loopback_address, *self._reserved):
            if address is not None:
                self._take(address)

    # --- endpoints ---

    def create(
        self,
        id: str,
        mac: str | bytes | None = None,
        ip: str | IPv4Address | None = None,
        hostname: str | None = None,
        listener: str | None = None,
    ) -> Endpoint:
        """A new endpoint; see `NatNetwork.create_endpoint`."""
        with self._lock:
            name = check_id(id)
            if name in self._endpoints:
                raise EndpointExists(f"There is an endpoint {name!r} already: choose another id.")
            alias = (
                None
                if hostname is None
                else domain(f"hostname of endpoint {name!r}", hostname, one_label=True)
            )
            # A guest cannot keep its owner from a name by telling it first.
            for given in (name, alias):
                self._take_back(given)
            if alias is not None and (other := self.named(alias)) is not None:
                raise EndpointExists(
                    f"The hostname {alias!r} is that of endpoint {other.id!r}: choose another for {name!r}."
                )
            own = generate_mac() if mac is None else format_mac(parse_mac(mac))
            for known in self._endpoints.values():
                if known.mac == own:
                    raise AddressInUse(f"The MAC {own} is that of endpoint {known.id!r}: choose another one.")
            address = NOWHERE if self._bridged else self._address(name, own, ip)
            if self._bridged and ip is not None:
                raise ConfigError(
                    f"ip {ip} of endpoint {name!r}: in the mode 'bridged' the segment gives it, leave it out."
                )
            record = EndpointRecord(name, own, address, self._config.mode, alias, listener)
            endpoint = Endpoint(record, self.network)
            self._records[name] = record
            self._endpoints[name] = endpoint
            if not self._bridged:
                self._by_ip[address] = endpoint
            if mac is None:
                self._proposed.add(name)
            self.renamed()
            return endpoint

    def restore(self, id: str, mac: str, ip: str | None, hostname: str | None, *, proposed: bool) -> Endpoint:
        """An endpoint of an earlier run. `proposed`: its MAC was generated, so its guest may have another."""
        with self._lock:
            endpoint = self.create(id, mac, ip, hostname)
            if proposed:
                self._proposed.add(id)
            return endpoint

    def given_hostname(self, id: str) -> str | None:
        """The host name that the owner gave the endpoint, not one that the guest told."""
        record = self._records.get(id)
        return None if record is None or record.told else record.hostname

    def remembered(self) -> dict[str, tuple[str, IPv4Address]]:
        """Guests of listeners that left, or have not come yet: id and address by MAC; 0.0.0.0 for none."""
        with self._lock:
            return dict(self._left)

    def _take_back(self, name: str | None) -> None:
        """Takes a name from a guest that gave it itself."""
        for one in self._records.values():
            if name is not None and one.told and one.hostname == name.lower():
                one.hostname, one.told = None, False

    def arrive(self, mac: bytes, listener: str, seen: IPv4Address | None = None) -> Endpoint:
        """An endpoint for a guest that came to a listener: named by its lease, else as before, else vmN.

        `seen` is the address that the guest was seen to use before it asked for one.
        """
        text = format_mac(mac)
        with self._lock:
            for known in self._endpoints.values():
                if known.mac == text:
                    raise AddressInUse(f"The MAC {text} is that of endpoint {known.id!r}.")
            lease, before = self._leases.get(text), self._left.get(text)
            self._give_up_kept(text)
            name = lease.name if lease is not None else None
            if name is None or name in self._endpoints:
                name = before[0] if before is not None and before[0] not in self._endpoints else None
            wanted = seen if seen is not None and self._is_free(seen) else before and before[1]
            if not self._bridged and lease is None and wanted is not None and self._is_free(wanted):
                return self.create(name or self._next_name(), mac, wanted, listener=listener)
            return self.create(name or self._next_name(), mac, listener=listener)

    def recall(self, mac: str | bytes, id: str, ip: str | IPv4Address | None = None) -> None:
        """Remembers a guest of an earlier run; see `NatNetwork.recall_guest`."""
        name, own = check_id(id), format_mac(parse_mac(mac))
        address = NOWHERE if ip is None else self._config.host_address(f"ip of guest {name!r}", ip)
        with self._lock:
            for other in [one for one, (known, _) in self._left.items() if known == name]:
                del self._left[other]
                self._give_up_kept(other)
            self._give_up_kept(own)
            self._remember(own, name, address)
            if address != NOWHERE and self._take(address):
                self._kept[own] = address

    def _give_up_kept(self, mac: str) -> None:
        address = self._kept.pop(mac, None)
        if address is not None:
            self._free(address)

    def _remember(self, mac: str, id: str, ip: IPv4Address) -> None:
        self._left[mac] = (id, ip)
        self._left.move_to_end(mac)
        while len(self._left) > _REMEMBERED:
            self._give_up_kept(self._left.popitem(last=False)[0])

    def _next_name(self) -> str:
        kept = {name for name, _ in self._left.values()}
        leased = {lease.name for lease in self._leases.values()}
        while True:
            self._number += 1
            name = f"vm{self._number}"
            if name not in self._endpoints and name not in kept | leased and not self.owned(name):
                return name

    def remove(self, id: str) -> Endpoint:
        """Takes an endpoint out and frees its addresses."""
        with self._lock:
            endpoint = self._endpoints.pop(id, None)
            if endpoint is None:
                raise EndpointNotFound(
                    f"There is no endpoint {id!r}: `endpoints` lists those that are there."
                )
            self._known6.remove(self._records.pop(id))
            self._proposed.discard(id)
            if not self._bridged:
                del self._by_ip[endpoint.ip]
                self._free(endpoint.ip)
            for key in [key for key in self._extra if key[0] == id]:
                self._free(self._extra.pop(key))
            if endpoint.listener is not None:
                self._remember(endpoint.mac, endpoint.id, endpoint.ip)
            self.removed(id)
            self.renamed()
            return endpoint

    def get(self, id: str) -> Endpoint | None:
        """The endpoint with this id."""
        return self._endpoints.get(id)

    def all(self) -> list[Endpoint]:
        """All endpoints, oldest first."""
        with self._lock:
            return list(self._endpoints.values())

    def __len__(self) -> int:
        return len(self._endpoints)

    def is_proposed(self, id: str) -> bool:
        """Whether the endpoint's MAC was generated, and its guest may have another."""
        return id in self._proposed

    # --- names ---

    def named(self, name: str, *, told: bool = True) -> Endpoint | None:
        """The endpoint with this id, else the one with this host name; `told`: also one that only the guest
        itself says that it has."""
        endpoint = self._endpoints.get(name)
        if endpoint is not None:
            return endpoint
        lower = name.lower()
        with self._lock:
            for one in self._records.values():
                if one.id.lower() == lower or (
                    (told or not one.told) and (one.hostname or "").lower() == lower
                ):
                    return self._endpoints[one.id]
        return None

    def address_named(self, name: str, *, told: bool = True) -> IPv4Address | None:
        """The address of a guest by its name, also of one that its lease names before it has come."""
        endpoint = self.named(name, told=told)
        if endpoint is not None:
            return endpoint.ip
        return next((lease.ip for lease in self._leases.values() if lease.name == name.lower()), None)

    def addresses_named(self, name: str, *, told: bool = True) -> tuple[IPv4Address | IPv6Address, ...]:
        """The addresses of a guest by its name: that of DHCP, and that of DHCPv6 or, without it, the latest
        that it was seen to use. Before it has come, they are those of its static lease."""
        endpoint = self.named(name, told=told)
        if endpoint is None:
            found = (lease.addresses for lease in self._leases.values() if lease.name == name.lower())
            return next(found, ())
        record = self._records.get(endpoint.id)
        if record is None:
            return ()
        return (record.ip, *self._known6.named(record))

    def note_hostname(self, endpoint: Endpoint, mac: bytes, hostname: str | None) -> None:
        """The guest told its own name. It gets it unless it was given one, another guest has it, it is one of
        the owner's, or it means something else than a guest."""
        if hostname is None or endpoint.mac != format_mac(mac) or endpoint.hostname is not None:
            return
        try:
            alias = domain("hostname", hostname, one_label=True)
        except ConfigError:
            return
        if alias in _NOT_FOR_GUESTS or alias == _host_name() or self.owned(alias):
            return
        with self._lock:
            # The names of guests that are yet to come are not for others.
            left = any(name.lower() == alias for name, _ in self._left.values())
            if self.address_named(alias) is None and not _NUMBERED.fullmatch(alias) and not left:
                record = self._records[endpoint.id]
                record.hostname, record.told = alias, True
                self.renamed()

    def name_of(self, address: IPv4Address | IPv6Address) -> str | None:
        """The id of the endpoint with this address."""
        known = self._by_ip.get(address) if isinstance(address, IPv4Address) else self._known6.owner(address)
        return None if known is None else known.id

    def owner(self, address: IPv4Address) -> Endpoint | None:
        """Whose address it is."""
        return self._by_ip.get(address)

    def holds(self, endpoint_id: str, address: IPv4Address) -> bool:
        """Whether the address was given to the endpoint, or to what is bridged behind it."""
        with self._lock:
            endpoint = self._endpoints.get(endpoint_id)
            if endpoint is None:
                return False
            return endpoint.ip == address or any(
                own == address for (owner, _), own in self._extra.items() if owner == endpoint_id
            )

    def set_attachment(self, endpoint_id: str, kind: str | None) -> None:
        """How the frames of an endpoint enter now; None when they do not. Nothing happens when it is gone."""
        if (record := self._records.get(endpoint_id)) is not None:
            record.attached = kind

    def note_address(self, endpoint_id: str, address: IPv4Address | IPv6Address) -> bool:
        """The guest was seen to use an address. False when that was known, and for IPv6 addresses outside the
        network's prefix.

        Where addresses are not given here, the first one becomes the endpoint's own.
        """
        with self._lock:
            record = self._records.get(endpoint_id)
            if isinstance(address, IPv6Address):
                fresh = record is not None and self._known6.seen(record, address)
                if fresh:
                    self.renamed()
                return fresh
            if record is None or address in (record.ip, NOWHERE) or address in record.seen:
                return False
            if self._bridged and record.ip == NOWHERE:
                record.ip = address
                return True
            while len(record.seen) >= _SEEN_MOST:
                record.seen.pop(next(iter(record.seen)))
            record.seen[address] = None
            return True

    def note_lease6(self, endpoint_id: str, address: IPv6Address | None) -> None:
        """The guest has this address by DHCPv6 from now on, or none."""
        with self._lock:
            record = self._records.get(endpoint_id)
            if record is not None and self._known6.lease(record, address):
                self.renamed()

    def lease_of(self, mac: str) -> StaticLease | None:
        """The static lease of a MAC."""
        return self._leases.get(mac)

    # --- what DHCP asks ---

    def address_for(
        self,
        endpoint_id: str,
        mac: bytes,
        client_id: bytes | None = None,
        requested: IPv4Address | None = None,
    ) -> IPv4Address | None:
        """The address that the client with this MAC has, None when there is none for it."""
        with self._lock:
            endpoint = self.recognise(endpoint_id, mac)
            if endpoint is not None:
                return endpoint.ip
            if endpoint_id not in self._endpoints:
                return None
            return self._extra_address(endpoint_id, format_mac(mac), requested)

    def recognise(self, endpoint_id: str, mac: bytes) -> Endpoint | None:
        """The endpoint, if the client with this MAC is its guest; None for others that are behind it."""
        with self._lock:
            endpoint = self._endpoints.get(endpoint_id)
            if endpoint is None:
                return None
            text = format_mac(mac)
            if endpoint.mac != text and endpoint_id in self._proposed:
                self._adopt(endpoint, text)
            if endpoint.mac != text:
                return None
            self._proposed.discard(endpoint_id)
            return endpoint

    def is_of_guest(self, mac: str) -> bool:
        """Whether the MAC is that of a guest, who may be away."""
        return mac in self._leases or any(one.mac == mac for one in list(self._endpoints.values()))

    def _adopt(self, endpoint: Endpoint, mac: str) -> None:
        """The guest has a MAC of its own instead of the one that was proposed."""
        if any(other.mac == mac for other in self._endpoints.values()):
            return
        self._records[endpoint.id].mac = mac
        lease = self._leases.get(mac)
        if lease is not None and lease.ip is not None and lease.ip not in self._by_ip:
            self._move(endpoint, lease.ip)

    def _extra_address(self, endpoint_id: str, mac: str, requested: IPv4Address | None) -> IPv4Address | None:
        key = (endpoint_id, mac)
        if key in self._extra:
            return self._extra[key]
        if self.is_of_guest(mac):
            return None  # it is another guest's own, who may be away
        # No more than are left to guests that have none.
        taken = self._pool.allocated_count
        share = min(_EXTRA_MACS, fair_share(taken + self._pool.available, taken, times=1))
        if sum(1 for owner, _ in self._extra if owner == endpoint_id) >= share:
            return None
        if requested is not None and self._is_host(requested) and self._take(requested):
            address: IPv4Address | None = requested
        else:
            address = self._any()
        if address is not None:
            self._extra[key] = address
        return address

    def hostname_for(self, endpoint_id: str, mac: bytes) -> str | None:
        """The name that a client is told it has."""
        endpoint = self._endpoints.get(endpoint_id)
        if endpoint is None or endpoint.mac != format_mac(mac):
            return None
        try:
            return endpoint.hostname or domain("id", endpoint.id, one_label=True)
        except ConfigError:  # an id that is no name
            return None

    def release(self, endpoint_id: str, mac: bytes, address: IPv4Address) -> None:
        """The client gives its address back. An endpoint's own stays reserved for it."""
        with self._lock:
            key = (endpoint_id, format_mac(mac))
            if self._extra.get(key) == address:
                self._free(self._extra.pop(key))

    def decline(self, endpoint_id: str, mac: bytes, address: IPv4Address) -> None:
        """The client found that somebody else uses the address: it gets another, and nobody gets this one
        for a while."""
        with self._lock:
            endpoint, text = self._endpoints.get(endpoint_id), format_mac(mac)
            if self._extra.get((endpoint_id, text)) == address:
                del self._extra[endpoint_id, text]
            elif endpoint is not None and endpoint.ip == address and endpoint.mac == text:
                other = self._any()
                if other is None:
                    return
                self._move(endpoint, other, free=False)
            else:
                return
            self._declined.append((self._clock() + _DECLINED_SECONDS, address))
            size = self._pool.available + self._pool.allocated_count
            while len(self._declined) > max(1, size // _DECLINED_PART):
                self._free(self._declined.pop(0)[1])

    def _move(self, endpoint: Endpoint, to: IPv4Address, *, free: bool = True) -> None:
        old = endpoint.ip
        del self._by_ip[old]
        if free:
            self._free(old)
        self._records[endpoint.id].ip = to
        self._by_ip[to] = endpoint
        self.renamed()
        self.moved(endpoint, old)

    # --- addresses ---

    def tidy(self) -> None:
        """Makes declined addresses available again when their time is over."""
        with self._lock:
            now = self._clock()
            over = [address for until, address in self._declined if until <= now]
            self._declined = [(until, address) for until, address in self._declined if until > now]
            for address in over:
                self._free(address)

    def _any(self) -> IPv4Address | None:
        self.tidy()
        address = self._pool.allocate()
        if address is None and self._kept:
            # A guest that is here counts more than one that may come.
            self._give_up_kept(next(iter(self._kept)))
            address = self._pool.allocate()
        return address

    def _address(self, name: str, mac: str, ip: str | IPv4Address | None) -> IPv4Address:
        lease = self._leases.get(mac)
        if ip is None:
            if lease is not None and lease.ip is not None and lease.ip not in self._by_ip:
                return lease.ip
            address = self._any()
            if address is None:
                raise AddressPoolExhausted(
                    f"No address of {self._config.subnet} is free for endpoint {name!r}: remove an endpoint, "
                    "or choose a larger subnet."
                )
            return address
        address = self._config.host_address(f"ip of endpoint {name!r}", ip)
        if lease is not None and lease.ip == address and address not in self._by_ip:
            return address
        self.tidy()
        if not self._take(address):
            raise AddressInUse(
                f"The address {address} is in use by {self._user(address)}: choose another for {name!r}."
            )
        return address

    def _user(self, address: IPv4Address) -> str:
        owner = self._by_ip.get(address)
        if owner is not None:
            return f"endpoint {owner.id!r}"
        if address == self._config.gateway:
            return "the gateway"
        if address == self._config.loopback_address:
            return "the host's loopback"
        if address in self._reserved:
            return "a static lease"
        return "another guest"

    def _is_host(self, address: IPv4Address) -> bool:
        subnet = self._config.subnet
        return address in subnet and address not in (subnet.network_address, subnet.broadcast_address)

    def _is_free(self, address: IPv4Address) -> bool:
        return self._is_host(address) and not (
            self._pool.is_allocated(address) or address in self._outside or address in self._by_ip
        )

    def _take(self, address: IPv4Address) -> bool:
        if address in self._pool:
            return self._pool.allocate_specific(address)
        if address in self._outside:
            return False
        self._outside.add(address)
        return True

    def _free(self, address: IPv4Address) -> None:
        if address in self._reserved:
            return  # stays reserved for its MAC
        self._outside.discard(address)
        self._pool.release(address)
