"""The published ports of a running network: which guest each of them leads to.

A forward may be published before its guest comes, and stays after the guest left. It names its guest by id,
by the host name that the owner gave it, by address, or not at all (the only guest). The worker has the
sockets from the first moment. While the guest is away it refuses every client, as a host does whose server
does not run.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

from guestnet.control.portal import blocking
from guestnet.errors import ConfigError, ForwardNotFound, PortInUse
from guestnet.runtime.forwards import ForwardSpec, close_sockets, show

if TYPE_CHECKING:
    from guestnet.control.channel import Control
    from guestnet.errors import GuestnetError
    from guestnet.model.spec import NatConfig
    from guestnet.runtime.endpoint import Endpoint
    from guestnet.runtime.network import NatNetwork
    from guestnet.runtime.registry import Registry

_log = logging.getLogger("guestnet")

_NOBODY = IPv4Address("0.0.0.0")
_CHOSEN = range(20000, 49152)
"""Below the ports that the engine gives to connections."""
_TRIES = 64


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
        spec: ForwardSpec,
        host_ports: tuple[int, ...],
        numbers: tuple[int, ...],
        owner: Callable[[], NatNetwork | None],
    ) -> None:
        self._owner = owner
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
        network = self._owner()
        if network is not None and network._running() is not None:
            with contextlib.suppress(ForwardNotFound):
                await network.aunpublish(self)

    close = blocking(aclose)

    def __str__(self) -> str:
        by = "" if self.asked_by is None else f" (opened by {self.asked_by})"
        return show(self.spec, self.host_ports, self.addresses, self.endpoint_id) + by

    def __repr__(self) -> str:
        return f"<Forward {self}>"


class Publishing:
    """All forwards of a session."""

    def __init__(
        self, control: Control, registry: Registry, owner: Callable[[], NatNetwork | None] = lambda: None
    ) -> None:
        self._owner = owner
        self._control = control
        self._registry = registry
        self._forwards: dict[int, Forward] = {}
        self._next = 1

    def all(self) -> list[Forward]:
        """All forwards, oldest first."""
        return list(self._forwards.values())

    def check(self, spec: ForwardSpec, config: NatConfig) -> None:
        """Refuses what could lead to several guests, or to none ever."""
        address, subnet = spec.guest_address, config.subnet
        if address is not None and (
            address not in subnet or address in (subnet.network_address, subnet.broadcast_address)
        ):
            raise ConfigError(
                f"The published port {spec} leads to {address}, which no guest of {subnet} can have: "
                f"choose one from {config.guest_range}, or a guest's name."
            )
        if spec.guest is None and len(self._registry) > 1:
            names = ", ".join(endpoint.id for endpoint in self._registry.all()[:4])
            more = ", ..." if len(self._registry) > 4 else ""
            raise ConfigError(
                f"{spec} does not say which guest: write {spec.host_ports[0]}:GUEST:{spec.guest_ports[0]} "
                f"with one of {names}{more}."
            )

    async def add(self, spec: ForwardSpec, sockets: list[list[socket.socket]]) -> Forward:
        """Hands the sockets to the worker: of every port, or of none."""
        numbers = tuple(range(self._next, self._next + len(sockets)))
        self._next += len(sockets)
        ports = tuple(int(group[0].getsockname()[1]) for group in sockets)
        forward = Forward(spec, ports, numbers, self._owner)
        forward.addresses = tuple(ip_address(one.getsockname()[0]) for one in sockets[0])
        forward.target = self._target(forward)
        plane = self._control.plane
        try:
            for number, guest_port, group in zip(numbers, spec.guest_ports, sockets, strict=True):
                guest = (forward.target or _NOBODY, guest_port)
                fds = [one.fileno() for one in group]
                await self._control.do(plane.add_forward, number, spec.protocol, guest, fds)
                close_sockets([group])  # the worker has its own: a range takes no more than it has to
        except BaseException:
            # Also the one that was waited for, which the worker may have, and those that it never got.
            for number in numbers:
                self._control.ensure(plane.remove_forward, number)
            raise
        self._forwards[numbers[0]] = forward
        self.refresh()  # the guest may have come or gone meanwhile
        return forward

    async def add_external(self, spec: ForwardSpec, address: IPv4Address) -> Forward:
        """Publishes ports of an external address of the uplink: all of the range, or none. Where the host's
        port is 0 a free one is chosen."""
        count = len(spec.host_ports)
        numbers = tuple(range(self._next, self._next + count))
        self._next += count
        spec = replace(spec, host_ip=address)
        forward = Forward(spec, tuple(spec.host_ports), numbers, self._owner)
        forward.target = self._target(forward)
        plane, chosen = self._control.plane, []
        try:
            for number, port, guest_port in zip(numbers, spec.host_ports, spec.guest_ports, strict=True):
                guest = (forward.target or _NOBODY, guest_port)
                for candidate in [port] if port else random.sample(_CHOSEN, _TRIES):
                    try:
                        await self._control.do(
                            plane.add_uplink_forward, number, spec.protocol, (address, candidate), guest
                        )
                    except PortInUse:
                        if port:
                            raise PortInUse(
                                f"{spec.protocol.upper()} port {address}:{port} is in use, so {spec} cannot "
                                "be published: publish another one."
                            ) from None
                        continue
                    chosen.append(candidate)
                    break
                else:
                    raise PortInUse(f"No free port was found on {address}: publish one that you choose.")
        except BaseException:
            # Also the one that was waited for, as above.
            for number in numbers:
                self._control.ensure(plane.remove_forward, number)
            raise
        forward.host_ports = tuple(chosen)
        self._forwards[numbers[0]] = forward
        return forward

    async def remove(self, forward: Forward) -> bool:
        """Takes it back; False when it is not here."""
        if not self.drop(forward):
            return False
        # Commands are done in order: when one more is, all are.
        await self._control.do(self._control.plane.remove_forward, forward.numbers[-1])
        return True

    def drop(self, forward: Forward) -> bool:
        """As `remove`, without waiting for it."""
        if self._forwards.get(forward.numbers[0]) is not forward:
            return False
        del self._forwards[forward.numbers[0]]
        for number in forward.numbers:
            self._control.ensure(self._control.plane.remove_forward, number)
        return True

    def refresh(self) -> None:
        """Guests came, went or moved: leads every forward to where its guest is now."""
        for forward in self._forwards.values():
            target = self._target(forward)
            if target == forward.target:
                continue
            refused = partial(self._not_retargeted, forward, forward.target)
            forward.target = target
            for number, port in zip(forward.numbers, forward.spec.guest_ports, strict=True):
                self._control.ensure(
                    self._control.plane.retarget_forward, number, (target or _NOBODY, port), refused=refused
                )

    def _not_retargeted(self, forward: Forward, before: IPv4Address | None, error: GuestnetError) -> None:
        """The worker left the forward where it was: the next `refresh` tries again."""
        if self._forwards.get(forward.numbers[0]) is forward:
            _log.warning("%s could not be led to %s: %s", forward, forward.target or "no guest", error)
            forward.target = before

    def _target(self, forward: Forward) -> IPv4Address | None:
        spec = forward.spec
        if spec.guest is not None:
            # What a guest calls itself counts for DNS alone: it could call itself as the one that is meant.
            return spec.guest_address or self._registry.address_named(spec.guest, told=False)
        endpoint = self._only(forward)
        return None if endpoint is None else endpoint.ip

    def _only(self, forward: Forward) -> Endpoint | None:
        """The guest that it found before, else the only one."""
        if forward.endpoint_id is not None and (known := self._registry.get(forward.endpoint_id)) is not None:
            return known
        everyone = self._registry.all()
        endpoint = everyone[0] if len(everyone) == 1 else None
        forward.endpoint_id = None if endpoint is None else endpoint.id
        return endpoint
