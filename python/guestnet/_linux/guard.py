"""A process that outlives guestnet to end what was in the guest's namespace, should guestnet be killed.

The command itself dies with guestnet (PR_SET_PDEATHSIG), but what it left in the background would live on
without a network. Orphans have lost the parent that they could be found by, so they are found by their
network namespace. The guard costs nothing while guestnet lives: it waits for the end of a pipe.

It is in the guest's namespace itself. So where a guestnet runs in the namespace of another one, the other's
guard does not end this one before it has done its work. But it sees the host's mounts, so it lets nobody look
through it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from typing import NoReturn

from guestnet._linux import libc

_PASSES = 100
_BETWEEN = 0.02
"""Seconds; killed processes take a moment to go, and their children another look."""


class Guard:
    """The side of who is watched."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def wait_ready(self) -> None:
        """Waits until the guard would do its work: before the guest starts anything that could be left."""
        self._line.recv(1)


def watch_over(pid: int) -> Guard:
    """Forks a guard over the network namespace of process `pid`, a child of ours and alone in it yet, for as
    long as this process lives and holds the result.

    It is one of the children of this process: `supervise.end_descendants` ends it with the others. Call this
    before any thread exists.
    """
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        _guard(theirs, pid)
    theirs.close()
    return Guard(ours)


def _guard(line: socket.socket, pid: int) -> NoReturn:
    try:
        os.setsid()  # a key on the terminal, or a signal to the group, is not for the guard
        signal.pthread_sigmask(signal.SIG_SETMASK, set(signal.Signals))
        for name in os.listdir("/proc/self/fd"):
            if int(name) != line.fileno():
                with contextlib.suppress(OSError):  # the one that the directory was read by
                    os.close(int(name))
        place = _enter(pid)
        line.send(b"1")
        if place is not None and line.recv(1) == b"":
            _end_all(place)
    finally:
        os._exit(0)


def _enter(pid: int) -> _Place | None:
    place = _namespace(pid)
    for kind, flag in (("user", libc.CLONE_NEWUSER), ("net", libc.CLONE_NEWNET)):
        with contextlib.suppress(OSError):
            libc.setns(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), flag)
    libc.hide_from_tracers()
    return place


_Place = tuple[int, int]
"""Device and inode of a namespace."""


def _end_all(place: _Place) -> None:
    left: set[int] = set()
    for number in range(_PASSES):
        here, below, alive = _inside(place)
        # A guestnet in the namespace has guests in another one, which its own guard ends first.
        left = (left | below) & alive
        if number and not here and not left:
            return
        for pid in here | left if number else here:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_BETWEEN)


def _inside(place: _Place) -> tuple[set[int], set[int], set[int]]:
    """The processes in a network namespace, those elsewhere that descend from them, and all there are."""
    parents: dict[int, int] = {}
    here: set[int] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        pid = int(name)
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # The name in parentheses may hold anything, so the fields are counted from its end.
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state in (b"Z", b"X") or pid == os.getpid():
            continue
        parents[pid] = int(parent)
        if _namespace(pid) == place:
            here.add(pid)
    found, size = set(here), -1
    while size != len(found):
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return here, found - here, set(parents)


def _namespace(pid: int) -> _Place | None:
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except OSError:
        return None
    return status.st_dev, status.st_ino
