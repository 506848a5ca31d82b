"""What `--verbose` says of refusals, drops and name servers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from ipaddress import IPv4Address

import dns.message
import pytest
from guestnet.cli.runner.monitor import _KINDS_MOST, _LINES_MOST, Monitor, drop_lines
from guestnet.errors import NotRunning
from guestnet.model.events import FlowDenied, NetworkEvent
from guestnet.model.stats import NetworkStats
from guestnet.services.dns.resolvers import parse_resolv_conf
from guestnet.services.dns.upstream import Upstream
from guestnet.services.dns.wire import Query, read_query


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


def _query() -> Query:
    return read_query(dns.message.make_query("example.org", "A").to_wire())


async def test_a_dead_name_server_is_reported_once_and_again_after_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guestnet.services.dns import upstream as module

    clock = [0.0]
    upstream = Upstream(lambda: clock[0])
    refusing = False

    async def ask(server: object, message: bytes, query: Query) -> object:
        if not refusing:
            raise TimeoutError
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(module, "_ask_udp", ask)
    resolvers = parse_resolv_conf("nameserver 192.0.2.53\noptions attempts:2\n")
    with caplog.at_level(logging.INFO, "guestnet"):
        for _ in range(3):
            assert await upstream.ask(_query(), resolvers, tcp=False) is None
        assert [r.getMessage() for r in caplog.records] == [
            "the name server 192.0.2.53 does not answer: no answer in time"
        ]
        clock[0] += 31
        refusing = True
        await upstream.ask(_query(), resolvers, tcp=False)
        assert caplog.records[-1].getMessage() == (
            "the name server 192.0.2.53 does not answer: connection refused"
        )
        assert len(caplog.records) == 2
