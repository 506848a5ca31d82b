"""Applies changes to a running network: all of them, or none."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Protocol

from guestnet.api.exact import exact
from guestnet.errors import EndpointNotFound, ForwardNotFound, GuestnetError, UnsupportedError
from guestnet.model.forward_spec import ForwardSpec
from guestnet.model.handles import Handles
from guestnet.model.network_spec import EndpointSpec
from guestnet.model.spec import NatConfig
from guestnet.model.spec_diff import (
    Change,
    EndpointAdded,
    EndpointRemoved,
    ForwardAdded,
    ForwardRemoved,
    LimitChanged,
    PolicyChanged,
    RecordsChanged,
)
from guestnet.runtime.endpoint import Endpoint
from guestnet.runtime.published.forward import Forward
from guestnet.runtime.registry import NOWHERE, Registry
from guestnet.runtime.services.service_host import Services

if TYPE_CHECKING:
    from guestnet.policy.limit import Limit
    from guestnet.policy.policy import Policy

_log = logging.getLogger("guestnet")

Undo = Callable[[], Awaitable[object]]


class ChangeTarget(Protocol):
    """The network, as far as it is changed."""

    @property
    def forwards(self) -> Handles[Forward]: ...

    @property
    def policy(self) -> Policy | None: ...

    async def aset_policy(self, policy: Policy | None) -> int: ...

    @property
    def limit(self) -> Limit | None: ...

    @property
    def guest_limit(self) -> Limit | None: ...

    async def aset_limit(self, limit: Limit | None, *, each: bool) -> None: ...

    async def apublish(self, spec: str | ForwardSpec) -> Forward: ...

    async def aunpublish(self, forward: Forward | str) -> None: ...

    async def acreate_endpoint(
        self,
        id: str,
        *,
        mac: str | bytes | None = None,
        ip: str | IPv4Address | None = None,
        hostname: str | None = None,
    ) -> Endpoint: ...

    async def aremove_endpoint(self, id: str) -> None: ...


class ChangeApplier:
    """Applies changes in the order in which they can be undone best.

    First what can be undone exactly (records, ports, new endpoints). Then endpoints are removed, and those
    are added that take over something of a removed one. A registry that nobody else uses tells beforehand
    whether all endpoints can be there.
    """

    def __init__(
        self,
        network: ChangeTarget,
        config: NatConfig,
        registry: Registry,
        services: Services,
        describe: Callable[[Endpoint], EndpointSpec],
        set_records: Callable[[str, tuple[str, ...]], None],
    ) -> None:
        self._network, self._config, self._registry, self._services = network, config, registry, services
        self._describe, self._set_records = describe, set_records

    async def apply(self, changes: tuple[Change, ...]) -> None:
        """Applies them all, or raises the error of the first that fails and undoes those before it."""
        for one in changes:
            if not isinstance(one, Change) or type(one) is Change:
                raise TypeError(f"{one!r} is no change: give those that `guestnet.diff` returned.")
        if waiting := [str(change) for change in changes if not change.live]:
            raise UnsupportedError(
                f"A running network cannot {', '.join(waiting)}: stop it, and start one that is made so."
            )
        self._check(changes)
        undos: list[Undo] = []
        try:
            for change in self._ordered(changes):
                undos.append(await self._apply_one(change))
        except BaseException:
            for undo in reversed(undos):
                try:
                    await undo()
                except GuestnetError as error:
                    _log.warning("a change that was undone is not as before: %s", error)
            raise

    def _check(self, changes: tuple[Change, ...]) -> None:
        removed = {one.endpoint.id for one in changes if isinstance(one, EndpointRemoved)}
        for id in removed:
            self._described(id)
        for change in changes:
            if isinstance(change, ForwardRemoved):
                self._published(change.forward)
        scratch = Registry(self._config)
        for known in self._registry.all():
            if known.id not in removed:
                ip = None if known.ip == NOWHERE else str(known.ip)
                scratch.restore(known.id, known.mac, ip, known.hostname, proposed=False)
        for change in changes:
            if isinstance(change, EndpointAdded):
                new = change.endpoint
                scratch.create(new.id, new.mac, new.ip, new.hostname)

    def _ordered(self, changes: tuple[Change, ...]) -> list[Change]:
        going = [self._described(one.endpoint.id) for one in changes if isinstance(one, EndpointRemoved)]
        ranks = {RecordsChanged: 0, PolicyChanged: 0, LimitChanged: 0}
        ranks |= {ForwardRemoved: 1, ForwardAdded: 2, EndpointRemoved: 4}

        def rank(change: Change) -> int:
            if not isinstance(change, EndpointAdded):
                return ranks[type(change)]
            return 5 if any(_takes_over(change.endpoint, old) for old in going) else 3

        return sorted(changes, key=rank)

    async def _change_rules(self, change: PolicyChanged | LimitChanged) -> Undo:
        network = self._network
        if isinstance(change, PolicyChanged):
            earlier = network.policy
            await network.aset_policy(change.new)
            return partial(network.aset_policy, earlier)
        each = change.name == "guest_limit"
        kept = network.guest_limit if each else network.limit
        await network.aset_limit(change.new, each=each)
        return partial(network.aset_limit, kept, each=each)

    async def _apply_one(self, change: Change) -> Undo:
        """Applies a change; returns what undoes it."""
        network = self._network
        match change:
            case RecordsChanged(name, _, new):
                before = self._services.dns.records().get(name, ())
                self._set_records(name, new)

                async def restore() -> None:
                    self._set_records(name, before)

                return restore
            case PolicyChanged() | LimitChanged():
                return await self._change_rules(change)
            case ForwardRemoved(spec):
                forward = self._published(spec)
                again = exact(forward)
                await network.aunpublish(forward)
                return partial(network.apublish, again)
            case ForwardAdded(spec):
                return partial(network.aunpublish, await network.apublish(spec))
            case EndpointAdded(new):
                await network.acreate_endpoint(new.id, mac=new.mac, ip=new.ip, hostname=new.hostname)
                return partial(network.aremove_endpoint, new.id)
            case EndpointRemoved(endpoint):
                old = self._described(endpoint.id)
                await network.aremove_endpoint(old.id)
                return partial(
                    network.acreate_endpoint, old.id, mac=old.mac, ip=old.ip, hostname=old.hostname
                )
        raise UnsupportedError(f"A running network cannot {change}.")

    def _published(self, spec: ForwardSpec) -> Forward:
        for forward in self._network.forwards:
            if forward.asked_by is None and spec in (forward.spec, exact(forward)):
                return forward
        raise ForwardNotFound(f"{spec} is not published (any more): `forwards` lists those that are.")

    def _described(self, id: str) -> EndpointSpec:
        endpoint = self._registry.get(id)
        if endpoint is None:
            raise EndpointNotFound(f"There is no endpoint {id!r}: it cannot be removed.")
        return self._describe(endpoint)


def _takes_over(new: EndpointSpec, old: EndpointSpec) -> bool:
    """Whether an endpoint can be there only when another is gone."""
    return (
        new.id == old.id
        or (new.mac is not None and new.mac == old.mac)
        or (new.ip is not None and new.ip == old.ip)
        or (new.hostname is not None and new.hostname in (old.hostname, old.id))
    )
