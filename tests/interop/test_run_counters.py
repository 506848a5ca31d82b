"""The counters that `guestnet run --stats` prints are those of the whole run."""

from __future__ import annotations

import re

import pytest
from lab.namespaces import OUT4
from lab.runner import GuestRunner

pytestmark = pytest.mark.usefixtures("guest")


def counters(stderr: str) -> dict[str, int]:
    found = re.findall(r"^([a-z0-9 ]+?)\s+([\d,]+)$", stderr, re.MULTILINE)
    return {name: int(value.replace(",", "")) for name, value in found}


def test_all_bytes_of_a_download_are_counted(guest: GuestRunner) -> None:
    script = f"curl -sS http://{OUT4}/blob | head -c 20000000 | wc -c"
    done = guest(["sh", "-c", script], "--stats")
    assert done.stdout == "20000000\n", done.stderr
    assert counters(done.stderr)["tx bytes"] > 20_000_000


def test_a_run_that_ends_at_once_is_counted(guest: GuestRunner) -> None:
    """Four in a row, since it was a matter of milliseconds."""
    for _ in range(4):
        done = guest(["ping", "-c", "1", "192.168.64.1"], "--stats")
        assert done.returncode == 0
        found = counters(done.stderr)
        assert found["rx frames"] >= 2, done.stderr  # ARP, and the request
        assert found["tx frames"] >= 2
