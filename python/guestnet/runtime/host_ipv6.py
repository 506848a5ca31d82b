"""Follows whether the host has IPv6, so that guests have a default route exactly while it leads somewhere.

The kernel reports every change of routes and addresses; a burst of them is looked at once. Nothing runs
while nothing changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from guestnet._linux.host_addresses import has_ipv6, ipv6_changes

if TYPE_CHECKING:
    from guestnet.control.channel import Control

_log = logging.getLogger("guestnet")

_SETTLE_SECONDS = 0.5
"""An interface that comes up changes many routes."""


class HostIpv6:
    """Of one session.

    Args:
        control: The data plane that is told.
        known: What the data plane was told at its start.
    """

    def __init__(self, control: Control, known: bool) -> None:
        self._control, self._known = control, known
        self._sock: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Follows the host from now on."""
        try:
            self._sock = ipv6_changes()
        except OSError as error:
            _log.warning("the IPv6 of this host is not followed: %s", error)
            return
        self._control.loop.add_reader(self._sock.fileno(), self._changed)
        self._look()

    def close(self) -> None:
        """Follows it no more."""
        if self._timer is not None:
            self._timer.cancel()
        sock, self._sock = self._sock, None
        if sock is not None:
            self._control.loop.remove_reader(sock.fileno())
            sock.close()

    def _changed(self) -> None:
        assert self._sock is not None
        # It is empty, or some changes were lost: the host is asked in any case.
        with contextlib.suppress(OSError):
            while self._sock.recv(65536):
                pass
        if self._timer is None:
            self._timer = self._control.loop.call_later(_SETTLE_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        found = has_ipv6()
        if found != self._known:
            self._known = found
            _log.info("this host %s IPv6: guests are told", "has" if found else "no longer has")
            self._control.ensure(self._control.plane.set_upstream6, found)
