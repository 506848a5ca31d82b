"""A TAP interface in an existing network namespace: that of a process, or of a file as `ip netns` makes them.

Theory of operation: a child does the work, because a process cannot leave a user namespace that it has
entered. It enters the user namespace that owns the network namespace, where it has every capability, then the
network namespace. It makes and configures the interface and sends its descriptor back.

An open TAP descriptor keeps its network namespace alive, so the end of the namespace has to be watched: by a
pidfd of the process, or by inotify in the directory of the file (`Watch`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from guestnet._linux import libc, links
from guestnet._linux.child_process import READY, StartError, fork_held
from guestnet.model.frozen_record import FrozenRecord

_NS_GET_USERNS = 0xB701
"""linux/nsfs.h: the user namespace that owns a namespace."""
_EVENT = struct.Struct("=iIII")
"""struct inotify_event of linux/inotify.h, before the name."""
_EVENT_BYTES = 65536


class Target(FrozenRecord, kw_only=False):
    """A network namespace, by a process in it or by the path of its file. Exactly one of them is given."""

    pid: int | None = None
    netns: str | None = None

    @property
    def path(self) -> str:
        """The file of the namespace."""
        return f"/proc/{self.pid}/ns/net" if self.netns is None else self.netns

    def __str__(self) -> str:
        return f"process {self.pid}" if self.netns is None else repr(self.netns)


class Watch:
    """Reports the end of a namespace: a descriptor that is readable when there is something to look at.

    It is a pidfd, or an inotify descriptor for the directory where the file `name` is.
    """

    def __init__(self, fd: int, name: str | None) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self.name = name

    @classmethod
    def of(cls, target: Target) -> Watch:
        """The watch of a namespace. Raises StartError if there is no such process or file."""
        try:
            if target.pid is not None:
                return cls(os.pidfd_open(target.pid), None)
            fd = libc.open_inotify()
            libc.watch_directory(fd, os.path.dirname(target.path) or ".")
        except OSError as error:
            raise _why_not_open(target, error) from error
        return cls(fd, os.path.basename(target.path))

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def is_gone(self) -> bool:
        """Whether the process has ended, or the file was removed or replaced; asked when the descriptor is
        readable."""
        if self.name is None:
            return True
        try:
            events = os.read(self._fd, _EVENT_BYTES)
        except BlockingIOError:
            return False
        at = 0
        while at < len(events):
            _, _, _, size = _EVENT.unpack_from(events, at)
            at += _EVENT.size
            if os.fsdecode(events[at : at + size].rstrip(b"\0")) == self.name:
                return True
            at += size
        return False

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self._fd)


def open_namespace(target: Target) -> int:
    """A descriptor of the namespace's file. Raises StartError with the remedy."""
    try:
        return os.open(target.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _why_not_open(target, error) from error


def _why_not_open(target: Target, error: OSError) -> StartError:
    if target.netns is None and error.errno in (errno.ENOENT, errno.ESRCH):
        return StartError(f"There is no process {target.pid}: give the id of one that runs.")
    if error.errno == errno.ENOENT:
        return StartError(f"There is no namespace {target.netns!r}: `ip netns list` shows names.")
    return StartError(
        f"Cannot open the network namespace of {target} ({error.strerror}): be the user that made it, "
        "or root."
    )


def make_tap(target: Target, namespace: int, interface: links.Interface) -> int:
    """Makes and configures a TAP interface in a network namespace; returns its descriptor.

    Call this before any thread exists.

    Args:
        target: names the namespace in errors.
        namespace: a descriptor of the namespace's file.
        interface: what the interface is to be.

    Raises:
        StartError: the namespace cannot be entered, or the interface cannot be made; says what to do.
    """

    def prepare(control: socket.socket) -> None:
        _enter(target, namespace)
        links.set_up("lo")
        try:
            tap = links.open_tap(interface.name)
        except OSError as error:
            raise StartError(_why_no_tap(target, interface.name, error)) from error
        try:
            links.configure(interface)
        except OSError as error:
            raise StartError(
                f"Cannot configure {interface.name} in the namespace of {target} ({error.strerror}): choose "
                "another --interface, or another --subnet for the network."
            ) from error
        socket.send_fds(control, [READY], [tap])

    held = fork_held(prepare, lambda: 0)
    try:
        _, (tap,) = held.receive(1)
    finally:
        held.kill()
    return tap


def _enter(target: Target, namespace: int) -> None:
    try:
        owner = fcntl.ioctl(namespace, _NS_GET_USERNS)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise StartError(f"{target.path!r} is not a network namespace: give the path of one.") from error
        owner = -1  # of a parent user namespace, where only its root may go
    try:
        if owner >= 0 and not os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user")):
            libc.setns(owner, libc.CLONE_NEWUSER)
        libc.setns(namespace, libc.CLONE_NEWNET)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise StartError(f"{target.path!r} is not a network namespace: give the path of one.") from error
        raise StartError(
            f"Cannot enter the network namespace of {target} ({error.strerror}): be the user that "
            "made it, or root."
        ) from error


def _why_no_tap(target: Target, name: str, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return f"The namespace of {target} has an interface {name} already: choose another with --interface."
    if isinstance(error, FileNotFoundError):
        return f"There is no {links.TUN_DEVICE}: load the module (`sudo modprobe tun`)."
    if isinstance(error, PermissionError):
        return (
            f"Cannot make an interface in the namespace of {target} ({error.strerror}): be the user that "
            f"made it, or root, and let users open {links.TUN_DEVICE}."
        )
    return f"Cannot make the interface {name} ({error.strerror}): run `guestnet doctor`."
