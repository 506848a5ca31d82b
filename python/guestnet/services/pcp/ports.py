"""The ports of the host that guests may open, and which of them a mapping gets.

A port that was given back rests for two minutes, so that who still looks for one guest there does not find
another (RFC 6888 REQ-8); the guest itself may have it again at once. The port of the other protocol with the
same number goes to no other guest (RFC 6886 section 3.3). Where nothing else is left, the one that has rested
longest is given.
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
"""Of each protocol; those that have rested longest are forgotten first."""
_DRAWN = 24
"""Ports that are drawn at random before they are looked through one by one."""


class PortsOfHost(Protocol):
    """What opens ports: the network, or a test."""

    def external(self) -> IPv4Address | None:
        """The address that the outside reaches the ports by; None while there is none."""

    def holds(self, endpoint_id: str, address: IPv4Address) -> bool:
        """Whether the address is one that the endpoint's guest was given."""

    async def open(self, endpoint_id: str, protocol: str, guest: tuple[IPv4Address, int], port: int) -> Any:
        """Leads a port to a guest's; returns what `close` and `drop` want. Raises PortInUse, or another
        GuestnetError where no port would do better."""

    async def close(self, handle: Any) -> None:
        """Takes it back; nobody gets in by it any more when this is done."""

    def drop(self, handle: Any) -> None:
        """Takes it back, soon."""


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
        """It is open now."""
        self._taken[protocol][port] = endpoint_id
        self._resting[protocol].pop(port, None)

    def free(self, protocol: str, port: int, now: float) -> None:
        """It is closed now, and rests."""
        resting, endpoint_id = self._resting[protocol], self._taken[protocol].pop(port)
        resting[port] = (now + REST, endpoint_id)
        resting.move_to_end(port)
        while len(resting) > _RESTING_MOST:
            resting.popitem(last=False)

    def has_share(self, protocol: str, endpoint_id: str) -> bool:
        """Whether an endpoint may have one more port of a protocol, as far as its share goes."""
        taken = self._taken[protocol]
        own = sum(1 for who in taken.values() if who == endpoint_id)
        return own < max(1, fair_share(len(self._ports), len(taken)))

    def may_have(self, protocol: str, port: int, endpoint_id: str, now: float) -> bool:
        """Whether a mapping of the endpoint can have it."""
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
        """Ports to try, best first, each once: those that are wanted, then any."""
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
        # It is a pity that it has not rested, and a greater one if there were none.
        for port in list(resting):
            if self._is_there(protocol, port, endpoint_id):
                yield port
