"""The DHCP server: one message in, at most one out.

Theory of operation: the server opens nothing and reads no clock; the caller gives it the message and the
time. The endpoint that a message came from decides which address its client gets. So the server is the
authority for the whole segment, and a client that asks for the address of another gets DHCPNAK at once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

from guestnet.model.frozen_record import FrozenRecord
from guestnet.model.ipam import format_mac, parse_mac
from guestnet.model.stats import LeaseRecord
from guestnet.services.dhcp import options as make
from guestnet.services.dhcp.leases import Lease, LeaseStore
from guestnet.services.dhcp.message import (
    BROADCAST,
    NOWHERE,
    DhcpRefusal,
    Message,
    MessageType,
    Refused,
    emit,
    parse,
)

_log = logging.getLogger("guestnet")

CLIENT_PORT = 68
_ETHERNET = 1
_REQUEST, _REPLY = 1, 2
_EVERYWHERE = IPv4Address("255.255.255.255")
_EVERYONE = b"\xff" * 6
_IP_AND_UDP = 28
_SMALLEST_MAXIMUM = 576
"""The length of an IP datagram that every client accepts (RFC 2132 section 9.10)."""
_SHORTEST_LEASE = 60
"""Seconds; a client that asks for less gets this, or the server's own lease time if that is shorter."""
_FOR_EVER = 0xFFFFFFFF
_BOOTP_LARGEST = 300
"""Bytes: a BOOTP client has 64 for options (RFC 951)."""
_ALWAYS = (1,)
_USUAL = (1, 3, 6, 12, 15, 26, 28, 119)
"""The options for a client that lists none."""


class DhcpConfig(FrozenRecord):
    """The settings of the server. `lease_time` is in seconds, up to 0xFFFFFFFE; `mtu` is in bytes."""

    server: IPv4Address
    subnet: IPv4Network
    router: IPv4Address | None = None
    dns: tuple[IPv4Address, ...] = ()
    domain: str | None = None
    search: tuple[str, ...] = ()
    mtu: int = 1500
    lease_time: int = 3600
    routes: tuple[tuple[IPv4Network, IPv4Address], ...] = ()
    """Routes besides the default route."""


class DhcpReply(FrozenRecord, kw_only=False):
    """An answer and its destination. It is sent from the server's address, port 67."""

    payload: bytes
    dst_ip: IPv4Address
    dst_port: int
    dst_mac: bytes
    broadcast: bool


class _Client(FrozenRecord, kw_only=False):
    """The client that sent a message, and the time."""

    endpoint_id: str
    mac: bytes
    now: float


