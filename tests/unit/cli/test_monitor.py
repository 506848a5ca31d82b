"""What `--verbose` says of refusals, drops and name servers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from ipaddress import IPv4Address

from guestnet.cli.runner.monitor import _KINDS_MOST, _LINES_MOST, Monitor, drop_lines
from guestnet.errors import NotRunning
from guestnet.model.events import FlowDenied, NetworkEvent
from guestnet.model.stats import NetworkStats


class Network:
    """A network that is asked for its counters, and has events."""

    def __init__(self) -> None:
        self.drops: dict[str, dict[str, int]] = {}
        self.callback: Callable[[FlowDenied], object] | None = None
        self.asked = threading.Semaphore(0)

    def on_event(
        self, callback: Callable[[FlowDenied], object], kind: type[NetworkEvent]
    ) -> Callable[[], None]:
        assert kind is FlowDenied
        self.callback = callback

        def end() -> None:
            self.callback = None

        return end

    def endpoint_stats(self) -> dict[str, NetworkStats]:
        self.asked.release()
        return {name: NetworkStats(drops=drops) for name, drops in self.drops.items()}


def denied(port: int, *, protocol: int = 6) -> FlowDenied:
    return FlowDenied(
        endpoint="vm1",
        direction="outbound",
        protocol=protocol,
        guest=(IPv4Address("192.168.64.2"), 50000),
        remote=(IPv4Address("169.254.169.254"), port),
        reason="bad_destination",
    )


def test_refusals_and_drops_are_reported_by_the_end() -> None:
    network, lines = Network(), []
    with Monitor(network, lines.append) as monitor:  # type: ignore[arg-type]
        assert network.callback is not None
        network.callback(denied(80))
        network.callback(denied(80))
        network.callback(denied(0, protocol=1))
        network.drops = {"vm1": {"spoofed_mac": 3, "policy": 0}, "vm2": {"policy": 0}}
    assert network.callback is None
    assert not monitor._thread.is_alive()
    assert lines == [
        "guestnet: vm1: refused TCP to 169.254.169.254:80 (bad destination), 2 times",
        "guestnet: vm1: refused ICMP to 169.254.169.254 (bad destination)",
        "guestnet: vm1: frames dropped: 3 spoofed mac",
    ]


def test_a_guest_that_is_refused_at_any_rate_fills_neither_memory_nor_the_screen() -> None:
    network, lines = Network(), []
    with Monitor(network, lines.append) as monitor:  # type: ignore[arg-type]
        for port in range(20_000):
            monitor.note(denied(1 + port % 60_000))
        assert len(monitor._refused) <= _KINDS_MOST
    assert len(lines) <= 3 * (_LINES_MOST + 1)  # a period may have ended meanwhile, twice at the most
    told = sum(int(line.split()[1]) if "more refusals" in line else 1 for line in lines)
    assert told == 20_000


def test_only_new_drops_are_reported() -> None:
    assert drop_lines({}, {"vm1": {"policy": 2}}) == ["guestnet: vm1: frames dropped: 2 policy"]
    assert drop_lines({"vm1": {"policy": 2}}, {"vm1": {"policy": 2}}) == []
    # A guest that came again counts from zero.
    assert drop_lines({"vm1": {"policy": 9}}, {"vm1": {"policy": 1}}) == [
        "guestnet: vm1: frames dropped: 1 policy"
    ]
    assert drop_lines({"vm1": {"a_b": 1, "c": 0}}, {"vm1": {"a_b": 3, "c": 1}}) == [
        "guestnet: vm1: frames dropped: 2 a b, 1 c"
    ]


def test_a_network_that_stops_ends_the_monitor() -> None:
    class Stopped(Network):
        def endpoint_stats(self) -> dict[str, NetworkStats]:
            raise NotRunning("The network does not run: start it first.")

    lines: list[str] = []
    with Monitor(Stopped(), lines.append) as monitor:  # type: ignore[arg-type]
        pass
    assert not monitor._thread.is_alive()
    assert lines == []
