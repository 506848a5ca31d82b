"""The data plane hears when the host's IPv6 comes or goes, once for each change."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from guestnet.runtime import host_ipv6
from guestnet.runtime.host_ipv6 import HostIpv6


class World:
    """A host whose IPv6 the test decides, and what the data plane was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loop: asyncio.AbstractEventLoop, has: bool) -> None:
        self.has, self.told, self.looks = has, [], 0
        self.kernel, guestnet = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        guestnet.setblocking(False)
        monkeypatch.setattr(host_ipv6, "has_ipv6", self._look)
        monkeypatch.setattr(host_ipv6, "ipv6_changes", lambda: guestnet)
        monkeypatch.setattr(host_ipv6, "_SETTLE_SECONDS", 0)
        plane = SimpleNamespace(set_upstream6=self.told.append)
        self.control: Any = SimpleNamespace(loop=loop, plane=plane, ensure=lambda f, value: f(value))

    told: list[bool]

    def _look(self) -> bool:
        self.looks += 1
        return self.has

    async def change(self, has: bool) -> None:
        """The kernel reports several changes, and all has been handled."""
        before, self.has = self.looks, has
        for _ in range(3):
            self.kernel.send(b"change")
        async with asyncio.timeout(5):
            while self.looks == before:  # noqa: ASYNC110 - a turn of the loop, no time
                await asyncio.sleep(0)


def test_changes_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        world = World(monkeypatch, asyncio.get_running_loop(), has=True)
        host = HostIpv6(world.control, known=True)
        host.open()
        assert world.told == []
        for has in (True, False, False, True):
            await world.change(has)
        assert world.told == [False, True]
        host.close()
        world.kernel.close()

    asyncio.run(main())


def test_what_changed_before_it_began_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        world = World(monkeypatch, asyncio.get_running_loop(), has=False)
        host = HostIpv6(world.control, known=True)
        host.open()
        assert world.told == [False]
        host.close()
        world.kernel.close()

    asyncio.run(main())


def test_a_system_without_reports_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> socket.socket:
        raise OSError("no netlink")

    monkeypatch.setattr(host_ipv6, "ipv6_changes", none)
    host = HostIpv6(SimpleNamespace(), known=True)  # type: ignore[arg-type]
    host.open()
    host.close()
