"""A child process that is forked early, prepares itself, and waits until it may start its command.

Theory of operation: the fork comes before any thread of this process starts. A forked copy of a process with
threads may find any lock taken, and unshare(CLONE_NEWUSER) fails in it. The command starts only when its
network is ready. If it cannot be executed, `go` reports this at once, because the socket between the two
processes closes on exec.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from guestnet._linux import libc
from guestnet.errors import GuestnetError

EXIT_FAILED = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

Command = Sequence[str] | Callable[[], int]

# A message is words between zero bytes, a few hundred bytes in all: READY with further words, or _ERROR with
# an exit status and a text. It needs no module; `json` takes 1 ms to import.
READY = b"ready"
_ERROR = "error"
_MESSAGE_BYTES = 65536
# Python ignores these from its start; a command wants to find them as the shell left them.
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)


class StartError(GuestnetError):
    """The command could not be prepared or started. The message says what to do.

    `exit_status` is what a shell reports: 127 not found, 126 not executable, 125 otherwise.
    """

    def __init__(self, message: str, exit_status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Held:
    """The parent's side of a waiting child."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self._control = control
        self._started = False

    def hand_over(self, pid: int) -> None:
        """The child has exited and left its work to `pid`, which it forked and which is a child of ours now.

        See `libc.set_child_subreaper`.
        """
        os.waitpid(self.pid, 0)
        self.pid = pid

    def receive(self, fds: int = 0) -> tuple[list[str], list[int]]:
        """What the child says next, and the descriptors with it. Raises StartError if the child failed."""
        data, received, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES, fds)
        for fd in received:
            os.set_inheritable(fd, False)
        if not data.startswith(READY):
            raise _failure(data)
        return unpack(data), list(received)

    @property
    def started(self) -> bool:
        """Whether the command was started, or the child ended."""
        return self._started

    def answer(self, *words: object) -> None:
        """Lets the child continue from where it waits."""
        self._control.send(pack(*words))

    def go(self) -> None:
        """Lets the command start, and returns when it runs. Raises StartError if it could not be executed."""
        try:
            self.answer()
            problem = self._control.recv(_MESSAGE_BYTES)
        except OSError:
            problem = b""
        self._control.close()
        if problem:
            raise _failure(problem)
        self._started = True

    def close(self) -> None:
        """Ends a child that was never started, and waits for it. It does nothing to a started one."""
        if not self._started:
            self.kill()

    def kill(self) -> None:
        """Ends the child, started or not, and waits for it. It does nothing if that was done before."""
        self._control.close()
        self._started = True
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def pack(*words: object) -> bytes:
    """Writes a message that says that all is well, with further words."""
    return b"\0".join((READY, *(str(word).encode(errors="replace") for word in words)))


def unpack(data: bytes) -> list[str]:
    """The further words of a message."""
    return data.decode(errors="replace").split("\0")[1:]


def _failure(data: bytes) -> StartError:
    kind, _, rest = data.decode(errors="replace").partition("\0")
    status, _, text = rest.partition("\0")
    if kind != _ERROR or not status.isdecimal():
        return StartError("The child process ended before it was ready: run the command again.")
    return StartError(text, int(status))


def fork_held(
    prepare: Callable[[socket.socket], None], command: Command, signal_mask: Iterable[int] = ()
) -> Held:
    """Forks a child that calls `prepare` with its end of the control socket, and waits for `go`.

    It then executes `command` with `signal_mask` blocked, or calls it and exits with the result. Call this
    before any thread exists. The child is killed when the thread that called this ends.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # else the child's copy of what is buffered might be written twice
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _child(prepare, command, theirs, parent, signal_mask)
    theirs.close()
    return Held(pid, ours)


def _child(
    prepare: Callable[[socket.socket], None],
    command: Command,
    control: socket.socket,
    parent: int,
    signal_mask: Iterable[int],
) -> NoReturn:
    """Everything that the child does. It leaves by exec or _exit, so no cleanup of the parent runs in it."""
    status = EXIT_FAILED
    try:
        prepare(control)
        if not control.recv(_MESSAGE_BYTES):
            os._exit(EXIT_FAILED)  # the parent gave up, or is gone
        libc.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() not in (parent, 0):  # 0: in a PID namespace of its own, which ends with guestnet
            os._exit(EXIT_FAILED)
        if callable(command):
            control.close()
            status = command()
        else:
            execute(command, signal_mask)
    except StartError as error:
        status = error.exit_status
        _report(control, str(error), status)
    except BaseException as error:
        _report(control, f"Cannot start the command: {error}.", status)
    finally:
        os._exit(status)


def _report(control: socket.socket, text: str, status: int) -> None:
    with contextlib.suppress(OSError):
        control.send(f"{_ERROR}\0{status}\0{text}".encode(errors="replace"))


def execute(command: Sequence[str], signal_mask: Iterable[int] = ()) -> NoReturn:
    """Replaces this process by `command`, as a shell would start it. Raises StartError if it cannot."""
    name = command[0]
    for number in _PYTHON_IGNORES:
        signal.signal(number, signal.SIG_DFL)
    # The mask is restored last: a signal that came meanwhile ends the child here, as it would the command.
    signal.pthread_sigmask(signal.SIG_SETMASK, signal_mask)
    try:
        os.execvp(name, list(command))
    except (OSError, ValueError) as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, None) and not os.path.isfile(name):
            raise StartError(
                f"There is no command {name!r}: install it, or give its path.", EXIT_NOT_FOUND
            ) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise StartError(
            f"Cannot execute {name!r} ({reason}): "
            f"give a program, or a script with the x bit whose #! names an interpreter that is there.",
            EXIT_NOT_EXECUTABLE,
        ) from error
