"""Finds what a test run leaves behind: processes, namespaces, nftables tables, files.

Other programs use the machine at the same time, including other runs of these tests. So this run marks what
is its own: by a word in the environment that every process inherits, by a directory for all temporary files,
and by the process ids of the suites, which are in the names of the namespaces that tests/lab makes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "GUESTNET_TEST_RUN"
_PATIENCE = 10.0
"""Seconds that processes may take to end, on a busy machine."""
_NOTES = Path("/run/guestnet-uplinks")
_OWN = "p"
"""Below the directory for temporary files: where pytest keeps its own."""


class Leftovers:
    """The marks of one run, and what bears them when it is over."""

    def __init__(self) -> None:
        self.word = secrets.token_hex(8)
        self.directory = Path(tempfile.mkdtemp(prefix="gt-"))
        self.directory.chmod(0o755)  # tests have an ordinary user
        self.pids: list[int] = []
        """Of the suites."""
        self._notes = set(_free_notes())
        self._tables = set(_tables())

    @property
    def environment(self) -> dict[str, str]:
        """What the suites are to have in their environment."""
        return {VARIABLE: self.word, "TMPDIR": str(self.directory)}

    @property
    def pytest_directory(self) -> str:
        """For pytest's --basetemp: a short path, since sockets have names of 107 bytes."""
        return str(self.directory / _OWN)

    def find(self) -> list[str]:
        """What is left, a line each. Processes get some time to end."""
        deadline = time.monotonic() + _PATIENCE
        while (running := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        found = [f"process {pid}: {command}" for pid, command in running.items()]
        ours = [name for name in _entries(Path("/run/netns")) if self._is_lab(name)]
        found += [f"network namespace {name}" for name in ours]
        found += [f"file /etc/netns/{name}" for name in _entries(Path("/etc/netns")) if self._is_lab(name)]
        found += [f"file /tmp/{name}" for name in _entries(Path("/tmp")) if self._is_lab(name)]
        kept = (name for name in _entries(self.directory) if name != _OWN)
        found += [f"{_kind(self.directory / name)} {self.directory / name}" for name in kept]
        # A table belongs to a run of guestnet that has a note with a lock on it, as long as it runs.
        notes = [path for path in _free_notes() if path not in self._notes]
        found += [f"note of an uplink {path}" for path in notes]
        if not any(_held_notes()):
            found += [f"nftables table {name}" for name in _tables() if name not in self._tables]
        return found

    def remove(self) -> None:
        """Ends the processes and removes what only this run can have made."""
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _processes(self) -> dict[int, str]:
        mark = f"{VARIABLE}={self.word}".encode()
        found = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                if mark in environment and int(name) != os.getpid():
                    found[int(name)] = (
                        Path(f"/proc/{name}/cmdline").read_text(errors="replace").replace("\0", " ")
                    )
            except OSError:
                continue  # it has ended, or is another user's
        return found

    def _is_lab(self, name: str) -> bool:
        match = re.match(r"gn-(\d+)-", name)
        return match is not None and int(match[1]) in self.pids


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _kind(path: Path) -> str:
    return "socket" if path.is_socket() else "file"


def _notes() -> Iterator[tuple[Path, bool]]:
    """Notes of uplinks, and whether the run that made one lives (`guestnet._linux.masquerade`)."""
    for name in _entries(_NOTES):
        path = _NOTES / name
        if not name.endswith(".json"):
            continue
        with contextlib.suppress(OSError), path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                yield path, True
            else:
                yield path, False


def _free_notes() -> list[Path]:
    return [path for path, held in _notes() if not held]


def _held_notes() -> list[Path]:
    return [path for path, held in _notes() if held]


def _tables() -> list[str]:
    """guestnet's tables in this network namespace."""
    try:
        done = subprocess.run(
            ["nft", "list", "tables"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split()[-1] for line in done.stdout.splitlines() if line.split()[-1].startswith("guestnet_")]
