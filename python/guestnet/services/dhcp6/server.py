"""The DHCPv6 server: one message in, at most one out.

Theory of operation: the server opens nothing and reads no clock; the caller gives it the message and the
time. The endpoint and the MAC that a message came from decide which address its client gets, not its DUID or
IAID, which a guest chooses and which cloned machines share. So a client has one address, whatever it asks
for: further identity associations of the same message, temporary addresses and prefixes are refused by
status. A client that asks for the address of another gets its own.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from ipaddress import IPv6Address, IPv6Network

from guestnet.model.frozen_record import FrozenRecord
from guestnet.model.ipam import format_mac, parse_mac
from guestnet.model.stats import LeaseRecord
from guestnet.services.dhcp.leases import Lease, LeaseStore
from guestnet.services.dhcp.message import DhcpRefusal, Refused
from guestnet.services.dhcp.options import host_label
from guestnet.services.dhcp6.message import (
    FOREVER,
    Dhcp6Refusal,
    IaAddress,
    IaOption,
    Kind,
    Message6,
    Option,
    Refused6,
    Status,
    emit,
    option,
    parse,
    status,
)

_log = logging.getLogger("guestnet")

CLIENT_PORT, SERVER_PORT = 546, 547
_LARGEST = 1232
"""Bytes of the longest answer: what every IPv6 link carries, without headers."""
_ALONE = b"\xff"
"""The preference with which a client waits for no other server (RFC 8415 section 18.2.1)."""
_MAX_RT = 3600
"""Seconds between the attempts of a client that gets nothing, at most (RFC 8415 sections 21.24, 21.25)."""
_REFRESH_SHORTEST = 600
"""RFC 8415 section 21.23."""
_USUAL = frozenset((Option.DNS_SERVERS, Option.SEARCH_LIST))
"""The options for a client that lists none."""
_DUID_LL, _ETHERNET = 3, 1


class Dhcp6Config(FrozenRecord):
    """The settings of the server. `lease_time` is in seconds, up to 0xFFFFFFFF, which has no end."""

    mac: bytes
    """The gateway's, of which the server's DUID is made, so that clients find it again after a restart."""
    prefix: IPv6Network
    dns: tuple[IPv6Address, ...] = ()
    zone: str | None = None
    """The domain of the clients' names."""
    search: tuple[str, ...] = ()
    lease_time: int = 3600


class _Client(FrozenRecord, kw_only=False):
    """The client that sent a message, and the time."""

    endpoint_id: str
    mac: bytes
    now: float


class _Rule(FrozenRecord, kw_only=False):
    """What a message of one type must have. `server`: None when it may name the server."""

    client: bool
    server: bool | None


_RULES = {
    Kind.SOLICIT: _Rule(True, False),
    Kind.REQUEST: _Rule(True, True),
    Kind.CONFIRM: _Rule(True, False),
    Kind.RENEW: _Rule(True, True),
    Kind.REBIND: _Rule(True, False),
    Kind.RELEASE: _Rule(True, True),
    Kind.DECLINE: _Rule(True, True),
    Kind.INFORMATION_REQUEST: _Rule(False, None),
}


