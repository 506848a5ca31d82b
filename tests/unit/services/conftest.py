"""A DHCP server on a registry of endpoints, with a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from guestnet import NatConfig
from guestnet.runtime.registry import Registry
from guestnet.services.dhcp import DhcpConfig, DhcpReply, DhcpServer, Lease, LeaseStore

from . import dns_played
from .dhcp_wire import MAC, Said, ask, read

GATEWAY = IPv4Address("192.168.64.1")


class Segment:
    """What a guest sees of the server."""

    def __init__(self, network: dict[str, Any] | None = None, **values: Any) -> None:
        self.now = 1000.0
        self.registry = Registry(NatConfig(**(network or {})), lambda: self.now)
        config: dict[str, Any] = {
            "server": GATEWAY,
            "subnet": IPv4Network("192.168.64.0/24"),
            "router": GATEWAY,
            "dns": (GATEWAY,),
            "domain": "guestnet.internal",
            "search": ("guestnet.internal",),
        }
        self.store = LeaseStore(self.registry)
        self.server = DhcpServer(
            DhcpConfig(**(config | values)), self.store, lambda: self.now, lambda: self.now
        )
        self.leased: list[Lease] = []
        self.released: list[Lease] = []
        self.server.on_lease = self.leased.append
        self.server.on_release = self.released.append

    def add(self, name: str, mac: bytes = MAC, **values: Any) -> None:
        self.registry.create(name, mac, **values)

    def send(self, payload: bytes, endpoint: str = "vm1", mac: bytes = MAC) -> DhcpReply | None:
        return self.server.handle(payload, endpoint_id=endpoint, mac=mac, now=self.now)

    def ask(
        self,
        kind: int,
        options: list[tuple[int, bytes]] | None = None,
        endpoint: str = "vm1",
        mac: bytes = MAC,
        **fields: Any,
    ) -> Said | None:
        reply = self.send(ask(kind, options, mac=mac, **fields), endpoint, mac)
        return None if reply is None else read(reply.payload)

    def answer(self, kind: int, options: list[tuple[int, bytes]] | None = None, **values: Any) -> Said:
        said = self.ask(kind, options, **values)
        assert said is not None
        return said

    def refusals(self) -> dict[str, int]:
        return {
            name.removeprefix("refused_"): count
            for name, count in self.server.counters.items()
            if name.startswith("refused_")
        }


@pytest.fixture
def segment() -> Segment:
    """One endpoint, vm1, with 192.168.64.2."""
    made = Segment()
    made.add("vm1")
    return made


@pytest.fixture(autouse=True)
def _networks() -> Iterator[None]:
    """Stops the networks that a test of DNS started."""
    yield
    dns_played.Served.close_all()
