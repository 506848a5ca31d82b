"""Learns a policy: what guests did while everything was allowed.

Theory of operation: each flow that a guest opens is noted by the name that the guest asked for, or by its
address. `Learner.policy` writes a rule for each of them: names on the ports of the web need the conversation
to show them, other ports of names are matched by address. The number of noted destinations is bounded; what
is beyond it is counted.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable

from guestnet.model.defaults import DEFAULT_ZONE
from guestnet.model.events import FlowOpened, NetworkEvent
from guestnet.policy.policy import Policy
from guestnet.policy.rule import Rule

DESTINATIONS_MOST = 10_000
_PROTOCOLS = {6: "tcp", 17: "udp", 1: "icmp", 58: "icmp"}
_WEB = {("tcp", 80), ("tcp", 443), ("udp", 443)}


class Learner:
    """Notes what guests open. Any thread may call it.

    Args:
        zone: The network's own zone, whose names are noted by their addresses.

    Example:
        >>> from ipaddress import ip_address
        >>> learner = Learner()
        >>> learner.note(FlowOpened(flow="f1", endpoint="vm1", protocol=6, inbound=False, name="pypi.org",
        ...                         guest=(ip_address("192.168.64.2"), 4000),
        ...                         remote=(ip_address("192.0.2.7"), 443)))
        >>> print(learner.policy())
        1  allow pypi.org
        -  deny everything else
    """

    def __init__(self, zone: str = DEFAULT_ZONE) -> None:
        self._zone = f".{zone}"
        self._lock = threading.Lock()
        self._seen: dict[tuple[bool, str], set[tuple[str, int]]] = {}
        """Protocols and ports by (is a name, destination)."""
        self.left_out = 0
        """Destinations beyond the limit."""

    def note(self, event: NetworkEvent) -> None:
        """Notes a flow.

        Args:
            event: The event; only flows to the outside count.
        """
        if not isinstance(event, FlowOpened) or event.inbound:
            return
        protocol = _PROTOCOLS.get(event.protocol)
        if protocol is None:
            return
        # The network's own names are known without having been asked for.
        is_name = event.name is not None and not event.name.endswith(self._zone)
        place = (is_name, str(event.name if is_name else event.remote[0]))
        with self._lock:
            if place not in self._seen and len(self._seen) >= DESTINATIONS_MOST:
                self.left_out += 1
                return
            ports = self._seen.setdefault(place, set())
            ports.add((protocol, 0 if protocol == "icmp" else event.remote[1]))

    def policy(self) -> Policy:
        """The smallest policy that would have allowed what was noted.

        Returns:
            The policy; everything else is denied.
        """
        with self._lock:
            seen = {place: set(ports) for place, ports in self._seen.items()}
        rules: list[Rule] = []
        for (is_name, to), ports in sorted(seen.items(), key=lambda one: (not one[0][0], one[0][1])):
            if is_name and ports & _WEB:
                rules.append(Rule("allow", to))
            others = ports - _WEB if is_name else ports
            rules += _rules(to, others, "address" if is_name else "conversation")
        return Policy("deny", rules)


def _rules(to: str, ports: Iterable[tuple[str, int]], match: str) -> list[Rule]:
    by_protocol: defaultdict[str, list[int]] = defaultdict(list)
    for protocol, port in sorted(ports):
        by_protocol[protocol].append(port)
    return [
        Rule(
            "allow",
            to,
            ports=None if protocol == "icmp" else tuple(numbers),
            protocol=protocol,
            match=match,
        )
        for protocol, numbers in by_protocol.items()
    ]
