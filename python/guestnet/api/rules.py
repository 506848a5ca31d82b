"""The rules of a running network: its mode, and which guests open flows to each other."""

from __future__ import annotations

from collections.abc import Iterable

from guestnet.api.base import NetworkBase
from guestnet.control.portal import blocking
from guestnet.model.spec import NetMode, choice


class RuleMethods(NetworkBase):
    """Changes of the rules while the network runs. They hold until it is stopped."""

    @property
    def mode(self) -> NetMode:
        """The mode now: that of the configuration, or the one that `set_mode` set since the start."""
        session = self._running()
        return self._config.mode if session is None else session.rules.mode

    async def aset_mode(self, mode: str | NetMode) -> int:
        """Changes the mode of the running network. The change holds until the network is stopped.

        Flows that the new mode does not allow are cut: connections are reset at both ends, and what guests
        send on other flows is refused. All of that has happened when this returns.

        Args:
            mode: "nat" or "host_only".

        Returns:
            How many flows were cut.

        Raises:
            NotRunning: The network does not run.
            UnsupportedError: The network has the mode "bridged", or is to get it.
            ConfigError: There is no such mode.

        Example:
            >>> from guestnet import NatNetwork
            >>> with NatNetwork() as network:
            ...     cut = network.set_mode("host_only")
            ...     str(network.mode)
            'host_only'
        """
        return await self._do(self._live().rules.set_mode(choice(NetMode, "mode", mode)))

    set_mode = blocking(aset_mode)

    async def aset_isolation(self, isolated: bool, *, trusted: Iterable[str] = ()) -> int:
        """Isolates the guests of the running network from each other, or ends that.

        An isolated guest opens no flow to another guest. It can answer guests that are not isolated. The
        change holds until the network is stopped.

        Args:
            isolated: Whether guests are isolated.
            trusted: The ids of endpoints that are not isolated. The endpoints may be created later.

        Returns:
            How many conversations were cut that are known to have been open.

        Raises:
            NotRunning: The network does not run.
            UnsupportedError: The network has the mode "bridged".

        Example:
            >>> from guestnet import NatNetwork
            >>> with NatNetwork() as network:
            ...     network.set_isolation(True, trusted=("build-cache",))
            0
        """
        return await self._do(self._live().rules.set_isolation(bool(isolated), _endpoint_ids(trusted)))

    set_isolation = blocking(aset_isolation)


def _endpoint_ids(value: object) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"`trusted` {value!r} is not a list of endpoint ids: give a tuple such as ('vm1',).")
    ids = frozenset(value)
    if not all(isinstance(id, str) for id in ids):
        raise TypeError(f"`trusted` {value!r} has something that is not an endpoint id: ids are text.")
    return ids
