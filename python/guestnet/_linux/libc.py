"""The system calls that Python lacks: unshare, setns, mount, umount2, prctl.

`os.unshare` came with Python 3.12 and mount never did, so they are called in the C library by ctypes (about
6 ms to import, measured; the rest of the launcher takes 3 ms).
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWNET = 0x4000_0000

MS_BIND = 0x1000
MS_REC = 0x4000
MS_SLAVE = 0x8_0000
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    """Moves the calling process to new namespaces (unshare(2)). It must have one thread for CLONE_NEWUSER."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kind: int) -> None:
    """Moves the calling process to a namespace (setns(2)); `kind` is its CLONE_ flag."""
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2). `kind` is the file system's type, None for a bind or a change of propagation."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            kind.encode() if kind is not None else None,
            ctypes.c_ulong(flags),
            data.encode() if data is not None else None,
        ),
        target,
    )


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), target)


def _prctl(option: int, value: int) -> int:
    zero = ctypes.c_ulong(0)
    return int(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero))


def set_parent_death_signal(number: int) -> None:
    """Asks the kernel to send this process signal `number` when the thread that forked it ends.

    A change of credentials clears it (commit_creds), so it is set after the user namespace is entered.
    """
    _check(_prctl(_PR_SET_PDEATHSIG, number), "prctl")


def hide_from_tracers() -> None:
    """Keeps processes of the same user from this one's memory, descriptors and root directory (prctl(2),
    PR_SET_DUMPABLE), unless they have CAP_SYS_PTRACE where it was executed. A change of credentials ends it.
    """
    _check(_prctl(_PR_SET_DUMPABLE, 0), "prctl")


def set_child_subreaper(enabled: bool = True) -> None:
    """Makes orphaned descendants children of this process instead of init's, so that it can end them."""
    _check(_prctl(_PR_SET_CHILD_SUBREAPER, int(enabled)), "prctl")


def has_capability(number: int) -> bool:
    """Whether the process has the capability in its effective set."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False
