"""Spec: the complete description of a network, as a value that can be compared and written as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from guestnet.errors import ConfigError
from guestnet.model.forward_spec import ForwardSpec
from guestnet.model.ipam import format_mac, parse_mac
from guestnet.model.spec import NatConfig, StaticLease


@dataclass(frozen=True)
class EndpointSpec:
    """An endpoint that a network is to have.

    Args:
        id: Its id.
        mac: Its MAC address; None: any.
        ip: Its address; None: any.
        hostname: Another name in DNS.

    Raises:
        ConfigError: A value is wrong.

    Example:
        >>> EndpointSpec("vm1", ip="192.168.64.7").ip
        IPv4Address('192.168.64.7')
    """

    id: str
    mac: str | None = None
    ip: IPv4Address | None = None
    hostname: str | None = None

    def __post_init__(self) -> None:
        if self.mac is not None:
            object.__setattr__(self, "mac", format_mac(parse_mac(self.mac)))
        if self.ip is not None:
            try:
                object.__setattr__(self, "ip", IPv4Address(self.ip))
            except ValueError:
                raise ConfigError(f"ip {self.ip!r} of endpoint {self.id!r} is not an IPv4 address.") from None

    def is_met_by(self, other: EndpointSpec) -> bool:
        """Whether an endpoint that exists is as this one says.

        Args:
            other: The endpoint that exists.

        Returns:
            True when everything that this one names is the same.
        """
        return (
            (self.id, self.hostname) == (other.id, other.hostname)
            and self.mac in (None, other.mac)
            and self.ip in (None, other.ip)
        )


@dataclass(frozen=True)
class Spec:
    """The complete description of a network: its configuration, endpoints and published ports.

    Leases and DNS records belong to the configuration. `guestnet.diff` compares two descriptions.

    Args:
        config: The configuration.
        endpoints: The endpoints that the program creates. Guests of listeners are not part of it.
        forwards: The ports that the program publishes, as text or as `ForwardSpec`.

    Raises:
        ConfigError: A value is wrong, or an endpoint or published port is there twice.

    Example:
        >>> spec = Spec(NatConfig(mtu=9000), [EndpointSpec("vm1")], ["8080:vm1:80"])
        >>> spec == Spec.from_dict(spec.as_dict())
        True
    """

    config: NatConfig = field(default_factory=NatConfig)
    endpoints: tuple[EndpointSpec, ...] = ()
    forwards: tuple[ForwardSpec, ...] = ()

    def __init__(
        self,
        config: NatConfig | None = None,
        endpoints: Iterable[EndpointSpec] = (),
        forwards: Iterable[ForwardSpec | str] = (),
    ) -> None:
        object.__setattr__(self, "config", NatConfig() if config is None else config)
        object.__setattr__(self, "endpoints", tuple(endpoints))
        object.__setattr__(self, "forwards", tuple(map(ForwardSpec.of, forwards)))
        for what, values in (
            ("endpoint", [one.id for one in self.endpoints]),
            ("published port", [str(one) for one in self.forwards if one.host_ports[0]]),
        ):
            if twice := next((one for one in values if values.count(one) > 1), None):
                raise ConfigError(f"The {what} {twice!r} is there twice: leave one out.")

    def as_dict(self) -> dict[str, Any]:
        """The description as plain data.

        Returns:
            Dictionaries, lists, text and numbers, as JSON can carry them.
        """
        return {
            "config": config_as_dict(self.config),
            "endpoints": [_without_none(endpoint) for endpoint in self.endpoints],
            "forwards": [forward.text for forward in self.forwards],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """Reads what `as_dict` wrote.

        Args:
            data: The plain data.

        Returns:
            The description.

        Raises:
            ConfigError: Something in it is wrong, or unknown.
        """
        known = checked_keys("network description", data, {"config", "endpoints", "forwards"})
        endpoints = [
            EndpointSpec(**checked_keys("endpoint", one, {"id", "mac", "ip", "hostname"}, {"id"}))
            for one in checked_list("endpoints", known.get("endpoints", []))
        ]
        forwards = checked_list("forwards", known.get("forwards", []))
        return cls(config_from_dict(known.get("config", {})), endpoints, forwards)


def config_as_dict(config: NatConfig) -> dict[str, Any]:
    """The settings of a configuration as plain data."""
    found = {one.name: _plain(getattr(config, one.name)) for one in fields(config) if one.name != "policy"}
    return found if config.policy is None else {**found, "policy": config.policy.to_dict()}


def config_from_dict(data: object) -> NatConfig:
    """Reads what `config_as_dict` wrote. Raises ConfigError."""
    known = dict(checked_keys("configuration", data, {one.name for one in fields(NatConfig)}))
    for name in ("port_range", "pcp_ports"):
        if isinstance(known.get(name), list):
            known[name] = tuple(known[name])
    return NatConfig(**known)


def checked_keys(
    what: str, value: object, known: Iterable[str], needed: Iterable[str] = ()
) -> Mapping[str, Any]:
    """A mapping that has no other keys than those that are known. Raises ConfigError."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"The {what} {value!r} is not a mapping with names.")
    if unknown := set(value) - set(known):
        raise ConfigError(
            f"The {what} has {sorted(map(str, unknown))}, which is not known: use {', '.join(sorted(known))}."
        )
    if missing := set(needed) - set(value):
        raise ConfigError(f"The {what} has no {', '.join(sorted(missing))}: add it.")
    return value


def checked_list(what: str, value: object) -> list[Any]:
    """A list. Raises ConfigError."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{what} {value!r} is not a list.")
    return list(value)


def _without_none(value: Any) -> dict[str, Any]:
    found = {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return {name: one for name, one in found.items() if one is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum) or hasattr(value, "to_data"):
        return value.value if isinstance(value, Enum) else value.to_data()
    if isinstance(value, IPv4Address | IPv6Address | IPv4Network | IPv6Network):
        return str(value)
    if isinstance(value, StaticLease):
        return _without_none(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
