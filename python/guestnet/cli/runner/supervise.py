"""Waits for a command as if guestnet were not there: signals, terminal and exit status are the command's.

Theory of operation:

- The command stays in the session of guestnet, and in its process group or in one that has the terminal. So
  keys of the terminal reach it directly, and guestnet passes on only signals that were sent to guestnet
  alone.
- The main thread blocks these signals and takes them one at a time with sigwaitinfo(2). It needs no handler
  and no polling, and learns where each signal came from.
- A command that is stopped stops guestnet too, so that the shell sees a stopped job.
- With `--ask` the command has a terminal of its own instead (`terminal_relay`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

from guestnet._linux import libc

_STOPPING = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_OWN_FAULTS = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGILL,
        signal.SIGFPE,
        signal.SIGTRAP,
        signal.SIGSYS,
        signal.SIGABRT,
        signal.SIGPIPE,
        signal.SIGXCPU,
        signal.SIGXFSZ,
    }
)
"""Signals that a process causes itself."""
FORWARDED = frozenset(
    set(signal.valid_signals()) - _STOPPING - _OWN_FAULTS - {signal.SIGKILL, signal.SIGCHLD, signal.SIGURG}
)
"""Signals that others send, real-time signals included. A stop stops guestnet: see `_stop_with`."""
_WAITED = FORWARDED | {signal.SIGCHLD}

# si_code of a signal that the kernel made itself: a key on the terminal, a window that changed its size. The
# whole foreground process group got it, the command too.
SI_KERNEL = 0x80
# But these two go to the session's leader alone, when its terminal is gone.
_HANGUP = frozenset({signal.SIGHUP, signal.SIGCONT})

# How long descendants that were killed may take to go; one in an uninterruptible sleep is left to init.
_ENDING_SECONDS = 5.0


def block_signals() -> set[int]:
    """Blocks the signals that `wait` takes. Returns the mask from before, which the command gets.

    This is done before any thread starts, so that every thread inherits it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an inherited "ignore" would reap the command for us
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)}


def wait(pid: int, resized: Callable[[], None] | None = None) -> int:
    """Waits for child `pid` and passes signals on. Returns its exit status, 128 + number for a signal.

    `resized`: called when the terminal has another size. It is given when the command has a terminal, and a
    session, of its own; keys of guestnet's terminal then reach guestnet alone.
    """
    while True:
        status = _reap(pid)
        if status is not None:
            return status
        info = signal.sigwaitinfo(_WAITED)
        if info.si_signo == signal.SIGWINCH and resized is not None:
            resized()
            continue
        if info.si_signo == signal.SIGCONT:
            _lend_terminal(pid)
        reached_it = info.si_code == SI_KERNEL and resized is None and not _is_hangup(info.si_signo)
        if info.si_signo != signal.SIGCHLD and not reached_it:
            with contextlib.suppress(OSError):  # a set-uid command of another user, or one that just ended
                os.kill(pid, info.si_signo)


def _is_hangup(number: int) -> bool:
    return number in _HANGUP and os.getsid(0) == os.getpid()


def _reap(pid: int) -> int | None:
    """Reaps the children that have ended (orphans come here, to the subreaper). Returns the status once `pid`
    has.
    """
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return 128 + signal.SIGKILL
        if child == 0:
            return None
        if child != pid:
            continue
        if os.WIFSTOPPED(status):
            _stop_with(pid, os.WSTOPSIG(status))
            continue
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


def _stop_with(pid: int, number: int) -> None:
    """Stops guestnet when the command has stopped, and continues both together.

    The command stops by itself (`suspend` in a shell), by a key that its process group got, or because it
    wants a terminal that it does not have. The user at the terminal waits for guestnet, so guestnet stops
    too. Without a terminal, or in its background, no user waits, and a stop that was sent to the command
    alone applies to it alone.
    """
    with contextlib.suppress(OSError):
        if os.getsid(pid) != os.getsid(0):
            return
        foreground = os.tcgetpgrp(0)
        waits = number in (signal.SIGTTIN, signal.SIGTTOU) or foreground in (os.getpgrp(), os.getpgid(pid))
        if not waits or _status(pid)[0] != b"T":
            return  # or it goes on already
        os.kill(os.getpid(), signal.SIGSTOP)
        _lend_terminal(pid)
        group = os.getpgid(pid)
        os.kill(pid if group == os.getpgrp() else -group, signal.SIGCONT)


def _lend_terminal(pid: int) -> None:
    """Gives the terminal, if guestnet has it, to a command with a process group of its own."""
    with contextlib.suppress(OSError):
        group = os.getpgid(pid)
        if os.tcgetpgrp(0) == os.getpgrp() != group:
            _give_terminal(group)


def holds_terminal_alone() -> bool:
    """Whether guestnet has the terminal and is alone in its process group, as when a shell with job control
    started it.

    The command can then have the terminal to itself (`take_terminal`). In a pipeline the other processes
    would lose it.
    """
    own, group = os.getpid(), os.getpgrp()
    try:
        if os.tcgetpgrp(0) != group:
            return False
        return all(
            pid == own or _group(pid) != group for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        )
    except OSError:
        return False


def take_terminal() -> None:
    """Gives the terminal to a process group of this process's own. The command's process calls this before it
    executes.

    A shell in a PID namespace cannot give the terminal back to a group outside, which has no number there,
    and some shells then end with an error.
    """
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
        _give_terminal(os.getpgrp())


def _group(pid: int) -> int:
    try:
        return int(_status(pid)[2])
    except (OSError, ValueError, IndexError):
        return -1


def _give_terminal(group: int) -> None:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        os.tcsetpgrp(0, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def become_subreaper() -> None:
    """Makes orphaned descendants children of this process, so that they end with the command."""
    libc.set_child_subreaper()


def end_descendants() -> None:
    """Kills everything that the command left running, and leaves no zombie."""
    deadline = time.monotonic() + _ENDING_SECONDS
    while time.monotonic() < deadline:
        try:
            child, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if child:
            continue
        for pid in _children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        # Killing a parent makes its children ours: look again when something has ended.
        signal.sigtimedwait({signal.SIGCHLD}, 0.05)


def _children() -> list[int]:
    """The processes whose parent is this one."""
    try:
        found: list[int] = []
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
        return found
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return _children_of_all()


def _children_of_all() -> list[int]:
    own = os.getpid()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parent = int(_status(int(name))[1])
            except (OSError, ValueError, IndexError):
                continue
            if parent == own:
                found.append(int(name))
    return found


def _status(pid: int) -> list[bytes]:
    """The state, the parent and so on, from /proc."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The name in parentheses may hold anything, so the fields are counted from its end.
        return file.read().rpartition(b")")[2].split()


def restore_terminal() -> None:
    """Takes the terminal back if a command with job control (a shell) died while it had it."""
    with contextlib.suppress(OSError):  # not a terminal, or another's
        held = os.tcgetpgrp(0)
        if held == os.getpgrp():
            return
        try:
            os.killpg(held, 0)
        except ProcessLookupError:
            _give_terminal(os.getpgrp())
