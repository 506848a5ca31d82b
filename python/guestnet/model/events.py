"""What a network tells its owner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NetworkEvent:
    """Something happened.

    `kind` is one of `guest_up`, `guest_down`, `lease`, `release`, `address_seen`, `address_changed`,
    `port_opened` and `port_closed` (a guest's own, by PCP), `log`, `failed`, and for those who ask for flows
    `flow_opened`, `flow_closed`, `denied`. `endpoint` is the id of the guest that it is about. `details`
    holds values that JSON can carry.
    """

    kind: str
    endpoint: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


EventCallback = Callable[[NetworkEvent], object]
