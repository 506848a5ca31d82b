"""The limits of one running network: what all guests together carry, and what each of them does.

Theory of operation: the limits of the network and of guests are kept by endpoint, so that they outlive a
port. An endpoint has the limit that was set for it, else that of all guests. The data plane gets a guest's
limit when the guest has a port.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestnet.errors import UnsupportedError
from guestnet.model.spec import NetMode

if TYPE_CHECKING:
    from guestnet.control.channel import Control
    from guestnet.policy.limit import Limit
    from guestnet.runtime.port_table import PortTable


class LimitBook:
    """The limits of a network and its endpoints.

    Args:
        network: What all guests together may carry.
        guest: What each guest may carry that has no limit of its own.
    """

    def __init__(self, network: Limit | None, guest: Limit | None) -> None:
        self.network, self.guest = network, guest
        self.endpoints: dict[str, Limit | None] = {}

    def of(self, endpoint_id: str) -> Limit | None:
        """The limit of an endpoint.

        Args:
            endpoint_id: Its id.

        Returns:
            Its own, else that of all guests.
        """
        return self.endpoints.get(endpoint_id, self.guest)

    def forget(self, endpoint_id: str) -> None:
        """Forgets an endpoint that was removed.

        Args:
            endpoint_id: Its id.
        """
        self.endpoints.pop(endpoint_id, None)


class LimitControl:
    """Puts limits in force in the data plane.

    Args:
        book: The limits.
        mode: The mode of the network.
    """

    def __init__(self, book: LimitBook, mode: NetMode, control: Control, ports: PortTable) -> None:
        self._book, self._mode, self._control, self._ports = book, mode, control, ports

    async def open(self) -> None:
        """Limits the network, before the first guest has a port."""
        if self._book.network is not None:
            await self.set(self._book.network, None)
        elif self._book.guest is not None:
            self._check()

    def port_added(self, port: int, endpoint_id: str) -> None:
        """An endpoint has a port from now on.

        Args:
            port: The port.
            endpoint_id: The id of the endpoint.
        """
        limit = self._book.of(endpoint_id)
        if limit is not None:
            self._control.ensure(self._control.plane.set_limit, port, limit.for_data_plane())

    async def set(self, limit: Limit | None, endpoint_id: str | None) -> None:
        """Puts a limit in force, or takes it back.

        Args:
            limit: The limit; None: no limit.
            endpoint_id: The endpoint; None: all guests together.
        """
        self._check()
        if endpoint_id is None:
            self._book.network = limit
        else:
            self._book.endpoints[endpoint_id] = limit
        port = None if endpoint_id is None else self._ports.port(endpoint_id)
        if endpoint_id is None or port is not None:
            plain = None if limit is None else limit.for_data_plane()
            await self._control.do(self._control.plane.set_limit, port, plain)

    async def set_guest(self, limit: Limit | None) -> None:
        """Puts the limit in force that each guest has, but for guests with one of their own.

        Args:
            limit: The limit; None: no limit.
        """
        self._check()
        self._book.guest = limit
        plain = None if limit is None else limit.for_data_plane()
        for endpoint_id, port in self._ports.all():
            if endpoint_id not in self._book.endpoints:
                await self._control.do(self._control.plane.set_limit, port, plain)

    def _check(self) -> None:
        if self._mode is NetMode.BRIDGED:
            raise UnsupportedError(
                "Guests of a network in the mode 'bridged' are on a segment of the host, which guestnet does "
                "not limit: leave the limit out."
            )
