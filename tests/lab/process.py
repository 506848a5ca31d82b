"""Processes that a test starts: their output line by line, and their end by pid."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TypeVar

T = TypeVar("T")
DEADLINE = 20.0
"""Seconds that anything may take on a busy two-core machine before a test calls it broken."""


class Timeout(AssertionError):
    """A condition did not come true in time; the message says which, and what was seen."""


def wait_until(condition: Callable[[], T], what: str, seconds: float = DEADLINE, step: float = 0.02) -> T:
    """Calls `condition` until it gives something true and returns that."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Timeout(f"not within {seconds:g} s: {what} (last seen: {value!r})")
        time.sleep(step)


class Process:
    """A running command. stdout and stderr are kept as text, line by line, in one list."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        cwd: str = "/",
    ) -> None:
        self.command = list(command)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._popen = subprocess.Popen(
            self.command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=cwd
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {command[0]}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stdout = self._popen.stdout
        assert stdout is not None
        with stdout:
            for raw in stdout:
                with self._changed:
                    self.lines.append(raw.decode(errors="replace").rstrip("\r\n"))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def stdin(self) -> IO[bytes]:
        assert self._popen.stdin is not None
        return self._popen.stdin

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def ended(self) -> bool:
        """Nobody holds its output any more, neither it nor what it started."""
        return not self._reader.is_alive()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_line(self, pattern: str, seconds: float = DEADLINE, start: int = 0) -> re.Match[str]:
        """The first line from number `start` on that matches; fails when the process ends without one."""
        regex = re.compile(pattern)
        end = time.monotonic() + seconds
        seen = start
        with self._changed:
            while True:
                while seen < len(self.lines):
                    if found := regex.search(self.lines[seen]):
                        return found
                    seen += 1
                left = end - time.monotonic()
                if left <= 0 or not self._reader.is_alive():
                    how = "in time" if left <= 0 else f"before it ended with {self._popen.poll()}"
                    raise Timeout(f"{self.command} printed no /{pattern}/ {how}:\n{self.output[-4000:]}")
                self._changed.wait(min(left, 0.5))

    def wait(self, seconds: float = DEADLINE) -> int:
        """The exit status (negative: the signal that ended it)."""
        try:
            status = self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Timeout(f"{self.command} still runs after {seconds:g} s:\n{self.output[-4000:]}") from None
        self._reader.join(5)
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()
        return status

    def signal(self, number: int) -> None:
        if self.running:
            os.kill(self.pid, number)

    def stop(self, seconds: float = 10.0) -> int:
        """Ends it: SIGTERM first, SIGKILL when that is not heard."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait(seconds)
        except Timeout:
            self.signal(signal.SIGKILL)
            return self.wait(seconds)
