"""The server of PCP (RFC 6887) and of NAT-PMP (RFC 6886): one datagram in, at most one out.

The opcode PEER and the options THIRD_PARTY and FILTER are refused as the RFC says.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address

from guestnet.model.stats import MappingRecord
from guestnet.services.pcp import message, natpmp
from guestnet.services.pcp.mapper import Mapper, PcpConfig, Wanted
from guestnet.services.pcp.message import MapRequest, PcpError, Result
from guestnet.services.pcp.natpmp import PmpRequest, PmpResult
from guestnet.services.pcp.ports import PortsOfHost
from guestnet.services.pcp.table import Mapping

_PROTOCOLS = {6: "tcp", 17: "udp"}
_ALL = 0
"""As a protocol, all; as an internal port, every port."""
_PMP_RESULTS = {
    Result.NOT_AUTHORIZED: PmpResult.NOT_AUTHORIZED,
    Result.NETWORK_FAILURE: PmpResult.NETWORK_FAILURE,
}
_EPOCH_MASK = 0xFFFFFFFF


class GuestGone(Exception):
    """The guest left while it was served, so there is nobody to answer."""


class PcpServer:
    """Answers PCP and NAT-PMP clients, from `start` to `stop`. `network.services.pcp` is the server of a
    network.

    Set `on_open` and `on_close` before `start`.

    Example:
        >>> from guestnet import NatNetwork
        >>> NatNetwork(pcp_ports=(40000, 40999)).services.pcp.mappings()
        []
    """

    def __init__(
        self,
        config: PcpConfig,
        clock: Callable[[], float] = time.monotonic,
        draw: random.Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._clock = clock
        self._wall_clock = wall_clock
        self._draw = draw
        self._mapper = Mapper(config, clock, draw)
        self.on_open: Callable[[Mapping], object] = lambda _mapping: None
        """Called when a guest has opened a port."""
        self.on_close: Callable[[Mapping], object] = lambda _mapping: None
        """Called when a port is closed: given back, expired, or the guest has left."""
        self.counters: Counter[str] = Counter()
        """Requests by kind ("map", "delete", "announce", "pmp_map", ...) and refusals by reason ("refused_"
        and the reason)."""

    def start(self, ports: PortsOfHost) -> None:
        """Starts without mappings, at epoch zero (RFC 6887 section 8.5).

        Args:
            ports: Opens and closes ports of the host.
        """
        mapper = self._mapper = Mapper(self._config, self._clock, self._draw)
        mapper.ports = self._ports = ports
        mapper.on_open, mapper.on_close = self.on_open, self.on_close
        self._epoch = self._clock()
        self._external: IPv4Address | None = None
        # One at a time: a request waits for the packet thread once or twice, and a guest has few under way.
        self._turn = asyncio.Lock()

    def stop(self) -> None:
        """Ends all mappings."""
        self._mapper.remove_all()

    def mappings(self) -> list[MappingRecord]:
        """Lists the ports that guests opened, oldest first. From any thread.

        Returns:
            One record for each.
        """
        to_wall = self._wall_clock() - self._clock()
        return [
            MappingRecord(
                one.endpoint_id,
                one.address,
                one.protocol,
                one.internal_port,
                one.external_port,
                one.expires + to_wall,
            )
            for one in self._mapper.all()
        ]

    def next_expiry(self) -> float | None:
        """Says when `expire` should be called next.

        Returns:
            In how many seconds, None while no mapping expires.
        """
        return self._mapper.next_expiry()

    def expire(self) -> None:
        """Ends the mappings that are over. `handle` does so too."""
        self._mapper.expire()

    def remove_endpoint(self, endpoint_id: str) -> None:
        """Ends the mappings of an endpoint that was removed.

        Args:
            endpoint_id: The endpoint.
        """
        self._mapper.remove_endpoint(endpoint_id)

    def remove_address(self, address: IPv4Address) -> None:
        """Ends the mappings to an address that its guest no longer has.

        Args:
            address: The address.
        """
        self._mapper.remove_address(address)

    def closed(self, handle: object) -> None:
        """Notes that a port was closed by someone else.

        Args:
            handle: What opening the port returned.
        """
        self._mapper.closed(handle)

    # --- requests ---

    async def handle(self, payload: bytes, *, endpoint_id: str, source: IPv4Address) -> bytes | None:
        """Answers a datagram of a guest. A request that is refused is counted by reason.

        Args:
            payload: The datagram.
            endpoint_id: The endpoint that sent it.
            source: Its source address.

        Returns:
            The answer, None when there is none.
        """
        if len(payload) < 2:
            self._refused("too_short")
            return None
        if payload[1] & message.ANSWER_BIT:
            self._refused("not_a_request")
            return None
        async with self._turn:
            self.expire()
            serve = self._pmp if payload[0] == natpmp.VERSION else self._pcp
            try:
                return await serve(payload, endpoint_id, source)
            except GuestGone:
                self._refused("guest_gone")
            except natpmp.WrongLength:
                self._refused("malformed_request")
        return None

    def _refused(self, reason: str) -> None:
        self.counters[f"refused_{reason.lower()}"] += 1

    def _seconds(self) -> int:
        return int(self._clock() - self._epoch) & _EPOCH_MASK

    def _address(self) -> IPv4Address:
        """The external address.

        If it has changed, clients have to map again, as after a loss of state: the epoch restarts.
        """
        external = self._ports.external()
        if external is None:
            raise PcpError(Result.NETWORK_FAILURE)
        if self._external not in (None, external):
            self._epoch = self._clock()
        self._external = external
        return external

    # --- PCP ---

    async def _pcp(self, payload: bytes, endpoint_id: str, source: IPv4Address) -> bytes:
        try:
            if payload[0] != message.VERSION:
                raise PcpError(Result.UNSUPP_VERSION)
            asked = message.read(payload, source)
            if asked is None:
                self.counters["announce"] += 1
                return message.answer_announce(self._seconds())
            if not asked.lifetime:
                self.counters["delete"] += 1
                await self._delete(asked, endpoint_id, source)
                return message.answer_delete(payload, self._seconds())
            self.counters["map"] += 1
            return await self._map(asked, endpoint_id, source)
        except PcpError as error:
            self._refused(error.result.name)
            return message.answer_error(payload, error, self._seconds())

    async def _map(self, asked: MapRequest, endpoint_id: str, source: IPv4Address) -> bytes:
        protocol = _PROTOCOLS.get(asked.protocol)
        if protocol is None or asked.internal_port == _ALL:
            raise PcpError(Result.UNSUPP_PROTOCOL)  # all ports for one guest, too
        external = self._address()
        wanted = Wanted(
            endpoint_id,
            source,
            protocol,
            asked.internal_port,
            asked.nonce,
            asked.lifetime,
            asked.external_port,
            asked.external,
            asked.prefer_failure,
        )
        mapping = await self._mapper.map(wanted, external)
        if mapping is None:
            raise GuestGone
        left = self._mapper.left(mapping)
        return message.answer_map(asked, mapping.external_port, external, left, self._seconds())

    async def _delete(self, asked: MapRequest, endpoint_id: str, source: IPv4Address) -> None:
        protocol = _PROTOCOLS.get(asked.protocol)
        if protocol is None and asked.protocol != _ALL:
            raise PcpError(Result.UNSUPP_PROTOCOL)
        port = None if protocol is None or asked.internal_port == _ALL else asked.internal_port
        await self._mapper.delete(endpoint_id, source, asked.nonce, protocol, port)

    # --- NAT-PMP ---

    async def _pmp(self, payload: bytes, endpoint_id: str, source: IPv4Address) -> bytes:
        try:
            asked = natpmp.read(payload)
        except natpmp.UnsupportedOpcode:
            self._refused(Result.UNSUPP_OPCODE.name)
            return natpmp.answer_opcode(payload[1], self._seconds())
        try:
            if asked is None:
                self.counters["pmp_address"] += 1
                return natpmp.answer_address(PmpResult.SUCCESS, self._address(), self._seconds())
            if not asked.lifetime:
                self.counters["pmp_delete"] += 1
                port = asked.internal_port or None
                await self._mapper.delete(endpoint_id, source, None, asked.protocol, port)
                return natpmp.answer_map(asked, PmpResult.SUCCESS, 0, 0, self._seconds())
            self.counters["pmp_map"] += 1
            return await self._pmp_map(asked, endpoint_id, source)
        except PcpError as error:
            self._refused(error.result.name)
            result = _PMP_RESULTS.get(error.result, PmpResult.OUT_OF_RESOURCES)
            if asked is None:
                return natpmp.answer_address(result, None, self._seconds())
            return natpmp.answer_map(asked, result, 0, 0, self._seconds())

    async def _pmp_map(self, asked: PmpRequest, endpoint_id: str, source: IPv4Address) -> bytes:
        if asked.internal_port == _ALL:
            raise PcpError(Result.NOT_AUTHORIZED)  # all ports for one guest
        who = (endpoint_id, source, asked.protocol, asked.internal_port)
        wanted = Wanted(*who, None, asked.lifetime, asked.external_port)
        mapping = await self._mapper.map(wanted, self._address())
        if mapping is None:
            raise GuestGone
        port, left = mapping.external_port, self._mapper.left(mapping)
        return natpmp.answer_map(asked, PmpResult.SUCCESS, port, left, self._seconds())
