"""The state of a network as plain data: what it takes to make the same network again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_address
from typing import Any

from guestnet.errors import ConfigError
from guestnet.model.forward_spec import ForwardSpec
from guestnet.model.ipam import format_mac, parse_mac
from guestnet.model.network_spec import checked_keys, checked_list, config_as_dict, config_from_dict
from guestnet.model.spec import NatConfig
from guestnet.model.stats import LeaseRecord

VERSION = 1

Guests = dict[str, tuple[str, IPv4Address | None]]
"""Guests of listeners by MAC: id and address."""


@dataclass(frozen=True)
class EndpointState:
    """An endpoint that the program created."""

    id: str
    mac: str
    mac_is_generated: bool
    """Whether the guest may still show a MAC of its own."""
    ip: str | None
    hostname: str | None = None


@dataclass(frozen=True)
class NetworkState:
    """What `NatNetwork.state` writes and `NatNetwork.from_state` reads."""

    config: NatConfig
    endpoints: tuple[EndpointState, ...] = ()
    guests: Guests = field(default_factory=dict)
    leases: tuple[LeaseRecord, ...] = ()
    records: Mapping[str, tuple[str, ...]] | None = None
    """DNS records by name; None: those of the configuration."""
    forwards: tuple[ForwardSpec, ...] = ()
    listeners: tuple[tuple[str, str], ...] = ()
    """Kind and path."""

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "version": VERSION,
            "config": config_as_dict(self.config),
            "endpoints": [
                {
                    "id": one.id,
                    "mac": one.mac,
                    "mac_is_generated": one.mac_is_generated,
                    "ip": one.ip,
                    "hostname": one.hostname,
                }
                for one in self.endpoints
            ],
            "guests": guests_as_dict(self.guests),
            "leases": [
                {
                    "endpoint": one.endpoint_id,
                    "mac": one.mac,
                    "ip": str(one.ip),
                    "hostname": one.hostname,
                    "expires": one.expires if math.isfinite(one.expires) else None,
                }
                for one in self.leases
            ],
            "records": None
            if self.records is None
            else {name: list(values) for name, values in self.records.items()},
            "forwards": [one.text for one in self.forwards],
            "listeners": [{"kind": kind, "path": path} for kind, path in self.listeners],
        }

    @classmethod
    def from_dict(cls, data: object) -> NetworkState:
        """Reads what `as_dict` wrote. Raises ConfigError for data that is damaged or of another version."""
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            raise ConfigError(f"This is no state of a network of version {VERSION}.")
        keys = ("version", "config", "endpoints", "guests", "leases", "records", "forwards", "listeners")
        known = checked_keys("state", data, keys, keys)
        try:
            return cls(
                config_from_dict(known["config"]),
                tuple(_endpoint(one) for one in checked_list("endpoints", known["endpoints"])),
                guests_from_dict(known["guests"]),
                tuple(_lease(one) for one in checked_list("leases", known["leases"])),
                None
                if known["records"] is None
                else {str(name): tuple(values) for name, values in known["records"].items()},
                tuple(ForwardSpec.of(one) for one in checked_list("forwards", known["forwards"])),
                tuple((str(one["kind"]), str(one["path"])) for one in known["listeners"]),
            )
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"The state of the network is damaged ({error}): take an earlier one."
            ) from None


def guests_as_dict(guests: Guests) -> dict[str, dict[str, str | None]]:
    """Guests of listeners as plain data: `{MAC: {"id": ..., "ip": ...}}`."""
    return {mac: {"id": id, "ip": None if ip is None else str(ip)} for mac, (id, ip) in guests.items()}


def guests_from_dict(data: object) -> Guests:
    """Reads what `guests_as_dict` wrote. Raises ConfigError."""
    found: Guests = {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"The guests {data!r} are not a mapping of MAC addresses.")
    for mac, one in data.items():
        known = checked_keys("guest", one, {"id", "ip"}, {"id", "ip"})
        if not isinstance(known["id"], str):
            raise ConfigError(f"The id {known['id']!r} of the guest {mac!r} is not text.")
        try:
            ip = None if known["ip"] is None else IPv4Address(known["ip"])
        except ValueError:
            raise ConfigError(f"ip {known['ip']!r} of the guest {mac!r} is not an IPv4 address.") from None
        found[format_mac(parse_mac(mac))] = (known["id"], ip)
    return found


def _endpoint(data: object) -> EndpointState:
    keys = ("id", "mac", "mac_is_generated", "ip", "hostname")
    known = checked_keys("endpoint", data, keys, keys)
    return EndpointState(
        known["id"], known["mac"], bool(known["mac_is_generated"]), known["ip"], known["hostname"]
    )


def _lease(data: object) -> LeaseRecord:
    keys = ("endpoint", "mac", "ip", "hostname", "expires")
    known = checked_keys("lease", data, keys, keys)
    return LeaseRecord(
        str(known["endpoint"]),
        format_mac(parse_mac(known["mac"])),
        ip_address(known["ip"]),
        known["hostname"],
        math.inf if known["expires"] is None else float(known["expires"]),
    )
