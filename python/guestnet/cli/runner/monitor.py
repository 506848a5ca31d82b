"""Reports refused flows and dropped frames of a running network, for `--verbose`.

Theory of operation: guests can cause both at any rate. So refusals are counted where they arrive. Once a
second, one line reports each kind of refusal and the drops of each guest. What exceeds the bounds is counted
too.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from guestnet.cli.runner import confined
from guestnet.errors import GuestnetError
from guestnet.model.events import FlowDenied

if TYPE_CHECKING:
    from guestnet.model.stats import NetworkStats
    from guestnet.runtime.network import NatNetwork

_PERIOD_SECONDS = 1.0
_KINDS_MOST = 256
"""How many kinds of refusals are distinguished within one period."""
_LINES_MOST = 16
"""How many lines report refusals within one period."""
_PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6"}


class Monitor:
    """Reports refusals and drops of `network` with `say`, from a thread of its own, until it is closed."""

    def __init__(self, network: NatNetwork, say: Callable[[str], None]) -> None:
        self._network = network
        self._say = say
        self._lock = threading.Lock()
        self._refused: Counter[tuple[str, str]] = Counter()
        self._more = 0
        self._before: dict[str, Mapping[str, int]] = {}
        self._ending = threading.Event()
        self._end_events = network.on_event(self.note, FlowDenied)
        self._thread = threading.Thread(target=self._run, name="guestnet-monitor", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def note(self, event: FlowDenied) -> None:
        """Counts a refusal."""
        protocol = _PROTOCOLS.get(event.protocol, f"protocol {event.protocol}")
        address, port = event.remote
        target = f"{address}:{port}" if port else str(address)
        key = (event.endpoint or "a guest", f"{protocol} to {target} ({event.reason.replace('_', ' ')})")
        with self._lock:
            if key in self._refused or len(self._refused) < _KINDS_MOST:
                self._refused[key] += 1
            else:
                self._more += 1

    def close(self) -> None:
        """Reports what is left, and ends. The network still runs."""
        self._end_events()
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        confined.settle_thread()
        ended = False
        while not ended:
            ended = self._ending.wait(_PERIOD_SECONDS)
            self._say_refusals()
            try:
                drops = {name: stats.drops for name, stats in self._stats().items()}
            except GuestnetError:
                return  # it was stopped
            for line in drop_lines(self._before, drops):
                self._say(line)
            self._before = drops

    def _stats(self) -> dict[str, NetworkStats]:
        return self._network.endpoint_stats()

    def _say_refusals(self) -> None:
        with self._lock:
            refused, self._refused = self._refused, Counter()
            more, self._more = self._more, 0
        lines = refused.most_common(_LINES_MOST)
        more += sum(refused.values()) - sum(count for _, count in lines)
        for (guest, what), count in lines:
            self._say(f"guestnet: {guest}: refused {what}{_times(count)}")
        if more:
            self._say(f"guestnet: {more} more refusals")


def drop_lines(before: Mapping[str, Mapping[str, int]], now: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for each guest whose frames were dropped between two looks at the counters."""
    lines = []
    for guest, drops in now.items():
        earlier: Mapping[str, Any] = before.get(guest, {})
        # The counters of a guest that left and came back start at zero.
        new = {
            reason: count - earlier.get(reason, 0) if count >= earlier.get(reason, 0) else count
            for reason, count in drops.items()
        }
        told = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in new.items() if count > 0)
        if told:
            lines.append(f"guestnet: {guest}: frames dropped: {told}")
    return lines


def _times(count: int) -> str:
    return "" if count == 1 else f", {count} times"
