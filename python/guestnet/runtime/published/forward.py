"""Forward: a published port of a running network, as the program has it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from guestnet.control.portal import blocking
from guestnet.model.forward_spec import ForwardSpec, show


class Forward:
    """A published port, or a range of them. `NatNetwork.publish` returns it.

    Example:
        >>> from guestnet import NatNetwork
        >>> with NatNetwork() as network:
        ...     vm = network.create_endpoint("vm1")
        ...     forward = network.publish("127.0.0.1:0:vm1:80")
        ...     str(forward.target), forward.protocol, forward.host_port > 0
        ('192.168.64.2', 'tcp', True)
    """

    def __init__(
        self,
        id: str,
        spec: ForwardSpec,
        host_ports: tuple[int, ...],
        numbers: tuple[int, ...],
        close: Callable[[Forward], Coroutine[Any, Any, None]],
    ) -> None:
        self._close = close
        self.id = id
        """Its id, unique for the life of the network."""
        self.spec = spec
        self.host_ports = host_ports
        """The ports of the host; where the kernel was to choose one, the one it chose."""
        self.addresses: tuple[IPv4Address | IPv6Address, ...] = ()
        """The addresses of the host that they are open on; 0.0.0.0 and :: stand for all of a family."""
        self.numbers = numbers
        self.endpoint_id: str | None = None
        """The guest that a forward without a name found."""
        self.target: IPv4Address | None = None
        """Where it leads now, None while its guest is not there."""
        self.asked_by: str | None = None
        """The id of the guest that opened it itself (PCP); None of what the network's owner published."""

    @property
    def host_port(self) -> int:
        """The first port of the host."""
        return self.host_ports[0]

    @property
    def protocol(self) -> str:
        """The protocol, 'tcp' or 'udp'."""
        return self.spec.protocol

    async def aclose(self) -> None:
        """Closes the ports, as `NatNetwork.unpublish` does. Connections stay open.

        Nothing happens if they are closed already, or if the network has ended.
        """
        await self._close(self)

    close = blocking(aclose)

    def __str__(self) -> str:
        by = "" if self.asked_by is None else f" (opened by {self.asked_by})"
        return show(self.spec, self.host_ports, self.addresses, self.endpoint_id) + by

    def __repr__(self) -> str:
        return f"<Forward {self.id} {self}>"
