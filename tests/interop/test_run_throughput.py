"""iperf3 in the guest, TCP and UDP, both ways. Speeds are measured in bench/; here only that it works and
loses nothing that the wire could carry."""

from __future__ import annotations

import json
from typing import Any

import pytest
from lab.namespaces import OUT4
from lab.runner import GuestRunner


def iperf3(guest: GuestRunner, *words: str) -> dict[str, Any]:
    out = guest.check(["iperf3", "-J", "-c", OUT4, "-t", "2", *words], seconds=40)
    end: dict[str, Any] = json.loads(out)["end"]
    return end


@pytest.mark.parametrize(
    "words", [(), ("-R",), ("-P", "4"), ("-P", "4", "-R")], ids=["up", "down", "up x4", "down x4"]
)
def test_tcp(guest: GuestRunner, words: tuple[str, ...]) -> None:
    end = iperf3(guest, *words)
    sent, received = end["sum_sent"]["bytes"], end["sum_received"]["bytes"]
    assert received > 1_000_000
    assert received <= sent


@pytest.mark.parametrize("words", [(), ("-R",)], ids=["up", "down"])
def test_udp(guest: GuestRunner, words: tuple[str, ...]) -> None:
    end = iperf3(guest, "-u", "-b", "20M", "-l", "1400", *words)
    total = end["sum"]
    assert total["packets"] > 1000
    assert total["lost_percent"] < 5, total
