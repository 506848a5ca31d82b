"""The rules for mappings that PCP and NAT-PMP share.

Theory of operation: the mapper opens no port and knows no network; `PortsOfHost` does both. A guest opens
ports of the host for itself only, within the range that the owner allowed, and within its share.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import islice

from guestnet.errors import GuestnetError, PortInUse
from guestnet.model.shares import fair_share
from guestnet.services.pcp.message import PcpError, Result
from guestnet.services.pcp.ports import PortBook, PortsOfHost
from guestnet.services.pcp.table import Mapping, MappingTable

_log = logging.getLogger("guestnet")

_TRIES = 64
"""How many ports are tried for a mapping, because programs of the host may use some."""


@dataclass(frozen=True, kw_only=True)
class PcpConfig:
    """The settings of the server.

    `first` and `last` are the ports of the host that guests may open. Lifetimes are in seconds (RFC 6887
    section 15). `per_endpoint` bounds the mappings of one guest, `most` those of all guests.
    """

    first: int
    last: int
    shortest: int = 120
    longest: int = 86400
    per_endpoint: int = 32
    most: int = 1024


@dataclass(frozen=True)
class Wanted:
    """A mapping that a guest asks for. `external` None is any address, `external_port` 0 any port."""

    endpoint_id: str
    address: IPv4Address
    protocol: str
    internal_port: int
    nonce: bytes | None
    lifetime: int
    external_port: int = 0
    external: IPv4Address | IPv6Address | None = None
    strict: bool = False
    """The guest accepts this port and this address only."""


class Mapper:
    """The mappings of one run of a network. Methods that wait are called one at a time."""

    def __init__(
        self,
        config: PcpConfig,
        clock: Callable[[], float] = time.monotonic,
        draw: random.Random | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._table = MappingTable()
        self._book = PortBook(config.first, config.last, draw)
        self._opening: tuple[str, IPv4Address] | None = None
        """The guest whose port is being opened; None when the guest has left."""
        self.ports: PortsOfHost
        self.on_open: Callable[[Mapping], object] = lambda _mapping: None
        self.on_close: Callable[[Mapping], object] = lambda _mapping: None

    # --- looking ---

    def all(self) -> list[Mapping]:
        """Returns the mappings that are open, oldest first."""
        now = self._clock()
        return [mapping for mapping in self._table.all() if mapping.expires > now]

    def left(self, mapping: Mapping) -> int:
        """Returns how many seconds a mapping has left, rounded up."""
        return math.ceil(mapping.expires - self._clock())

    def next_expiry(self) -> float | None:
        """Returns in how many seconds `expire` should be called next; None while no mapping expires."""
        first = self._table.look_at()
        return None if first is None else max(0.0, first - self._clock())

    # --- ends ---

    def expire(self) -> None:
        """Ends the mappings that have expired."""
        self._end(self._table.over(self._clock()))

    def remove_endpoint(self, endpoint_id: str) -> None:
        """Ends the mappings of the guest of an endpoint."""
        if self._opening is not None and self._opening[0] == endpoint_id:
            self._opening = None
        self._end(mapping for mapping in self._table.all() if mapping.endpoint_id == endpoint_id)

    def remove_address(self, address: IPv4Address) -> None:
        """Ends the mappings to an address."""
        if self._opening is not None and self._opening[1] == address:
            self._opening = None
        self._end(mapping for mapping in self._table.all() if mapping.address == address)

    def remove_all(self) -> None:
        """Ends all mappings."""
        self._opening = None
        self._end(self._table.all())

    def closed(self, handle: object) -> None:
        """Notes that a port was closed by someone else."""
        for mapping in self._table.all():
            if mapping.handle is handle:
                self._forget(mapping)

    def _end(self, mappings: Iterable[Mapping]) -> None:
        for mapping in mappings:
            self._forget(mapping)
            self.ports.drop(mapping.handle)

    def _forget(self, mapping: Mapping) -> None:
        self._table.remove(mapping)
        self._book.free(mapping.protocol, mapping.external_port, self._clock())
        self.on_close(mapping)

    async def delete(
        self,
        endpoint_id: str,
        address: IPv4Address,
        nonce: bytes | None,
        protocol: str | None,
        internal_port: int | None,
    ) -> None:
        """Ends one mapping of a guest, or with None all mappings of a protocol, or all of its mappings.

        It is no error if there is no such mapping (RFC 6887 section 15). Mappings with another nonce stay,
        which is a PcpError.
        """
        foreign: Mapping | None = None
        for mapping in self._table.all():
            if (mapping.endpoint_id, mapping.address) != (endpoint_id, address):
                continue
            if protocol not in (None, mapping.protocol) or internal_port not in (None, mapping.internal_port):
                continue
            if self._table.get(mapping.key) is not mapping:
                continue  # it ended while another was being closed
            if mapping.nonce != nonce:
                foreign = mapping
                continue
            self._forget(mapping)
            await self.ports.close(mapping.handle)
        if foreign is not None:
            raise PcpError(Result.NOT_AUTHORIZED, self.left(foreign))

    # --- beginnings ---

    async def map(self, wanted: Wanted, external: IPv4Address) -> Mapping | None:
        """Makes or renews a mapping. `external` is the address that it will have.

        Returns None if the guest left meanwhile. Raises PcpError.
        """
        if not self.ports.holds(wanted.endpoint_id, wanted.address):
            raise PcpError(Result.NOT_AUTHORIZED)
        lifetime = min(max(wanted.lifetime, self._config.shortest), self._config.longest)
        mapping = self._table.get((wanted.address, wanted.protocol, wanted.internal_port))
        elsewhere = wanted.strict and wanted.external not in (None, external)
        if mapping is not None:
            if mapping.nonce != wanted.nonce:
                raise PcpError(Result.NOT_AUTHORIZED, self.left(mapping))
            if elsewhere or (wanted.strict and wanted.external_port not in (0, mapping.external_port)):
                raise PcpError(Result.CANNOT_PROVIDE_EXTERNAL)
            self._table.renew(mapping, self._clock() + lifetime)
            return mapping
        if elsewhere:
            raise PcpError(Result.CANNOT_PROVIDE_EXTERNAL)
        own, taken, most = self._table.count(wanted.endpoint_id), len(self._table), self._config.most
        if taken >= most:
            raise PcpError(Result.NO_RESOURCES)
        share = min(self._config.per_endpoint, max(1, fair_share(most, taken)))
        if own >= share or not self._book.has_share(wanted.protocol, wanted.endpoint_id):
            raise PcpError(Result.USER_EX_QUOTA)
        return await self._open(wanted, lifetime)

    async def _open(self, wanted: Wanted, lifetime: int) -> Mapping | None:
        endpoint_id, address, protocol = wanted.endpoint_id, wanted.address, wanted.protocol
        guest = (address, wanted.internal_port)
        me = self._opening = (endpoint_id, address)
        for port in self._to_try(wanted):
            try:
                handle = await self.ports.open(endpoint_id, protocol, guest, port)
            except PortInUse:
                continue
            except GuestnetError as error:
                _log.debug("a port for %s cannot be opened: %s", endpoint_id, error)
                raise PcpError(Result.NO_RESOURCES) from None
            if self._opening is not me:
                self.ports.drop(handle)
                return None
            expires = self._clock() + lifetime
            mapping = Mapping(
                endpoint_id, address, protocol, wanted.internal_port, port, wanted.nonce, expires, handle
            )
            self._book.take(protocol, port, endpoint_id)
            self._table.add(mapping)
            self.on_open(mapping)
            return mapping
        raise PcpError(Result.CANNOT_PROVIDE_EXTERNAL if wanted.strict else Result.NO_RESOURCES)

    def _to_try(self, wanted: Wanted) -> Iterable[int]:
        protocol, port, who, now = wanted.protocol, wanted.external_port, wanted.endpoint_id, self._clock()
        if wanted.strict and port:
            return (port,) if self._book.may_have(protocol, port, who, now) else ()
        # If the guest suggests no port, its own port number is easiest to remember.
        return islice(self._book.candidates(protocol, (port, wanted.internal_port), who, now), _TRIES)
