"""Ports of the host that guests open themselves (PCP): forwards like those of the network's owner."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from guestnet.errors import GuestnetError, PortInUse
from guestnet.model.forward_spec import ForwardSpec
from guestnet.runtime.published.host_sockets import close_sockets, open_sockets

if TYPE_CHECKING:
    from guestnet.model.spec import NatConfig
    from guestnet.runtime.published.forward import Forward
    from guestnet.runtime.published.publishing import Publishing
    from guestnet.runtime.registry import Registry

_EVERYWHERE = IPv4Address("0.0.0.0")
_OUTSIDE = ("192.0.2.1", "198.51.100.1", "203.0.113.1")
"""Addresses of nobody (RFC 5737), for a look at the routes: nothing is sent there."""


class GuestPorts:
    """The ports of one running network."""

    def __init__(self, config: NatConfig, registry: Registry, publishing: Publishing) -> None:
        self._config, self._registry, self._publishing = config, registry, publishing

    def check(self) -> None:
        """Tries the first port, so that a range that this process may not open is refused at once.

        Raises GuestnetError. A port that is in use is no fault: guests get another one.
        """
        config = self._config
        assert config.pcp_ports is not None
        spec = self._spec("tcp", config.pcp_ports[0], config.subnet[2], 1)
        if not self._publishing.needs_sockets(spec):
            return
        try:
            close_sockets(open_sockets(spec))
        except PortInUse:
            pass
        except GuestnetError as error:
            raise GuestnetError(f"Guests cannot open the ports of `pcp_ports`. {error}") from error

    def external(self) -> IPv4Address | None:
        """The address that the outside reaches the ports by; None while the host has no way out."""
        if self._config.pcp_address is not None:
            return self._config.pcp_address
        external = self._publishing.external
        return external[0] if external else address_outside()

    def holds(self, endpoint_id: str, address: IPv4Address) -> bool:
        """Whether the endpoint's guest was given the address."""
        return self._registry.holds(endpoint_id, address)

    async def open(
        self, endpoint_id: str, protocol: str, guest: tuple[IPv4Address, int], port: int
    ) -> Forward:
        """Leads a port to a guest's. Raises PortInUse, or another GuestnetError where no other would do."""
        publishing = self._publishing
        spec = self._spec(protocol, port, *guest)
        if not publishing.needs_sockets(spec):
            return await publishing.add_external(spec, endpoint_id)
        sockets = open_sockets(spec)
        try:
            return await publishing.add(spec, sockets, endpoint_id)
        finally:
            close_sockets(sockets)

    def _spec(self, protocol: str, port: int, address: IPv4Address, guest_port: int) -> ForwardSpec:
        host_ip = self._config.pcp_address
        if host_ip is None and self._publishing.external is None:
            host_ip = _EVERYWHERE  # of IPv4: that is what the guest asked for
        ports = range(port, port + 1), range(guest_port, guest_port + 1)
        return ForwardSpec(*ports, protocol, host_ip, str(address))

    async def close(self, handle: Forward) -> None:
        """Takes it back; nobody gets in by it any more when this is done."""
        await self._publishing.remove(handle)

    def drop(self, handle: Forward) -> None:
        """Takes it back, soon."""
        self._publishing.drop(handle)


def address_outside() -> IPv4Address | None:
    """The address that this host has towards the outside, by its routes."""
    for somebody in _OUTSIDE:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            try:
                probe.connect((somebody, 9))
            except OSError:
                continue
            address = IPv4Address(probe.getsockname()[0])
        if not address.is_unspecified and not address.is_loopback:
            return address
    return None
