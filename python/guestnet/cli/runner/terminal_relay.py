"""A terminal of the command's own, so that guestnet has the person's terminal to itself (`--ask`).

Theory of operation:

- The command runs in a session of its own whose terminal is a pseudo-terminal. Those of its standard streams
  that are the person's terminal become this one. It has no other way to the person's terminal: it can
  neither read an answer nor change how the terminal works.
- A thread copies what the person types to the command, and what the command writes to the person. While
  stdin is the person's terminal it is in raw mode: keys such as Ctrl-C become signals in the command's
  terminal.
- While a question is open (`paused`), nothing is copied, and the person's terminal is as it was at the start.
- What is copied is bounded: the thread reads no more keys while the command does not take them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import termios
import threading
import tty
from collections.abc import Iterator

_BYTES = 65536
_PAUSE, _RESUME, _END = b"p", b"r", b"e"


class TerminalRelay:
    """Between the person's terminal and that of a command.

    Args:
        fd: The person's terminal.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._types = os.isatty(0)
        self._before = termios.tcgetattr(fd)
        self._master, self._slave = os.openpty()
        termios.tcsetattr(self._slave, termios.TCSANOW, self._before)
        os.set_blocking(self._master, False)
        self.resize()
        self._orders, self._order = os.pipe()
        self._done = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def enter(self) -> None:
        """In the process that becomes the command: makes the pseudo-terminal its terminal."""
        os.setsid()
        fcntl.ioctl(self._slave, termios.TIOCSCTTY, 0)
        for stream in (0, 1, 2):
            if os.isatty(stream):
                os.dup2(self._slave, stream)

    def start(self) -> None:
        """Copies from now on. The command has been forked."""
        os.close(self._slave)
        self._raw()
        self._thread = threading.Thread(target=self._run, name="guestnet-terminal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends when all that the command wrote is copied. The terminal is as it was at the start."""
        if self._thread is not None:
            self._tell(_END)
            self._thread.join()
            self._thread = None
            self._restore()
        for fd in (self._master, self._orders, self._order):
            os.close(fd)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Copies nothing meanwhile."""
        self._tell(_PAUSE)
        self._restore()
        try:
            yield
        finally:
            self._raw()
            self._tell(_RESUME)

    def resize(self) -> None:
        """Gives the command's terminal the size of the person's."""
        with contextlib.suppress(OSError):
            size = fcntl.ioctl(self._fd, termios.TIOCGWINSZ, bytes(8))
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def _raw(self) -> None:
        if self._types:
            with contextlib.suppress(termios.error):
                tty.setraw(self._fd, termios.TCSADRAIN)

    def _restore(self) -> None:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def _tell(self, order: bytes) -> None:
        os.write(self._order, order)
        self._done.acquire()

    def _run(self) -> None:
        keys = b""
        types, copies, ends = self._types, True, False
        while True:
            reads = [self._orders]
            if copies:
                reads.append(self._master)
            if types and copies and not keys and not ends:
                reads.append(self._fd)
            readable, writable, _ = select.select(
                reads, [self._master] if keys else [], [], 0 if ends else None
            )
            if self._orders in readable and not ends:
                order = os.read(self._orders, 1)
                copies, ends = order != _PAUSE, order == _END
                if not ends:
                    self._done.release()
                continue
            if self._master in writable:
                keys = keys[_written(self._master, keys) :]
            if self._fd in readable:
                keys = _read(self._fd) or b""
                types = bool(keys)  # the terminal is gone
            written = _read(self._master) if self._master in readable else b""
            if written:
                _write_all(self._fd, written)
            if ends and not written:
                self._done.release()
                return
            if written is None:  # the command and all that it started have closed it
                copies = False


def _read(fd: int) -> bytes | None:
    """What is there; None at the end."""
    try:
        return os.read(fd, _BYTES) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None


def _written(fd: int, data: bytes) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0
    except OSError:
        return len(data)


def _write_all(fd: int, data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(fd, data) :]
