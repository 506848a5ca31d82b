"""The recent denials of a network, for `NatNetwork.denials` and the page that explains them to guests.

Theory of operation: equal denials are one record with a count. Each guest has a bounded number of records,
and the oldest one makes room. So a guest that probes everything displaces only its own denials.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from guestnet.model.denials import Denial
from guestnet.model.events import FlowDenied, NameDenied, NetworkEvent

OF_GUEST = 256
"""Records of one guest."""
_GUESTS = 4096
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp"}


class DenialLog:
    """Counts denials. Any thread may read them.

    Example:
        >>> log = DenialLog()
        >>> log.recent("vm1")
        []
    """

    def __init__(self, of_guest: int = OF_GUEST) -> None:
        self._of_guest = of_guest
        self._guests: OrderedDict[str, OrderedDict[tuple[object, ...], Denial]] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, event: NetworkEvent) -> None:
        """Counts the denial of an event.

        Args:
            event: A `FlowDenied` or `NameDenied`; others are ignored.
        """
        fields = _fields(event)
        if fields is None or event.endpoint is None:
            return
        key = tuple(fields.values())
        count = 1 + getattr(event, "unreported", 0)
        with self._lock:
            guest = self._guests.setdefault(event.endpoint, OrderedDict())
            self._guests.move_to_end(event.endpoint)
            before = guest.pop(key, None)
            first = event.time if before is None else before.first
            total = count if before is None else before.count + count
            guest[key] = Denial(endpoint=event.endpoint, **fields, count=total, first=first, last=event.time)
            if len(guest) > self._of_guest:
                guest.popitem(last=False)
            if len(self._guests) > _GUESTS:
                self._guests.popitem(last=False)

    def recent(self, endpoint: str | None = None) -> list[Denial]:
        """The records, oldest first.

        Args:
            endpoint: Those of one guest alone.

        Returns:
            The records.
        """
        with self._lock:
            names = list(self._guests) if endpoint is None else [endpoint]
            found = [denial for name in names for denial in self._guests.get(name, {}).values()]
        return sorted(found, key=lambda denial: denial.last)

    def forget(self, endpoint: str) -> None:
        """Forgets a guest that was removed.

        Args:
            endpoint: Its id.
        """
        with self._lock:
            self._guests.pop(endpoint, None)


def _fields(event: NetworkEvent) -> dict[str, Any] | None:
    if isinstance(event, FlowDenied):
        address, port = event.remote
        return {
            "what": _PROTOCOLS.get(event.protocol, str(event.protocol)),
            "direction": event.direction,
            "address": address,
            "port": 0 if event.direction == "inbound" else port,
            "name": event.name,
            "shown": event.shown,
            "rule": event.rule,
            "reason": event.reason,
        }
    if isinstance(event, NameDenied):
        return {"what": "dns", "name": event.name, "rule": event.rule, "reason": event.reason}
    return None
