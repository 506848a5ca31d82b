"""Limits on what guests carry, with real clients in namespaces."""

from __future__ import annotations

import json

import pytest
from lab import need
from lab.namespaces import OUT4
from lab.runner import GuestRunner

SECONDS = 3
RATE = 20e6
"""Bits a second."""


@pytest.fixture
def guest(guest: GuestRunner) -> GuestRunner:
    if guest.peer != "guestnet":
        pytest.skip("limits are guestnet's own")
    need.program("iperf3")
    return guest


def measured(guest: GuestRunner, limit: str, *words: str) -> dict[str, float]:
    command = ["iperf3", "-J", "-c", OUT4, "-t", str(SECONDS), "-O", "1", *words]
    out = guest.check(command, "--limit", limit, seconds=30)
    end = json.loads(out)["end"]
    return {name: end[name]["bits_per_second"] for name in ("sum_sent", "sum_received", "sum") if name in end}


@pytest.mark.parametrize(("words", "limit"), [((), "200mbit/20mbit"), (("-R",), "20mbit/200mbit")])
@pytest.mark.parametrize("streams", ["1", "4"])
def test_tcp_gets_its_rate(guest: GuestRunner, words: tuple[str, ...], limit: str, streams: str) -> None:
    received = measured(guest, limit, "-P", streams, *words)["sum_received"]
    assert 0.85 * RATE < received < 1.1 * RATE


def test_datagrams_beyond_the_rate_are_dropped(guest: GuestRunner) -> None:
    command = ["iperf3", "-J", "-u", "-b", "60M", "-c", OUT4, "-t", str(SECONDS), "-O", "1"]
    out = guest.check(command, "--limit", "20mbit", seconds=30)
    end = json.loads(out)["end"]
    received = end.get("sum_received", end["sum"])
    assert 0.8 * RATE < received["bits_per_second"] < 1.1 * RATE
    assert end["sum"]["lost_percent"] > 50


def test_flows_beyond_their_number_are_refused(guest: GuestRunner) -> None:
    script = f"for n in 1 2 3; do curl -sS -m 10 --no-keepalive http://{OUT4}/ & done; wait"
    url = f"http://{OUT4}/"
    first = guest(["sh", "-c", f"curl -sS -m 10 {url} && curl -sS -m 10 {url}"], "--limit", "new-flows=1")
    assert first.returncode == 7, first.stderr
    assert guest.check(["sh", "-c", script], "--limit", "flows=100").count("a page from outside") == 3


def test_after_the_total_nothing_passes(guest: GuestRunner) -> None:
    done = guest(
        ["curl", "-sS", "-m", "3", "-o", "/dev/null", f"http://{OUT4}/blob"], "--limit", "total=100kb"
    )
    assert done.returncode == 28, done.stderr
    assert "bytes received" in done.stderr
