"""The rules of a running network, as its owner changes them.

They hold until the network is stopped. The data plane judges running flows by new rules and cuts those that
are no longer allowed; a change is done when it has judged all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guestnet.control.channel import Control
from guestnet.errors import UnsupportedError
from guestnet.model.spec import NatConfig, NetMode
from guestnet.runtime.port_table import PortTable


class Rules:
    """The rules of one session.

    Args:
        mode_changed: Called with the mode that the network has from now on.
    """

    def __init__(
        self,
        config: NatConfig,
        control: Control,
        ports: PortTable,
        mode_changed: Callable[[NetMode], None],
    ) -> None:
        self._control, self._ports, self._mode_changed = control, ports, mode_changed
        self.mode = config.mode
        self._isolated = config.isolated
        self._trusted: frozenset[str] = frozenset()
        """Endpoints that open flows to others although guests are isolated."""

    async def set_mode(self, mode: NetMode) -> int:
        """Changes the mode; the number of flows that were cut."""
        if NetMode.BRIDGED in (mode, self.mode):
            raise UnsupportedError(
                f"A running network in the mode {self.mode.value!r} does not get the mode {mode.value!r}: "
                "stop it and start one with that mode."
            )
        before, self.mode = self.mode, mode
        self._mode_changed(mode)
        try:
            return await self._change()
        except BaseException:
            self.mode = before
            self._mode_changed(before)
            raise

    async def set_isolation(self, isolated: bool, trusted: frozenset[str]) -> int:
        """Isolates guests from each other, or ends that; the number of flows that were cut."""
        if self.mode is NetMode.BRIDGED:
            raise UnsupportedError(
                "Guests of a network in the mode 'bridged' are on a segment of the host, for which guestnet "
                "has no rules: isolate them there."
            )
        self._isolated, self._trusted = isolated, trusted
        return await self._change()

    def port_added(self, endpoint_id: str) -> None:
        """An endpoint has a port from now on."""
        if endpoint_id in self._trusted:
            arguments, keywords = self._arguments()
            self._control.ensure(self._control.plane.set_policy, *arguments, **keywords)

    async def _change(self) -> int:
        arguments, keywords = self._arguments()
        cut: int = await self._control.do(self._control.plane.set_policy, *arguments, **keywords)
        return cut

    def _arguments(self) -> tuple[tuple[str], dict[str, Any]]:
        ports = (self._ports.port(name) for name in self._trusted)
        trusted = [port for port in ports if port is not None]
        return (self.mode.value,), {"isolated": self._isolated, "trusted": trusted}
