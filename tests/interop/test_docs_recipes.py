"""The recipes of docs/how-to work for a guest that a program of the tests plays."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lab.runner import GuestRunner

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = Path(__file__).parent / "clients"


def script_of(page: str, name: str) -> str:
    """The block of a page that follows the line which gives it this name."""
    text = (ROOT / "docs" / "how-to" / page).read_text()
    found = re.search(rf"`{re.escape(name)}`:\n\n```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no {name}"
    return found[1]


def test_a_monitor_that_needs_a_tap_device_gets_one_in_guestnet_run(guest: GuestRunner) -> None:
    script = guest.lab.dir / "vm-network.sh"
    script.write_text(script_of("firecracker.md", "vm-network.sh"))
    script.chmod(0o644)
    monitor = ["env", f"PYTHONPATH={CLIENTS.parents[1]}", sys.executable, str(CLIENTS / "micro_vm.py")]
    process = guest.start(["sh", str(script), *monitor], "-p", "127.0.0.1:8080:80", ready="^serving$")
    assert "resolved 203.0.113.2" in process.lines
    page = ["curl", "-sS", "-m", "20", "--retry", "5", "--retry-connrefused", "http://127.0.0.1:8080/"]
    assert guest.lab.check(page) == "a page of the guest\n"
    process.stop()
