"""The ports of the host that guests may open, and which of them a mapping gets.

- A port that was given back rests for two minutes, so that a client that still looks for one guest there does
  not find another (RFC 6888 REQ-8). The guest itself may have it again at once.
- The port of the other protocol with the same number goes to no other guest (RFC 6886 section 3.3).
- If no other port is free, the port that has rested longest is given.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any, Protocol

from guestnet.model.shares import fair_share

REST = 120.0
"""Seconds (RFC 6888 REQ-8)."""
_RESTING_MOST = 2048
"""Resting ports of each protocol; the oldest are forgotten first."""
_DRAWN = 24
"""How many ports are drawn at random before all of them are tried in order."""


class PortsOfHost(Protocol):
    """Opens ports: the network, or a test."""

    def external(self) -> IPv4Address | None:
        """The address by which the outside reaches the ports; None while there is none."""

    def holds(self, endpoint_id: str, address: IPv4Address) -> bool:
        """Whether the endpoint's guest was given this address."""

    async def open(self, endpoint_id: str, protocol: str, guest: tuple[IPv4Address, int], port: int) -> Any:
        """Opens a port that leads to a guest's port. Returns a handle for `close` and `drop`.

        Raises PortInUse, or another GuestnetError if no other port would help.
        """

    async def close(self, handle: Any) -> None:
        """Closes a port. When this is done, no new connection gets in."""

    def drop(self, handle: Any) -> None:
        """Closes a port soon, without waiting."""


class PortBook:
    """Which ports are taken, and by which endpoint. `draw` makes random numbers."""

    def __init__(self, first: int, last: int, draw: random.Random | None = None) -> None:
        self._ports = range(first, last + 1)
        self._draw = draw or random.SystemRandom()
        self._taken: dict[str, dict[int, str]] = {"tcp": {}, "udp": {}}
        self._resting: dict[str, OrderedDict[int, tuple[float, str]]] = {
            "tcp": OrderedDict(),
            "udp": OrderedDict(),
        }

    def take(self, protocol: str, port: int, endpoint_id: str) -> None:
        """Notes that a port was opened."""
        self._taken[protocol][port] = endpoint_id
        self._resting[protocol].pop(port, None)

    def free(self, protocol: str, port: int, now: float) -> None:
        """Notes that a port was closed; it rests from now on."""
        resting, endpoint_id = self._resting[protocol], self._taken[protocol].pop(port)
        resting[port] = (now + REST, endpoint_id)
        resting.move_to_end(port)
        while len(resting) > _RESTING_MOST:
            resting.popitem(last=False)

    def has_share(self, protocol: str, endpoint_id: str) -> bool:
        """Whether the share of an endpoint allows one more port of a protocol."""
        taken = self._taken[protocol]
        own = sum(1 for who in taken.values() if who == endpoint_id)
        return own < max(1, fair_share(len(self._ports), len(taken)))

    def may_have(self, protocol: str, port: int, endpoint_id: str, now: float) -> bool:
        """Whether a mapping of the endpoint can have this port."""
        return self._is_there(protocol, port, endpoint_id) and not any(
            until > now and who != endpoint_id
            for until, who in (each[port] for each in self._resting.values() if port in each)
        )

    def _is_there(self, protocol: str, port: int, endpoint_id: str) -> bool:
        if port not in self._ports or port in self._taken[protocol]:
            return False
        return all(taken.get(port, endpoint_id) == endpoint_id for taken in self._taken.values())

    def candidates(
        self, protocol: str, wanted: tuple[int, ...], endpoint_id: str, now: float
    ) -> Iterator[int]:
        """Ports to try, best first, each once: the wanted ones, then any."""
        tried: set[int] = set()
        for port in self._in_order(protocol, wanted, endpoint_id, now):
            if port not in tried:
                tried.add(port)
                yield port

    def _in_order(
        self, protocol: str, wanted: tuple[int, ...], endpoint_id: str, now: float
    ) -> Iterator[int]:
        ports, resting = self._ports, self._resting[protocol]
        drawn = (self._draw.choice(ports) for _ in range(_DRAWN))
        for port in (*wanted, *drawn):
            if self.may_have(protocol, port, endpoint_id, now):
                yield port
        start = self._draw.randrange(len(ports))
        for at in range(len(ports)):
            port = ports[(start + at) % len(ports)]
            if self.may_have(protocol, port, endpoint_id, now):
                yield port
        # A port that still rests is better than none.
        for port in list(resting):
            if self._is_there(protocol, port, endpoint_id):
                yield port
