"""Compares two descriptions of a network, and says what has to change.

Each change says whether a running network can apply it (`live`). `NatNetwork.apply` applies all, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from guestnet.model.forward_spec import ForwardSpec
from guestnet.model.network_spec import EndpointSpec, Spec
from guestnet.model.spec import NatConfig, StaticLease

if TYPE_CHECKING:
    from guestnet.policy.limit import Limit
    from guestnet.policy.policy import Policy


@dataclass(frozen=True)
class Change:
    """One difference between two descriptions. `guestnet.diff` returns them.

    Example:
        >>> from guestnet import EndpointAdded, EndpointSpec
        >>> change = EndpointAdded(EndpointSpec("vm1"))
        >>> str(change), change.live
        ("add endpoint 'vm1'", True)
    """

    live: ClassVar[bool] = True
    """Whether a running network can apply it."""


@dataclass(frozen=True)
class SettingChanged(Change):
    """A setting of the configuration is another one. It takes effect with a new start."""

    live = False
    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"change {self.name} from {self.old!s} to {self.new!s}"


@dataclass(frozen=True)
class LeaseAdded(Change):
    """A static lease is new. It takes effect with a new start."""

    live = False
    lease: StaticLease

    def __str__(self) -> str:
        return f"add the lease {self.lease.mac} = {_addresses(self.lease)}"


@dataclass(frozen=True)
class LeaseRemoved(Change):
    """A static lease is gone. It takes effect with a new start."""

    live = False
    lease: StaticLease

    def __str__(self) -> str:
        return f"remove the lease {self.lease.mac} = {_addresses(self.lease)}"


@dataclass(frozen=True)
class RecordsChanged(Change):
    """The DNS records of a name are other ones; without new ones the name is removed."""

    name: str
    old: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        return f"set the records of {self.name!r} to {', '.join(self.new) or 'none'}"


@dataclass(frozen=True)
class PolicyChanged(Change):
    """The policy of the network is another one. Flows that it does not allow are cut."""

    old: Policy | None
    new: Policy | None

    def __str__(self) -> str:
        if self.new is None:
            return "take the policy back"
        return f"put a policy of {len(self.new.rules)} rules in force"


@dataclass(frozen=True)
class LimitChanged(Change):
    """The limit of all guests together, or of each guest, is another one."""

    name: Literal["limit", "guest_limit"]
    old: Limit | None
    new: Limit | None

    def __str__(self) -> str:
        of = "all guests together" if self.name == "limit" else "each guest"
        return f"take the limit of {of} back" if self.new is None else f"limit {of} to {self.new}"


@dataclass(frozen=True)
class EndpointAdded(Change):
    """An endpoint is new."""

    endpoint: EndpointSpec

    def __str__(self) -> str:
        return f"add endpoint {self.endpoint.id!r}"


@dataclass(frozen=True)
class EndpointRemoved(Change):
    """An endpoint is gone. Its guest loses its attachment and its flows."""

    endpoint: EndpointSpec

    def __str__(self) -> str:
        return f"remove endpoint {self.endpoint.id!r}"


@dataclass(frozen=True)
class ForwardAdded(Change):
    """A published port is new."""

    forward: ForwardSpec

    def __str__(self) -> str:
        return f"publish {self.forward}"


@dataclass(frozen=True)
class ForwardRemoved(Change):
    """A published port is gone. Connections stay open."""

    forward: ForwardSpec

    def __str__(self) -> str:
        return f"unpublish {self.forward}"


def diff(old: Spec, new: Spec) -> list[Change]:
    """Compares two descriptions of a network.

    An endpoint that is described differently is removed and added. What the new description leaves open (the
    MAC or the address of an endpoint, the port of the host where it is 0) may be anything.

    Args:
        old: The description as it is, such as `network.spec()`.
        new: The description as it is to be.

    Returns:
        The changes, empty when nothing has to change.

    Example:
        >>> from guestnet import EndpointSpec, NatConfig, Spec, diff
        >>> old = Spec(NatConfig(), [EndpointSpec("vm1")], ["8080:vm1:80"])
        >>> new = Spec(NatConfig(mtu=9000), [EndpointSpec("vm1")], ["8081:vm1:80"])
        >>> [(str(change), change.live) for change in diff(old, new)]
        [('change mtu from 1500 to 9000', False), ('unpublish 0.0.0.0:8080/tcp -> vm1:80', True), ('publish \
0.0.0.0:8081/tcp -> vm1:80', True)]
    """
    removed, added = _forwards(old, new)
    return [
        *_settings(old.config, new.config),
        *_leases(old.config, new.config),
        *_records(old.config, new.config),
        *_policy(old.config, new.config),
        *_limits(old.config, new.config),
        *map(ForwardRemoved, removed),
        *_endpoints(old, new),
        *map(ForwardAdded, added),
    ]


_LIVE = ("static_leases", "dns_records", "policy", "limit", "guest_limit")
"""Settings whose changes are described in other ways."""


def _settings(old: NatConfig, new: NatConfig) -> Iterator[Change]:
    for name in (one.name for one in fields(NatConfig)):
        before, after = getattr(old, name), getattr(new, name)
        if before != after and name not in _LIVE:
            yield SettingChanged(name, before, after)


def _addresses(lease: StaticLease) -> str:
    return " and ".join(map(str, lease.addresses))


def _leases(old: NatConfig, new: NatConfig) -> Iterator[Change]:
    yield from (LeaseRemoved(one) for one in old.static_leases if one not in new.static_leases)
    yield from (LeaseAdded(one) for one in new.static_leases if one not in old.static_leases)


def _records(old: NatConfig, new: NatConfig) -> Iterator[Change]:
    for name in [*old.dns_records, *(one for one in new.dns_records if one not in old.dns_records)]:
        before, after = old.dns_records.get(name, ()), new.dns_records.get(name, ())
        if before != after:
            yield RecordsChanged(name, before, after)


def _limits(old: NatConfig, new: NatConfig) -> Iterator[Change]:
    if old.limit != new.limit:
        yield LimitChanged("limit", old.limit, new.limit)
    if old.guest_limit != new.guest_limit:
        yield LimitChanged("guest_limit", old.guest_limit, new.guest_limit)


def _policy(old: NatConfig, new: NatConfig) -> Iterator[Change]:
    if old.policy != new.policy:
        yield PolicyChanged(old.policy, new.policy)


def _endpoints(old: Spec, new: Spec) -> Iterator[Change]:
    wanted = {one.id: one for one in new.endpoints}
    kept = {one.id for one in old.endpoints if one.id in wanted and wanted[one.id].is_met_by(one)}
    yield from (EndpointRemoved(one) for one in old.endpoints if one.id not in kept)
    yield from (EndpointAdded(one) for one in new.endpoints if one.id not in kept)


def _forwards(old: Spec, new: Spec) -> tuple[list[ForwardSpec], list[ForwardSpec]]:
    left, added = list(old.forwards), []
    # Those that name a port first: one that takes any port leaves it to them.
    for wanted in sorted(new.forwards, key=lambda one: one.host_ports[0] == 0):
        met = wanted if wanted in left else next((one for one in left if _meets(one, wanted)), None)
        if met is None:
            added.append(wanted)
        else:
            left.remove(met)
    return left, added


def _meets(forward: ForwardSpec, wanted: ForwardSpec) -> bool:
    """Whether a forward is as a description says that leaves the port of the host open."""
    return wanted.host_ports[0] == 0 and replace(forward, host_ports=wanted.host_ports) == wanted
