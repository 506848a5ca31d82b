"""The check at the end of `make test`: it finds what this run left, and nothing of anybody else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import leftovers

    monkeypatch.setattr(leftovers, "_PATIENCE", 0.0)
    yield leftovers
    sys.modules.pop("leftovers", None)


@pytest.fixture
def run(module: ModuleType) -> Iterator[object]:
    made = module.Leftovers()
    yield made
    made.remove()


def sleeping(**environment: str) -> subprocess.Popen[bytes]:
    """A process that outlives the one that started it, in a session of its own."""
    return subprocess.Popen(["sleep", "600"], env={**os.environ, **environment}, start_new_session=True)


def test_nothing_is_left(run: ModuleType) -> None:
    assert run.find() == []


def test_a_process_of_the_run_is_found_and_ended(run: ModuleType) -> None:
    with sleeping(**run.environment) as process:
        (line,) = run.find()
        assert line == f"process {process.pid}: sleep 600 "
        run.remove()
        assert process.wait(20) == -9
    assert run.find() == []


def test_processes_of_other_runs_are_not(module: ModuleType, run: ModuleType) -> None:
    other = module.Leftovers()
    with sleeping(**other.environment) as process:
        try:
            assert run.find() == []
            assert len(other.find()) == 1
        finally:
            other.remove()
            process.wait(20)


def test_files_and_sockets_are_found_but_for_pytests_own(run: ModuleType) -> None:
    (Path(run.pytest_directory) / "test0").mkdir(parents=True)
    assert run.find() == []
    (run.directory / "file").touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(run.directory / "net.sock"))
    assert run.find() == [f"file {run.directory}/file", f"socket {run.directory}/net.sock"]


def test_names_of_the_lab_are_the_runs_own_by_their_process_id(
    run: ModuleType, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module,
        "_entries",
        lambda path: ["gn-12-1-host", "gn-123-1-host", "x"] if path.name == "netns" else [],
    )
    run.pids.append(12)
    assert run.find() == ["network namespace gn-12-1-host", "file /etc/netns/gn-12-1-host"]
