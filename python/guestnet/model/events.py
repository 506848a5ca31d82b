"""The events of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NetworkEvent:
    """Something that happened in a network. `NatNetwork.on_event` delivers it.

    `kind` is one of `guest_up`, `guest_down`, `lease`, `release`, `address_seen`, `address_changed`,
    `port_opened` and `port_closed` (a port that a guest opened by PCP), `log`, `failed`, and for those who
    ask for flows `flow_opened`, `flow_closed` and `denied`. `endpoint` is the id of the guest that the event
    is about. `details` has values that JSON can carry; docs/reference/events.md lists them.

    Example:
        >>> NetworkEvent("guest_up", "vm1", {"ip": "192.168.64.2"}).details["ip"]
        '192.168.64.2'
    """

    kind: str
    endpoint: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


EventCallback = Callable[[NetworkEvent], object]
