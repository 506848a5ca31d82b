"""DHCP servers on a registry of endpoints, with a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from guestnet import NatConfig
from guestnet.runtime.addresses6 import Addresses6
from guestnet.runtime.registry import Registry
from guestnet.services.dhcp import DhcpConfig, DhcpReply, DhcpServer, Lease, LeaseStore
from guestnet.services.dhcp6 import Dhcp6Config, Dhcp6Server

from . import dns_played
from .dhcp6_wire import GATEWAY_MAC, Said6
from .dhcp6_wire import ask as ask6
from .dhcp6_wire import read as read6
from .dhcp_wire import MAC, Said, ask, read

GATEWAY = IPv4Address("192.168.64.1")
PREFIX = IPv6Network("fd00:6e::/64")


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
        self.leased: list[Lease[IPv4Address]] = []
        self.released: list[Lease[IPv4Address]] = []
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


class Segment6:
    """What a guest sees of the DHCPv6 server."""

    def __init__(self, network: dict[str, Any] | None = None, **values: Any) -> None:
        self.now = 1000.0
        network = dict(network or {})
        reserved = {mac: IPv6Address(ip) for mac, ip in network.pop("reserved", {}).items()}
        self.registry = Registry(NatConfig(**network), lambda: self.now)
        self.book = Addresses6(
            self.registry,
            IPv4Network("192.168.64.0/24"),
            PREFIX,
            reserved,
            (PREFIX.network_address + 1,),
            lambda: self.now,
        )
        config: dict[str, Any] = {
            "mac": GATEWAY_MAC,
            "prefix": PREFIX,
            "dns": (PREFIX.network_address + 1,),
            "zone": "guestnet.internal",
            "search": ("guestnet.internal",),
        }
        self.store: LeaseStore[IPv6Address] = LeaseStore(self.book)
        self.server = Dhcp6Server(
            Dhcp6Config(**(config | values)), self.store, lambda: self.now, lambda: self.now
        )
        self.leased: list[Lease[IPv6Address]] = []
        self.released: list[Lease[IPv6Address]] = []
        self.server.on_lease = self.leased.append
        self.server.on_release = self.released.append

    def add(self, name: str, mac: bytes | None = MAC, **values: Any) -> None:
        self.registry.create(name, mac, **values)

    def send(
        self, payload: bytes, endpoint: str = "vm1", mac: bytes = MAC, *, unicast: bool = False
    ) -> bytes | None:
        return self.server.handle(payload, endpoint_id=endpoint, mac=mac, now=self.now, unicast=unicast)

    def ask(
        self, kind: int, *options: bytes, endpoint: str = "vm1", mac: bytes = MAC, unicast: bool = False
    ) -> Said6 | None:
        reply = self.send(ask6(kind, *options), endpoint, mac, unicast=unicast)
        return None if reply is None else read6(reply)

    def answer(self, kind: int, *options: bytes, **values: Any) -> Said6:
        said = self.ask(kind, *options, **values)
        assert said is not None
        return said

    def refusals(self) -> dict[str, int]:
        return {
            name.removeprefix("refused_"): count
            for name, count in self.server.counters.items()
            if name.startswith("refused_")
        }


@pytest.fixture
def segment6() -> Segment6:
    """One endpoint, vm1, with fd00:6e::2."""
    made = Segment6()
    made.add("vm1")
    return made
