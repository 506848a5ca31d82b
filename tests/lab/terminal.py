"""Programs on a terminal of their own."""

from __future__ import annotations

import os
import pty
import select
import time
from collections.abc import Callable, Mapping


class Terminal:
    """A program on a terminal of its own, as its session's leader."""

    def __init__(self, *words: str, env: Mapping[str, str] | None = None) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(words[0], words, os.environ if env is None else env)
        self.text = ""

    def until(self, done: Callable[[str], bool]) -> None:
        """Reads until `done` is true of all that was written."""
        deadline = time.monotonic() + 20
        while not done(self.text):
            assert time.monotonic() < deadline, self.text
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self.fd, 4096)
                except OSError:
                    data = b""
                assert data or done(self.text), self.text
                self.text += data.decode()

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self.fd, text.encode())

    def status(self) -> int:
        """The exit status, once the program has ended; the terminal is gone then."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return status
