"""Fixtures of the tests with real guests. See tests/lab for the namespaces that they run in."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, Process, need, vm, wait_until
from lab.kernel import add_kernel_guest
from lab.namespaces import sweep
from lab.runner import GUESTNET, Blob, GuestRunner

TESTS = Path(__file__).resolve().parents[1]
BLOB_SIZE = 1 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--peer",
        choices=("guestnet", "pasta", "kernel", "dataplane"),
        default="guestnet",
        help="run the tests of `guestnet run` against a peer instead, to prove the tests themselves",
    )


@pytest.fixture(scope="session")
def blob(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Blob]:
    need.root()
    path = Path(tempfile.gettempdir()) / f"gn-{os.getpid()}-blob"
    digest = hashlib.sha256()
    block = bytearray(os.urandom(1 << 22))
    try:
        with path.open("wb") as f:
            for i in range(BLOB_SIZE // len(block)):
                block[:8] = i.to_bytes(8, "big")
                f.write(block)
                digest.update(block)
        path.chmod(0o644)
        yield Blob(path, BLOB_SIZE, digest.hexdigest())
    finally:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def lab(blob: Blob) -> Iterator[Lab]:
    """host, out and far with all servers of the outside; shared by the tests of a run."""
    sweep()
    with Lab() as lab:
        start_servers(lab, blob)
        yield lab


@pytest.fixture
def own_lab(blob: Blob) -> Iterator[Lab]:
    """As `lab`, but for one test that changes it."""
    need.root()
    with Lab() as lab:
        start_servers(lab, blob)
        yield lab


@pytest.fixture(scope="session")
def serve_outside(blob: Blob) -> Callable[[Lab], None]:
    """Starts all servers of the outside in a lab of a test's own."""
    return lambda lab: start_servers(lab, blob)


def start_servers(lab: Lab, blob: Blob) -> None:
    env = {"PYTHONPATH": str(TESTS)}
    lab.start([sys.executable, "-m", "lab.servers", str(blob.path)], ns=lab.out, ready="^ready$", env=env)
    lab.start([need.program("iperf3"), "-s", "--forceflush"], ns=lab.out, ready="Server listening")


@pytest.fixture
def guest(lab: Lab, request: pytest.FixtureRequest) -> Iterator[GuestRunner]:
    """`guestnet run`; afterwards nothing of it may be left in the host namespace."""
    peer = request.config.getoption("--peer")
    if peer == "dataplane":
        runner = GuestRunner(lab, peer)
        yield runner
        for process in runner.dataplanes:
            process.stop()
        return
    if peer == "kernel":
        yield GuestRunner(lab, peer, ns=request.getfixturevalue("kernel_guest"))
        return
    need.program(
        GUESTNET if peer == "guestnet" else peer,
        "guestnet: run make build" if peer == "guestnet" else "passt",
    )
    before = pids_in(lab)
    yield GuestRunner(lab, peer)
    for process in lab.processes():
        if process.pid not in before and process.running and process.pid in pids_in(lab):
            process.stop()
    wait_until(lambda: pids_in(lab) <= before, f"no process left in the host namespace besides {before}")


@pytest.fixture(scope="session")
def kernel_guest(lab: Lab) -> str:
    return add_kernel_guest(lab)


@pytest.fixture(scope="session")
def image(lab: Lab) -> vm.Image:
    """The kernel and initramfs of the test guest."""
    return vm.build(lab.dir)


def pids_in(lab: Lab) -> set[int]:
    return {int(p) for p in lab.output(["ip", "netns", "pids", lab.host]).split()}


@pytest.fixture
def guestnet(lab: Lab) -> Iterator[Callable[..., Process]]:
    """Starts `guestnet ARGS...` in the host namespace (options as `Lab.start`) and ends it after the test."""
    need.program(GUESTNET, "guestnet: run make build")
    started: list[Process] = []

    def start(*args: str, ordinary: bool = True, ready: str | None = None) -> Process:
        started.append(lab.start([GUESTNET, *args], ordinary=ordinary, ready=ready))
        return started[-1]

    yield start
    for process in reversed(started):
        process.stop()
