"""Runs commands in guests of `guestnet run`, or of a peer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from guestnet.cli.runner.session import HOST_IDS_NOTE

from lab.dataplane import add_dataplane_guest
from lab.namespaces import Lab
from lab.process import DEADLINE, Process

GUESTNET = str(Path(sys.prefix) / "bin" / "guestnet")


def without_host_ids_note(stderr: str) -> str:
    """`stderr` of a command that was given --host-ids, without the one line that warns of it."""
    return stderr.replace(f"guestnet: {HOST_IDS_NOTE}\n", "", 1)


@dataclass(frozen=True)
class Blob:
    """A file of bytes that nothing on the way can guess, and its digest."""

    path: Path
    size: int
    sha256: str


@dataclass
class GuestRunner:
    """`guestnet run` in the host namespace, as an ordinary user unless told otherwise."""

    lab: Lab
    peer: str
    options: list[str] = field(default_factory=list)
    ns: str | None = None
    dataplanes: list[Process] = field(default_factory=list)

    def command(self, command: Sequence[str], options: Sequence[str] = ()) -> list[str]:
        if self.peer == "guestnet":
            return [GUESTNET, "run", *self.options, *options, "--", *command]
        if self.peer == "kernel":
            if options:
                pytest.skip(f"the kernel has no {options[0]}")
            return list(command)
        if self.peer == "dataplane":
            self.ns = self._dataplane(options)
            return list(command)
        words = iter(options)
        translated = ["--config-net", "--no-map-gw", "--quiet"]
        for word in words:
            if word in ("-p", "--publish"):
                spec, _, proto = next(words).partition("/")
                translated += ["-u" if proto == "udp" else "-t", spec]
            elif word == "--mtu":
                translated += ["-m", next(words)]
            else:
                pytest.skip(f"pasta has no {word}")
        return ["pasta", *translated, "--", *command]

    def _as(self, ordinary: bool, options: Sequence[str]) -> Sequence[str]:
        """Root's guest is root of the host's files: the checkout may be where nobody else has a way to."""
        return options if ordinary or self.peer != "guestnet" else ["--host-ids", *options]

    def _dataplane(self, options: Sequence[str]) -> str:
        words, forwards, mtu = iter(options), [], 1500
        for word in words:
            if word == "-p":
                spec = next(words)
                forwards.append(spec if "/" in spec else f"{spec}/tcp")
            elif word == "--mtu":
                mtu = int(next(words))
            else:
                pytest.skip(f"the data plane alone has no {word}")
        ns, process = add_dataplane_guest(self.lab, *forwards, mtu=mtu)
        self.dataplanes.append(process)
        return ns

    def __call__(
        self,
        command: Sequence[str],
        *options: str,
        ordinary: bool = True,
        seconds: float = DEADLINE,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in a guest to its end."""
        full = self.command(command, self._as(ordinary, options))
        done = self.lab.run(full, ns=self.ns, ordinary=ordinary, seconds=seconds, stdin=stdin)
        if "--host-ids" in full:
            done.stderr = without_host_ids_note(done.stderr)
        return done

    def check(
        self, command: Sequence[str], *options: str, ordinary: bool = True, seconds: float = DEADLINE
    ) -> str:
        """As a call, but a status other than 0 fails the test; gives stdout."""
        done = self(command, *options, ordinary=ordinary, seconds=seconds)
        assert done.returncode == 0, f"{list(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(
        self,
        command: Sequence[str],
        *options: str,
        ready: str | None = None,
        ordinary: bool = True,
        stdin: int | None = None,
    ) -> Process:
        """Starts a command in a guest; `ready` is a line of its output to wait for."""
        full = self.command(command, self._as(ordinary, options))
        stdin = stdin or subprocess.DEVNULL
        return self.lab.start(full, ns=self.ns, ordinary=ordinary, ready=ready, stdin=stdin)
