"""The first process of the guest's PID namespace: it ends everything in the namespace, and keeps its mounts.

Theory of operation:

- When it ends, for any reason, the kernel kills every process of the namespace. It ends when guestnet does,
  because it waits for the end of a pipe that only guestnet can write to.
- Orphans become its children, and the kernel reaps them. No process of the namespace can signal it: the
  kernel ignores their signals to the first process.
- It restores files for name resolution that the host has replaced (`mounts.NameFiles`). In the first
  moments it looks for changes itself; then inotify reports them, and it sleeps. The end of an inotify
  descriptor takes the kernel 10 to 20 ms, which a short command is spared.
- It has left the session of the command, so no key on the terminal ends it. It holds no descriptor of the
  command, and cannot be traced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
from typing import NoReturn

from guestnet._linux import libc, mounts
from guestnet._linux.child_process import StartError, pack, unpack

NAME = "guestnet-init"
_EVENT_BYTES = 65536
_LOOKS, _LOOK_MILLISECONDS = 10, 20
"""How often, and at which interval, it looks for changes before it has inotify report them."""
_UNWATCHED_MILLISECONDS = 1000
"""The interval where inotify is not to be had."""


def fork_init(lifeline: int, resolv_conf: str | None, *, root: bool) -> tuple[int, list[str]]:
    """Forks the process into the PID namespace of this process's children.

    Returns its process id and what could not be set up, when everything is set up. It lives as long as the
    pipe `lifeline` is open for writing. With `resolv_conf` None, the guest sees the host's name files.
    `root`: the guest's root is the host's root, so the kernel's files are made read-only. Raises StartError
    if it did not start.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _main(lifeline, writer, resolv_conf, root)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    if not data:
        raise StartError("The guest's first process ended before it was ready: run the command again.")
    return pid, unpack(data)


def _main(lifeline: int, report: int, resolv_conf: str | None, root: bool) -> NoReturn:
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, set(signal.Signals))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans leave no zombies
        libc.set_process_name(NAME)
        libc.hide_from_tracers()
        os.chdir("/")
        notes, place, names = _set_up(resolv_conf, root)
        _close_all_but({lifeline, report, place})
        os.write(report, pack(*notes))
        os.close(report)
        _wait(lifeline, names)
    finally:
        os._exit(0)


def _set_up(resolv_conf: str | None, root: bool) -> tuple[list[str], int | None, mounts.NameFiles | None]:
    notes = []
    place = None
    try:
        place = mounts.mount_own_proc()
    except OSError as error:
        notes.append(
            f"Cannot mount a /proc of the guest's own ({error.strerror}): its programs see the host's "
            "processes, and cannot signal them. In a container, allow it with "
            "`--security-opt systempaths=unconfined`."
        )
    if root:
        mounts.protect_kernel_files()
    if resolv_conf is None:
        return notes, place, None
    names = mounts.NameFiles(resolv_conf)
    try:
        why, remedy = "", "make that file exist"
        done = names.lay(place, overlay=not root)
    except OSError as error:
        done, why, remedy = False, f" ({error.strerror})", "remove what forbids it"
        if error.errno == errno.EFBIG:
            remedy = "raise the limit on the size of files (`ulimit -f`)"
    if not done:
        server = resolv_conf.split()[1]
        notes.append(
            f"Cannot lay a private /etc/resolv.conf over the host's{why}: {remedy}, "
            f"or have the guest's programs ask {server}."
        )
    if place is not None:
        return notes, place, names
    if names.is_single and done:
        notes.append(
            "The guest's /etc/resolv.conf cannot be restored without a /proc of the guest's own: when the "
            "host replaces its own, the guest sees that."
        )
    return notes, None, None


def _watcher(names: mounts.NameFiles) -> int | None:
    """Returns an inotify descriptor for the directories of files that may have to be restored.

    None if the user has no more of them (`fs.inotify` in sysctl).
    """
    try:
        watcher = libc.open_inotify()
    except OSError:
        return None
    try:
        _watch(watcher, names)
    except OSError:
        os.close(watcher)
        return None
    return watcher


def _watch(watcher: int, names: mounts.NameFiles) -> None:
    for path in names.directories():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            libc.watch_directory(watcher, path)


def _close_all_but(kept: set[int | None]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that the directory was read by
                os.close(int(name))


def _wait(lifeline: int, names: mounts.NameFiles | None) -> None:
    """Returns when guestnet has ended."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    if names is None:
        poll.poll()
        return
    for _ in range(_LOOKS):
        if poll.poll(_LOOK_MILLISECONDS):
            return
        names.restore()
    watcher = _watcher(names)
    names.restore()  # what was replaced before the watch
    if watcher is not None:
        poll.register(watcher, select.POLLIN)
    while all(
        fd != lifeline for fd, _ in poll.poll(None if watcher is not None else _UNWATCHED_MILLISECONDS)
    ):
        if watcher is not None:
            with contextlib.suppress(BlockingIOError):
                os.read(watcher, _EVENT_BYTES)
            with contextlib.suppress(OSError):  # no more watches: those that there are remain
                _watch(watcher, names)
        names.restore()
