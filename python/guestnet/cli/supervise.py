"""Waiting for a command as if guestnet were not there: its signals, its terminal, its exit status.

The command stays in the session and process group that guestnet was started in, so a terminal's keys reach it
directly; guestnet passes on only what was sent to guestnet alone. The main thread blocks all of these
signals and takes them one at a time with sigwaitinfo, which says where each came from and needs no handler
and no polling.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from guestnet._linux import libc

FORWARDED = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGWINCH,
        signal.SIGCONT,
        signal.SIGALRM,
    }
)
_WAITED = FORWARDED | {signal.SIGCHLD}

# si_code of a signal that the kernel made itself: a key on the terminal, a window that changed its size. The
# whole foreground process group got it, the command too.
_SI_KERNEL = 0x80

# How long descendants that were killed may take to go; one in an uninterruptible sleep is left to init.
_ENDING_SECONDS = 5.0


def block_signals() -> set[int]:
    """Blocks the signals that `wait` takes and returns the mask of before, which the command is to have.

    Done before any thread starts, so that every thread inherits it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an inherited "ignore" would reap the command for us
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)}


def wait(pid: int) -> int:
    """Waits for child `pid`, passing signals on. Returns its exit status, 128 + number for a signal."""
    while True:
        status = _reap(pid)
        if status is not None:
            return status
        info = signal.sigwaitinfo(_WAITED)
        if info.si_signo != signal.SIGCHLD and info.si_code != _SI_KERNEL:
            with contextlib.suppress(OSError):  # a set-uid command of another user, or one that just ended
                os.kill(pid, info.si_signo)


def _reap(pid: int) -> int | None:
    """Takes in whatever children have ended (orphans come to us as subreaper); the status once `pid` has."""
    found: int | None = None
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found if found is not None else 128 + signal.SIGKILL
        if child == 0:
            return found
        if child == pid:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code
            return found


def become_subreaper() -> None:
    """Orphaned descendants become ours, to be ended with the command."""
    libc.set_child_subreaper()


def end_descendants() -> None:
    """Kills what the command left running, children of children included, and leaves no zombie."""
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
    own = os.getpid()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The name in parentheses may hold anything, so the fields are counted from its end.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            if parent == own:
                found.append(int(name))
    return found


def restore_terminal() -> None:
    """Takes the terminal back if a command with job control (a shell) died while it held it."""
    try:
        if os.tcgetpgrp(0) == os.getpgrp():
            return
        held = os.tcgetpgrp(0)
        os.killpg(held, 0)
    except ProcessLookupError:
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        try:
            os.tcsetpgrp(0, os.getpgrp())
        except OSError:
            pass
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    except OSError:
        pass  # not a terminal, or another's