class DhcpServer:
    """Answers DHCP and BOOTP clients. `network.services.dhcp` is the server of a network.

    Example:
        >>> from guestnet import NatNetwork
        >>> NatNetwork().services.dhcp.leases()
        []
    """

    def __init__(
        self,
        config: DhcpConfig,
        leases: LeaseStore[IPv4Address],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._store = leases
        self._clock = clock
        self._wall_clock = wall_clock
        self.on_lease: Callable[[Lease[IPv4Address]], object] = lambda _lease: None
        """Called when a client has taken or renewed an address."""
        self.on_release: Callable[[Lease[IPv4Address]], object] = lambda _lease: None
        """Called when a lease ends: given back, declined or expired."""
        self.counters: Counter[str] = Counter()
        """Messages by type ("discover", "offer", ...) and refusals by reason ("refused_" and the reason)."""
        self._values = self._make_values()
        self._answer: dict[MessageType, Callable[[Message, dict[int, bytes], _Client], DhcpReply | None]] = {
            MessageType.DISCOVER: self._discover,
            MessageType.REQUEST: self._request,
            MessageType.DECLINE: self._decline,
            MessageType.RELEASE: self._release,
            MessageType.INFORM: self._inform,
        }

    def _make_values(self) -> dict[int, bytes]:
        config = self._config
        values = {1: config.subnet.netmask.packed}
        routes = list(config.routes)
        if config.router is not None:
            values[3] = config.router.packed
            routes.append((IPv4Network("0.0.0.0/0"), config.router))
        if config.dns:
            values[6] = make.addresses(config.dns)
        if config.domain:
            values[15] = config.domain.encode("ascii")
        values[26] = config.mtu.to_bytes(2, "big")
        values[28] = config.subnet.broadcast_address.packed
        if config.search:
            values[119] = make.search_list(config.search)
        if routes:
            # A client that accepts these ignores option 3, so they include the default route.
            values[121] = make.classless_routes(routes)
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
            if expires <= now or not isinstance(ip, IPv4Address):
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

    def handle(self, payload: bytes, *, endpoint_id: str, mac: bytes, now: float) -> DhcpReply | None:
        """Answers a datagram of a client. A message that is refused is counted by reason.

        Args:
            payload: The datagram.
            endpoint_id: The endpoint that sent it.
            mac: The sender's MAC, six bytes.
            now: The time in seconds.

        Returns:
            The answer, None when there is none.
        """
        try:
            self.expire(now)
            return self._handle(payload, _Client(endpoint_id, mac, now))
        except Refused as refused:
            self.counters[f"refused_{refused.reason}"] += 1
            _log.debug("DHCP of %s refused: %s", endpoint_id, refused.reason)
            return None

    def _handle(self, payload: bytes, client: _Client) -> DhcpReply | None:
        message = parse(payload)
        if message.op != _REQUEST:
            raise Refused(DhcpRefusal.NOT_A_REQUEST)
        mac = message.chaddr
        if message.htype != _ETHERNET or len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise Refused(DhcpRefusal.BAD_HARDWARE)
        if message.giaddr != NOWHERE:
            raise Refused(DhcpRefusal.RELAYED)
        if mac != client.mac:
            raise Refused(DhcpRefusal.MAC_MISMATCH)
        if message.options is None or 53 not in message.options:
            return self._bootp(message, client)
        try:
            kind = MessageType(message.options[53][0])
        except ValueError:
            raise Refused(DhcpRefusal.BAD_TYPE) from None
        answer = self._answer.get(kind)
        if answer is None:
            raise Refused(DhcpRefusal.BAD_TYPE)
        self.counters[kind.name.lower()] += 1
        return answer(message, message.options, client)

    # --- by type ---

    def _discover(self, message: Message, asked: dict[int, bytes], client: _Client) -> DhcpReply:
        address = self._find(message, asked, client)
        if 80 in asked:
            # Rapid commit (RFC 4039): there is no other server, so the offer can be the lease.
            return self._lease(message, asked, client, address, {80: b""})
        self._store.offer(client.endpoint_id, client.mac, address, client.now)
        return self._reply(message, asked, client, MessageType.OFFER, address, self._times(asked))

    def _request(self, message: Message, asked: dict[int, bytes], client: _Client) -> DhcpReply:
        server, wanted = message.address(54), message.address(50)
        if server is not None and server != self._config.server:
            raise Refused(DhcpRefusal.OTHER_SERVER)
        if wanted is None:
            # RENEWING or REBINDING: it has the address already.
            wanted = message.ciaddr
            if wanted == NOWHERE:
                raise Refused(DhcpRefusal.CONTRADICTION)
        elif message.ciaddr not in (NOWHERE, wanted):
            raise Refused(DhcpRefusal.CONTRADICTION)
        if wanted not in self._config.subnet:
            return self._nak(message, asked, client, "not an address of this network")
        own = self._find(message, asked, client, wanted)
        if own != wanted:
            # The address that was found for it is offered, and it may ask for it.
            self._store.offer(client.endpoint_id, client.mac, own, client.now)
            return self._nak(message, asked, client, "not your address")
        return self._lease(message, asked, client, wanted, {})

    def _decline(self, message: Message, asked: dict[int, bytes], client: _Client) -> None:
        address = message.address(50)
        if message.address(54) not in (None, self._config.server):
            raise Refused(DhcpRefusal.OTHER_SERVER)
        if address is None:
            raise Refused(DhcpRefusal.CONTRADICTION)
        ended = self._store.decline(client.endpoint_id, client.mac, address, client.now)
        _log.warning(
            "guest %s reports that another host uses %s: the address is not given out for a while",
            client.endpoint_id,
            address,
        )
        if ended is not None:
            self.on_release(ended)

    def _release(self, message: Message, asked: dict[int, bytes], client: _Client) -> None:
        if message.address(54) not in (None, self._config.server):
            raise Refused(DhcpRefusal.OTHER_SERVER)
        self.on_release(self._store.release(client.endpoint_id, client.mac, message.ciaddr))

    def _inform(self, message: Message, asked: dict[int, bytes], client: _Client) -> DhcpReply:
        if message.ciaddr not in self._config.subnet:
            raise Refused(DhcpRefusal.CONTRADICTION)
        return self._reply(message, asked, client, MessageType.ACK, NOWHERE, {})

    def _bootp(self, message: Message, client: _Client) -> DhcpReply:
        """RFC 1534: a BOOTP client keeps its address without a time limit, as an endpoint does."""
        self.counters["bootp"] += 1
        address = self._store.find(client.endpoint_id, client.mac, None, None)
        self._take(Lease(client.endpoint_id, client.mac, address, None, float("inf")))
        known = None if message.options is None else {c: self._values[c] for c in _USUAL if c in self._values}
        answer = self._head(message, address)
        answer.options = known
        return self._send(answer, message, client, _BOOTP_LARGEST, overload=False)

    # --- parts ---

    def _find(
        self, message: Message, asked: dict[int, bytes], client: _Client, wanted: IPv4Address | None = None
    ) -> IPv4Address:
        requested = wanted or message.address(50)
        return self._store.find(client.endpoint_id, client.mac, asked.get(61), requested)

    def _times(self, asked: dict[int, bytes]) -> dict[int, bytes]:
        lease = self._config.lease_time
        if 51 in asked:
            lease = min(lease, max(int.from_bytes(asked[51], "big"), _SHORTEST_LEASE))
        if lease >= _FOR_EVER:
            return {51: make.seconds(_FOR_EVER)}
        return {51: make.seconds(lease), 58: make.seconds(lease // 2), 59: make.seconds(lease * 7 // 8)}

    def _lease(
        self,
        message: Message,
        asked: dict[int, bytes],
        client: _Client,
        address: IPv4Address,
        more: dict[int, bytes],
    ) -> DhcpReply:
        times = self._times(asked)
        seconds = int.from_bytes(times[51], "big")
        expires = float("inf") if seconds == _FOR_EVER else client.now + seconds
        name = make.client_name(asked)
        self._take(Lease(client.endpoint_id, client.mac, address, name, expires))
        return self._reply(message, asked, client, MessageType.ACK, address, {**times, **more})

    def _take(self, lease: Lease[IPv4Address]) -> None:
        before = self._store.take(lease)
        if before is not None:
            self.on_release(before)
        self.on_lease(lease)

    def _head(self, message: Message, yiaddr: IPv4Address) -> Message:
        # The broadcast flag is the client's; the other flags must be zero.
        return Message(
            op=_REPLY,
            xid=message.xid,
            chaddr=message.chaddr,
            flags=message.flags & BROADCAST,
            ciaddr=message.ciaddr,
            yiaddr=yiaddr,
        )

    def _reply(
        self,
        message: Message,
        asked: dict[int, bytes],
        client: _Client,
        kind: MessageType,
        yiaddr: IPv4Address,
        times: dict[int, bytes],
    ) -> DhcpReply:
        answer = self._head(message, yiaddr)
        if kind is MessageType.OFFER:
            answer.ciaddr = NOWHERE
        values = dict(self._values)
        if (name := self._store.hostname(client.endpoint_id, client.mac)) is not None:
            values[12] = name.encode("ascii")
        said = {53: bytes((kind,)), 54: self._config.server.packed, **times}
        if 61 in asked:
            said[61] = asked[61]  # RFC 6842
        wanted = (*_ALWAYS, *asked[55]) if 55 in asked else _USUAL
        for code in wanted:
            if code in values:
                said.setdefault(code, values[code])
        answer.options = said
        self.counters[kind.name.lower()] += 1
        return self._send(answer, message, client, self._largest(asked))

    def _nak(self, message: Message, asked: dict[int, bytes], client: _Client, why: str) -> DhcpReply:
        answer = replace(self._head(message, NOWHERE), ciaddr=NOWHERE)
        said = {53: bytes((MessageType.NAK,)), 54: self._config.server.packed, 56: why.encode("ascii")}
        if 61 in asked:
            said[61] = asked[61]
        answer.options = said
        self.counters["nak"] += 1
        payload, _ = emit(answer)
        # RFC 2131 section 4.3.2: the client's address cannot be relied on.
        return DhcpReply(payload, _EVERYWHERE, CLIENT_PORT, _EVERYONE, True)

    def _largest(self, asked: dict[int, bytes]) -> int:
        """How many bytes an answer may have: what the client accepts and the MTU carries (option 57)."""
        takes = int.from_bytes(asked[57], "big") if 57 in asked else _SMALLEST_MAXIMUM
        return max(_SMALLEST_MAXIMUM, min(takes, self._config.mtu)) - _IP_AND_UDP

    def _send(
        self, answer: Message, message: Message, client: _Client, largest: int, *, overload: bool = True
    ) -> DhcpReply:
        payload, dropped = emit(answer, largest, overload=overload)
        if dropped:
            self.counters["options_without_room"] += len(dropped)
        # RFC 2131 section 4.1.
        if message.ciaddr != NOWHERE and message.ciaddr in self._config.subnet:
            return DhcpReply(payload, message.ciaddr, CLIENT_PORT, client.mac, False)
        if message.flags & BROADCAST or answer.yiaddr == NOWHERE:
            return DhcpReply(payload, _EVERYWHERE, CLIENT_PORT, _EVERYONE, True)
        return DhcpReply(payload, answer.yiaddr, CLIENT_PORT, client.mac, False)
