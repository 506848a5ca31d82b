"""Published ports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guestnet.api.base import NetworkBase
from guestnet.control.portal import blocking
from guestnet.errors import (
    ForwardNotFound,
)
from guestnet.model.forward_spec import ForwardSpec
from guestnet.model.handles import Handles
from guestnet.runtime.published.forward import Forward
from guestnet.runtime.published.host_sockets import close_sockets, open_sockets

if TYPE_CHECKING:
    pass


class PortMethods(NetworkBase):
    """Published ports."""

    @property
    def forwards(self) -> Handles[Forward]:
        """All published ports, oldest first, with those that guests opened. `forwards[id]` finds one."""
        session = self._session
        found = [] if session is None else session.publishing.all()
        return Handles(found, "published port", ForwardNotFound)

    async def apublish(self, spec: str | ForwardSpec) -> Forward:
        """Publishes ports of a guest on the host.

        With the uplink "tun", a port without `host_ip` belongs to the external address and leads to the guest
        by translation. A port with an address of the host is a socket there, as with the uplink "sockets".

        Args:
            spec: `[host_ip:]port[-end]:[guest:]port[-end][/tcp|/udp]`, or a `ForwardSpec`. The guest is an
                endpoint's id, host name or address; it need not exist yet. Without a guest, the only one is
                meant.

        Returns:
            The published ports. All ports of a range are published, or none.

        Raises:
            PortInUse: A port of the host is in use.
            ConfigError: The text is wrong, or does not say which of several guests is meant.
            TooManyFiles: The process can open no more descriptors.
            NotRunning: The network does not run.
        """
        wanted = ForwardSpec.of(spec)
        session = self._live()
        sockets = open_sockets(wanted) if session.publishing.needs_sockets(wanted) else []
        try:
            return await self._do(session.publish(wanted, sockets))
        finally:
            close_sockets(sockets)

    publish = blocking(apublish)

    async def aunpublish(self, forward: Forward | str) -> None:
        """Closes published ports. Connections stay open.

        Args:
            forward: What `publish` returned, or its id.

        Raises:
            ForwardNotFound: It is not published.
            TypeError: It is not a `Forward`, nor an id.
        """
        session = self._live()
        if isinstance(forward, str):
            forward = self.forwards[forward]
        elif not isinstance(forward, Forward):
            raise TypeError(f"{forward!r} is not a Forward: give one that `publish` returned, or its id.")
        await self._do(session.unpublish(forward))

    unpublish = blocking(aunpublish)
