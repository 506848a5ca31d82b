"""A user's program that uses what the package promises is clean for mypy --strict, and runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import guestnet
import pytest

PROGRAM = """
from __future__ import annotations

import asyncio
from ipaddress import IPv4Address

from guestnet import (
    AddressPoolExhausted, AlreadyRunning, Endpoint, EndpointExists, EndpointNotFound, NatConfig, NatNetwork,
    NetMode, NotRunning, PortInUse,
)


def synchronous() -> list[str]:
    seen: list[str] = []
    with NatNetwork(NatConfig(subnet="10.5.0.0/30", mode=NetMode.NAT)) as network:
        endpoint: Endpoint = network.create_endpoint("vm1")
        address: IPv4Address = endpoint.ip
        frames: list[bytes] = []
        attachment = network.attach("vm1", "memory", on_frame=frames.append)
        attachment.send(bytes(60))
        port: int = network.publish("127.0.0.1:0:80").host_port
        found: Endpoint | None = network.get_endpoint("vm1")
        assert found is endpoint and network.endpoints == [endpoint] and network.endpoint_count == 1
        try:
            network.create_endpoint("vm1")
        except EndpointExists:
            seen.append("exists")
        try:
            network.create_endpoint("vm2")
        except AddressPoolExhausted:
            seen.append("exhausted")
        try:
            network.remove_endpoint("vm9")
        except EndpointNotFound:
            seen.append("unknown")
        try:
            network.start()
        except AlreadyRunning:
            seen.append("running")
        try:
            network.publish(f"127.0.0.1:{port}:80")
        except PortInUse:
            seen.append("taken")
        received: int = network.stats().rx_frames
        assert received >= 0 and str(address) in repr(endpoint) and "10.5.0.0/30" in repr(network)
        network.maintenance()
        network.services.dns.add_record("a.example", "192.0.2.1")
        gateway: IPv4Address = network.gateway
        assert gateway == IPv4Address("10.5.0.1") and network.config.mtu == 1500
    assert not network.is_running
    try:
        network.publish("127.0.0.1:0:80")
    except NotRunning:
        seen.append("stopped")
    return seen


async def asynchronous() -> str:
    async with NatNetwork(NatConfig(mode="host_only")) as network:
        endpoint = await network.acreate_endpoint("vm1")
        flows = await network.aflows()
        assert flows == []
        await network.aremove_endpoint(endpoint.id)
        return str(endpoint.ip)


if __name__ == "__main__":
    print(*synchronous(), asyncio.run(asynchronous()))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_it_runs(program: Path) -> None:
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == [
        *("exists", "exhausted", "unknown", "running", "taken", "stopped"),
        "192.168.64.2",
    ]


def test_it_is_clean_in_development_mode(program: Path) -> None:
    """Nothing is left open, deprecated, or not awaited."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)


def test_it_is_clean_for_a_strict_type_checker(program: Path) -> None:
    """Against the package as it is installed (PEP 561), and not as part of the project."""
    assert Path(guestnet.__file__).with_name("py.typed").exists()
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", program.parent / "cache", program],
        capture_output=True,
        text=True,
        cwd=program.parent,
        timeout=110,
        check=False,
    )
    assert done.stdout.startswith("Success"), done.stdout
    wrong = PROGRAM.replace("address: IPv4Address = endpoint.ip", "address: int = endpoint.ip")
    program.write_text(wrong)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", program.parent / "cache", program],
        capture_output=True,
        text=True,
        cwd=program.parent,
        timeout=110,
        check=False,
    )
    assert "Incompatible types" in done.stdout, "the types are known, and not Any"