class Dhcp6Server:
    """Answers DHCPv6 clients.

    Example:
        >>> from guestnet.services.dhcp import LeaseStore
        >>> class NoAddresses:
        ...     def address_for(self, *_client):
        ...         return None
        >>> config = Dhcp6Config(mac=bytes.fromhex("02676e000001"), prefix=IPv6Network("fd00:6e::/64"))
        >>> server = Dhcp6Server(config, LeaseStore(NoAddresses()))
        >>> information_request = bytes.fromhex("0b 010203")
        >>> server.handle(information_request, endpoint_id="vm1", mac=bytes(6), now=0.0).hex(" ", -4)
        '07010203 0002000a 00030001 02676e00 0001'
    """

    def __init__(
        self,
        config: Dhcp6Config,
        leases: LeaseStore[IPv6Address],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._store = leases
        self._clock = clock
        self._wall_clock = wall_clock
        self._duid = struct.pack("!HH", _DUID_LL, _ETHERNET) + config.mac
        self.on_lease: Callable[[Lease[IPv6Address]], object] = lambda _lease: None
        """Called when a client has taken or renewed an address."""
        self.on_release: Callable[[Lease[IPv6Address]], object] = lambda _lease: None
        """Called when a lease ends: given back, declined or expired."""
        self.counters: Counter[str] = Counter()
        """Messages by type ("solicit", "reply", ...) and refusals by reason ("refused_" and the reason)."""
        self._values = self._make_values()
        self._answer: dict[Kind, Callable[[Message6, _Client], bytes]] = {
            Kind.SOLICIT: self._solicit,
            Kind.REQUEST: self._request,
            Kind.CONFIRM: self._confirm,
            Kind.RENEW: self._renew,
            Kind.REBIND: self._renew,
            Kind.RELEASE: self._release,
            Kind.DECLINE: self._decline,
            Kind.INFORMATION_REQUEST: self._information,
        }

    def _make_values(self) -> dict[int, bytes]:
        config = self._config
        values: dict[int, bytes] = {}
        if config.dns:
            values[Option.DNS_SERVERS] = b"".join(one.packed for one in config.dns)
        if config.search:
            # Without compression (RFC 8415 section 10).
            values[Option.SEARCH_LIST] = b"".join(_labels(one) for one in config.search)
        values[Option.SOL_MAX_RT] = values[Option.INF_MAX_RT] = struct.pack("!I", _MAX_RT)
        return values

    def leases(self) -> list[LeaseRecord]:
        """Lists the current leases. From any thread.

        Returns:
            One record for each.
        """
        now = self._clock()
        to_wall = self._wall_clock() - now
        return [
            LeaseRecord(one.endpoint_id, format_mac(one.mac), one.ip, one.hostname, one.expires + to_wall)
            for one in self._store.all(now)
        ]

    def addresses_of(self, endpoint_id: str) -> list[IPv6Address]:
        """Lists the addresses that an endpoint has leased. From any thread.

        Args:
            endpoint_id: The endpoint.

        Returns:
            Its guest's, and those of what is bridged behind it.
        """
        return [one.ip for one in self._store.all(self._clock()) if one.endpoint_id == endpoint_id]

    def restore(self, leases: Iterable[LeaseRecord]) -> None:
        """Takes over leases of an earlier run, whose endpoints are there again.

        Args:
            leases: What `leases` returned. Leases that have expired, or whose client does not get the same
                address any more, are left out.
        """
        now = self._clock()
        from_wall = now - self._wall_clock()
        for one in leases:
            mac, expires, ip = parse_mac(one.mac), one.expires + from_wall, one.ip
            if expires <= now or not isinstance(ip, IPv6Address):
                continue
            try:
                address = self._store.find(one.endpoint_id, mac, None, ip)
            except Refused:
                continue
            if address == ip:
                self._store.take(Lease(one.endpoint_id, mac, ip, one.hostname, expires))

    def expire(self, now: float) -> None:
        """Ends the leases that are over. `handle` does so too.

        Args:
            now: The time in seconds.
        """
        for lease in self._store.expire(now):
            self.on_release(lease)

    def remove_endpoint(self, endpoint_id: str) -> None:
        """Ends the leases of an endpoint that was removed.

        Args:
            endpoint_id: The endpoint.
        """
        for lease in self._store.remove(endpoint_id):
            self.on_release(lease)

    def handle(
        self, payload: bytes, *, endpoint_id: str, mac: bytes, now: float, unicast: bool = False
    ) -> bytes | None:
        """Answers a datagram of a client. A message that is refused is counted by reason.

        Args:
            payload: The datagram.
            endpoint_id: The endpoint that sent it.
            mac: The sender's MAC, six bytes.
            now: The time in seconds.
            unicast: Whether it was sent to the server's own address instead of ff02::1:2.

        Returns:
            The answer, for the address that the datagram came from; None when there is none.
        """
        try:
            self.expire(now)
            return self._handle(payload, _Client(endpoint_id, mac, now), unicast)
        except Refused6 as refused:
            self.counters[f"refused_{refused.reason}"] += 1
            _log.debug("DHCPv6 of %s refused: %s", endpoint_id, refused.reason)
            return None

    def _handle(self, payload: bytes, client: _Client, unicast: bool) -> bytes:
        message = parse(payload)
        rule = _RULES[message.kind]
        if message.client_id is None and rule.client:
            raise Refused6(Dhcp6Refusal.NO_CLIENT_ID)
        if message.server_id is not None and rule.server is False:
            raise Refused6(Dhcp6Refusal.UNEXPECTED_OPTION)
        if message.server_id != self._duid and (rule.server or message.server_id is not None):
            raise Refused6(Dhcp6Refusal.OTHER_SERVER)
        if message.ias and message.kind is Kind.INFORMATION_REQUEST:
            raise Refused6(Dhcp6Refusal.UNEXPECTED_OPTION)
        if unicast and not rule.server:
            raise Refused6(Dhcp6Refusal.UNICAST)
        self.counters[message.kind.name.lower()] += 1
        if unicast:
            # RFC 8415 section 18.4: clients use unicast only where the server said so.
            return self._reply(message, status(Status.USE_MULTICAST), more=False)
        return self._answer[message.kind](message, client)

    # --- by type ---

    def _solicit(self, message: Message6, client: _Client) -> bytes:
        chosen, address = self._choose(message, client)
        if message.rapid_commit and address is not None:
            self._lease(message, client, address)
            rapid = option(Option.RAPID_COMMIT, b"")
            return self._reply(message, rapid, *self._give(message, chosen, address), client=client)
        if address is not None:
            self._store.offer(client.endpoint_id, client.mac, address, client.now)
        preference = option(Option.PREFERENCE, _ALONE)
        contents = (preference, *self._give(message, chosen, address))
        return self._reply(message, *contents, client=client, kind=Kind.ADVERTISE)

    def _request(self, message: Message6, client: _Client) -> bytes:
        chosen, address = self._choose(message, client)
        wrong = {
            ia
            for ia in message.ias
            if ia.code == Option.IA_NA and any(one.ip not in self._config.prefix for one in ia.addresses)
        }
        if chosen in wrong:
            address = None
        if address is not None:
            self._lease(message, client, address)
        return self._reply(message, *self._give(message, chosen, address, wrong=wrong), client=client)

    def _renew(self, message: Message6, client: _Client) -> bytes:
        chosen, address = self._choose(message, client)
        if address is not None:
            self._lease(message, client, address)
        # Addresses that the client must not use any more have no lifetime (RFC 8415 section 18.3.4).
        contents = self._give(message, chosen, address, ended=True)
        return self._reply(message, *contents, client=client)

    def _confirm(self, message: Message6, client: _Client) -> bytes:
        addresses = {one.ip for ia in message.ias for one in ia.addresses}
        if not addresses:
            raise Refused6(Dhcp6Refusal.NOTHING_TO_CONFIRM)
        own = self._own(client, next(iter(addresses)))
        # Stricter than the prefix: a client that uses another's address would be unreachable.
        found = Status.SUCCESS if addresses == {own} else Status.NOT_ON_LINK
        return self._reply(message, status(found), more=False)

    def _release(self, message: Message6, client: _Client) -> bytes:
        def release(ip: IPv6Address) -> None:
            self.on_release(self._store.release(client.endpoint_id, client.mac, ip))

        return self._end(message, release)

    def _decline(self, message: Message6, client: _Client) -> bytes:
        def decline(ip: IPv6Address) -> None:
            ended = self._store.decline(client.endpoint_id, client.mac, ip, client.now)
            _log.warning(
                "guest %s reports that another host uses %s: the address is not given out for a while",
                client.endpoint_id,
                ip,
            )
            if ended is not None:
                self.on_release(ended)

        return self._end(message, decline)

    def _end(self, message: Message6, end: Callable[[IPv6Address], None]) -> bytes:
        """Ends the leases of a Release or Decline."""
        overall, contents = Status.SUCCESS, []
        for ia in message.ias:
            found = False
            for one in ia.addresses if ia.code == Option.IA_NA else ():
                try:
                    end(one.ip)
                    found = True
                except Refused as refused:
                    if refused.reason is DhcpRefusal.TOO_MANY_DECLINED:
                        found, overall = True, Status.UNSPECIFIED
                    self.counters[f"refused_{refused.reason}"] += 1
            if not found:
                contents.append(ia.emit(status(Status.NO_BINDING)))
        return self._reply(message, status(overall), *contents, more=False)

    def _information(self, message: Message6, client: _Client) -> bytes:
        contents: tuple[bytes, ...] = ()
        if Option.REFRESH_TIME in message.requested:
            seconds = max(self._config.lease_time, _REFRESH_SHORTEST)
            contents = (option(Option.REFRESH_TIME, struct.pack("!I", min(seconds, FOREVER))),)
        return self._reply(message, *contents, client=client)

    # --- parts ---

    def _own(self, client: _Client, requested: IPv6Address | None) -> IPv6Address | None:
        """The address of the client, None when there is none for it."""
        try:
            return self._store.find(client.endpoint_id, client.mac, None, requested)
        except Refused as refused:
            self.counters[f"refused_{refused.reason}"] += 1
            return None

    def _choose(self, message: Message6, client: _Client) -> tuple[IaOption | None, IPv6Address | None]:
        """The identity association that gets the client's address, and the address."""
        stateful = [ia for ia in message.ias if ia.code == Option.IA_NA]
        if not stateful:
            return None, None
        hints = [one.ip for ia in stateful for one in ia.addresses if one.ip in self._config.prefix]
        own = self._own(client, hints[0] if hints else None)
        having = (ia for ia in stateful if any(one.ip == own for one in ia.addresses))
        return next(having, stateful[0]), own

    def _give(
        self,
        message: Message6,
        chosen: IaOption | None,
        address: IPv6Address | None,
        *,
        ended: bool = False,
        wrong: Iterable[IaOption] = (),
    ) -> list[bytes]:
        """The identity associations of an answer. `ended`: addresses that are not given are taken away."""
        said: list[bytes] = []
        life = min(self._config.lease_time, FOREVER)
        renew, rebind = (FOREVER, FOREVER) if life == FOREVER else (life // 2, life * 4 // 5)
        for ia in message.ias:
            if ia in wrong:
                said.append(ia.emit(status(Status.NOT_ON_LINK)))
            elif ia is chosen and address is not None:
                over = [one.ip for one in ia.addresses if ended and one.ip != address]
                given = (IaAddress(address, life, life), *map(IaAddress, dict.fromkeys(over)))
                said.append(ia.emit(*(one.emit() for one in given), renew=renew, rebind=rebind))
            else:
                none = Status.NO_PREFIX if ia.code == Option.IA_PD else Status.NO_ADDRESSES
                said.append(ia.emit(status(none)))
        return said

    def _lease(self, message: Message6, client: _Client, address: IPv6Address) -> None:
        life = self._config.lease_time
        expires = float("inf") if life >= FOREVER else client.now + life
        name = message.name
        wanted = name.labels[0] if name is not None and name.labels and not name.no_updates else None
        hostname = None if wanted is None else host_label(wanted)
        lease = Lease(client.endpoint_id, client.mac, address, hostname, expires)
        before = self._store.take(lease)
        if before is not None:
            self.on_release(before)
        self.on_lease(lease)

    def _name(self, message: Message6, client: _Client) -> bytes | None:
        """The Client FQDN option of an answer (RFC 4704 section 6)."""
        if message.name is None or Option.CLIENT_FQDN not in message.requested:
            return None
        label = self._store.hostname(client.endpoint_id, client.mac)
        if label is None:
            return None
        zone = self._config.zone
        # The network answers for the name by itself: S, and O if the client wanted to see to it.
        flags = 4 if message.name.no_updates else 1 if message.name.server_updates else 3
        return bytes((flags,)) + _labels(label if zone is None else f"{label}.{zone}")

    def _reply(
        self,
        message: Message6,
        *contents: bytes,
        client: _Client | None = None,
        kind: Kind = Kind.REPLY,
        more: bool = True,
    ) -> bytes:
        """An answer. `more`: with the options that the client asks for."""
        said = [option(Option.SERVER_ID, self._duid)]
        if message.client_id is not None:
            said.insert(0, option(Option.CLIENT_ID, message.client_id))
        said += contents
        if more:
            wanted = message.requested or _USUAL
            values = {code: value for code, value in self._values.items() if code in wanted}
            if client is not None and (name := self._name(message, client)) is not None:
                values[Option.CLIENT_FQDN] = name
            size = 4 + sum(map(len, said))
            for code, value in values.items():
                if size + 4 + len(value) > _LARGEST:
                    self.counters["options_without_room"] += 1
                    continue
                size += 4 + len(value)
                said.append(option(code, value))
        self.counters[kind.name.lower()] += 1
        return emit(kind, message.transaction, *said)


def _labels(name: str) -> bytes:
    parts = (part.encode("ascii") for part in name.lower().strip(".").split("."))
    return b"".join(bytes((len(part),)) + part for part in parts) + b"\0"
