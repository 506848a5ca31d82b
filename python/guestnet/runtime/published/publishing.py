"""The published ports of a running network: which guest each of them leads to.

A forward may be published before its guest comes, and stays after the guest left. It names its guest by id,
by the host name that the owner gave it, by address, or not at all (the only guest). The worker has the
sockets from the first moment. While the guest is away it refuses every client, as a host does whose server
does not run.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from ipaddress import IPv4Address, ip_address
from typing import TYPE_CHECKING, Any

from guestnet.errors import ConfigError, PortInUse
from guestnet.model.forward_spec import ForwardSpec
from guestnet.runtime.published.forward import Forward
from guestnet.runtime.published.host_sockets import close_sockets

if TYPE_CHECKING:
    from guestnet.control.channel import Control
    from guestnet.errors import GuestnetError
    from guestnet.model.handles import Ids
    from guestnet.model.spec import NatConfig
    from guestnet.runtime.endpoint import Endpoint
    from guestnet.runtime.registry import Registry

_log = logging.getLogger("guestnet")

_NOBODY = IPv4Address("0.0.0.0")
_CHOSEN = range(20000, 49152)
"""Below the ports that the engine gives to connections."""
_TRIES = 64

CloseForward = Callable[[Forward], Coroutine[Any, Any, None]]
"""Takes a forward back, when its program closes it."""


class Publishing:
    """All forwards of a session."""

    def __init__(self, control: Control, registry: Registry, ids: Ids, close: CloseForward) -> None:
        self._close = close
        self._ids = ids
        self._control = control
        self._registry = registry
        self.external: tuple[IPv4Address, ...] | None = None
        """The external addresses of the uplink 'tun', on which ports are published without sockets."""
        self._forwards: dict[int, Forward] = {}
        self._next = 1

    def all(self) -> list[Forward]:
        """All forwards, oldest first."""
        return list(self._forwards.values())

    def needs_sockets(self, spec: ForwardSpec) -> bool:
        """False for ports of the external addresses: those have no sockets."""
        return self.external is None or (spec.host_ip is not None and spec.host_ip not in self.external)

    def _outside(self, spec: ForwardSpec) -> IPv4Address:
        """The external address that a forward without sockets is of."""
        assert self.external is not None
        return spec.host_ip if isinstance(spec.host_ip, IPv4Address) else self.external[0]

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

    async def add(
        self, spec: ForwardSpec, sockets: list[list[socket.socket]], asked_by: str | None = None
    ) -> Forward:
        """Hands the sockets to the worker: of every port, or of none. `asked_by` is the endpoint whose guest
        opened the port."""
        numbers = tuple(range(self._next, self._next + len(sockets)))
        self._next += len(sockets)
        ports = tuple(int(group[0].getsockname()[1]) for group in sockets)
        forward = Forward(self._ids.next("forward"), spec, ports, numbers, self._close)
        forward.addresses = tuple(ip_address(one.getsockname()[0]) for one in sockets[0])
        forward.asked_by = asked_by
        forward.target = self._target(forward)
        plane = self._control.plane
        try:
            for number, guest_port, group in zip(numbers, spec.guest_ports, sockets, strict=True):
                guest = (forward.target or _NOBODY, guest_port)
                fds = [one.fileno() for one in group]
                await self._control.do(
                    plane.add_forward, number, spec.protocol, guest, fds, opened_by_guest=asked_by is not None
                )
                close_sockets([group])  # the worker has its own: a range takes no more than it has to
        except BaseException:
            # Also the one that was waited for, which the worker may have, and those that it never got.
            for number in numbers:
                self._control.ensure(plane.remove_forward, number)
            raise
        self._forwards[numbers[0]] = forward
        self.refresh()  # the guest may have come or gone meanwhile
        return forward

    async def add_external(self, spec: ForwardSpec, asked_by: str | None = None) -> Forward:
        """Publishes ports of an external address of the uplink: all of the range, or none. Where the host's
        port is 0 a free one is chosen."""
        # Imported only where such a port is published.
        import random
        from dataclasses import replace

        address = self._outside(spec)
        count = len(spec.host_ports)
        numbers = tuple(range(self._next, self._next + count))
        self._next += count
        spec = replace(spec, host_ip=address)
        forward = Forward(self._ids.next("forward"), spec, tuple(spec.host_ports), numbers, self._close)
        forward.asked_by = asked_by
        forward.target = self._target(forward)
        plane, chosen = self._control.plane, []
        try:
            for number, port, guest_port in zip(numbers, spec.host_ports, spec.guest_ports, strict=True):
                guest = (forward.target or _NOBODY, guest_port)
                for candidate in [port] if port else random.sample(_CHOSEN, _TRIES):
                    try:
                        await self._control.do(
                            plane.add_uplink_forward,
                            number,
                            spec.protocol,
                            (address, candidate),
                            guest,
                            opened_by_guest=asked_by is not None,
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
