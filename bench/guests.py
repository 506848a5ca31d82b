"""A guest that is up and takes commands of bench/load, and the processes that serve it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import processes
from lab import Lab, Process
from lab.namespaces import HOST4, OUT4
from lab.process import Timeout

PORT = 9100
"""Of the load's servers, outside and in guests."""
OUTSIDE = f"{OUT4}:{PORT}"


class Failed(Exception):
    """A contender could not do it; the message says what was seen."""


@dataclass
class Arena:
    """The namespaces and what all contenders share."""

    lab: Lab
    load: str
    """The load program, where an ordinary user may run it."""
    accel: str = "tcg"
    made: int = 0
    router: str = ""
    """The namespace whose kernel translates; made when it is needed."""
    server: Process | None = None
    """The load's server in the namespace *out*, which all contenders share."""

    def renew_server(self) -> None:
        """Starts the server, in place of one that runs: connections of a workload that failed may hold its
        threads."""
        if self.server is not None:
            self.server.stop(5)
        self.server = self.lab.start([self.load, "serve", str(PORT)], ns=self.lab.out, ready="^ready$")

    def number(self) -> int:
        """A number that no guest had before."""
        self.made += 1
        return self.made

    def path(self, name: str) -> str:
        """A path for a socket, short enough for one, that nothing has."""
        return str(self.lab.dir / f"{self.number()}-{name}")

    def outside(self, words: Sequence[str], seconds: float = 30) -> dict[str, float]:
        """One command of the load, run in the namespace *out*."""
        try:
            done = self.lab.run([self.load, *words], ns=self.lab.out, seconds=seconds)
        except Timeout as error:
            raise Failed(f"{' '.join(words)}: no end in {seconds:g} s") from error
        return numbers(done.stdout or done.stderr)


def numbers(text: str) -> dict[str, float]:
    """The numbers in a line of the load, or the error that it tells."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise Failed(text.strip()[-200:] or "no answer") from error
    if "error" in values:
        raise Failed(str(values["error"]))
    return {name: float(value) for name, value in values.items()}


@dataclass
class Guest:
    """The agent in a guest, and `serving`: the processes that are the contender's."""

    agent: Process
    serving: Sequence[Process]
    published: str
    """Where the outside reaches the server in the guest."""
    dns: str
    """Whom the guest asks for names."""
    asked: int = 0
    worn: bool = False
    """Whether what was measured left the guest in a state that would disturb the next measurement."""
    clean: Callable[[], None] = field(default=lambda: None)

    def ask(self, words: Sequence[str], seconds: float = 30) -> dict[str, float]:
        """One command of the load, run in the guest."""
        self.asked += 1
        start = len(self.agent.lines)
        try:
            self.agent.stdin.write(f"{self.asked} {' '.join(words)}\n".encode())
            self.agent.stdin.flush()
            line = self.agent.wait_line(rf"^RESULT {self.asked} (\{{.*\}})", seconds, start)
        except Timeout as error:
            how = "no end" if self.agent.running else "the guest ended"
            raise Failed(f"{' '.join(words)}: {how}: {' '.join(self.agent.lines[-2:])[-200:]}") from error
        except OSError as error:
            raise Failed(f"the guest is gone: {error}") from error
        return numbers(line[1])

    def own(self) -> list[int]:
        """The contender's processes."""
        return processes.family(process.pid for process in self.serving)

    def stop(self) -> None:
        for process in {id(p): p for p in (self.agent, *self.serving)}.values():
            process.stop(5)
        self.clean()


def published(number: int) -> tuple[int, str]:
    """The host port that reaches the server in guest `number`, and its address for the outside."""
    port = 20000 + number
    return port, f"{HOST4}:{port}"


def copy_program(source: Path, directory: Path) -> str:
    """A copy that an ordinary user may run, wherever the original lies."""
    target = directory / source.name
    target.write_bytes(source.read_bytes())
    target.chmod(0o755)
    return str(target)
