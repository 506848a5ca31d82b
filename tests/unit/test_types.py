"""What a type checker sees of the public classes, also where a method is generated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RIGHT = """
from typing import assert_type
from guestnet import Attachment, Endpoint, FlowRecord, Forward, Listener
from guestnet import MemoryAttachment, NatNetwork, NetworkStats

async def asynchronous(network: NatNetwork, endpoint: Endpoint, forward: Forward, listener: Listener) -> None:
    assert_type(await network.acreate_endpoint("vm1", mac=None, ip="192.168.64.2"), Endpoint)
    assert_type(await network.aattach("vm1", "memory"), MemoryAttachment)
    assert_type(await network.apublish("80"), Forward)
    assert_type(await endpoint.astats(), NetworkStats)

def synchronous(network: NatNetwork, endpoint: Endpoint, forward: Forward, listener: Listener) -> None:
    network.start()
    assert_type(network.create_endpoint("vm1", mac=None, ip="192.168.64.2"), Endpoint)
    network.remove_endpoint("vm1")
    assert_type(network.attach("vm1", "memory", on_frame=print), MemoryAttachment)
    assert_type(network.attach("vm1", "tap", fd=3), Attachment)
    assert_type(network.listen("stream", "net.sock"), Listener)
    assert_type(network.publish("80"), Forward)
    assert_type(network.flows(), list[FlowRecord])
    assert_type(network.endpoint_stats(), dict[str, NetworkStats])
    assert_type(endpoint.publish("80"), Forward)
    assert_type(endpoint.stats(), NetworkStats)
    forward.close()
    listener.close()
    network.start_capture("all.pcapng")
    network.maintenance()
    network.stop()
"""
WRONG = """
from guestnet import Attachment, Endpoint, FlowRecord, Forward, Listener
from guestnet import MemoryAttachment, NatNetwork, NetworkStats

def wrong(network: NatNetwork, endpoint: Endpoint) -> None:
    network.create_endpoint(4)
    network.create_endpoint("vm1", color="red")
    network.create_endpoint()
    network.attach("vm1", "memory", on_frame=3)
    network.remove_endpoint(id=endpoint)
    endpoint.publish(b"80")
    number: int = network.flows()
"""


def errors(code: str, directory: Path) -> list[str]:
    path = directory / "snippet.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(path)],
        cwd=ROOT,
        env={"MYPYPATH": str(ROOT / "python"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if "snippet.py" in line and ": error:" in line]


def test_right_uses_have_the_types_that_they_should(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed: `make build` installs it")
    assert errors(RIGHT, tmp_path) == []


def test_wrong_uses_are_errors(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed: `make build` installs it")
    lines = {int(line.split(":")[1]) for line in errors(WRONG, tmp_path)}
    first = WRONG.splitlines().index("    network.create_endpoint(4)") + 1
    assert lines == set(range(first, first + 7))
