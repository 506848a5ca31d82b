"""System calls that Python lacks: unshare, setns, mount, umount2, prctl, inotify.

`os.unshare` came with Python 3.12, and there is no mount. So they are called in the C library by ctypes
(about 1.5 ms to import, measured).
"""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_BIND = 0x1000
MS_REC = 0x4000
MS_SLAVE = 0x8_0000
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOATIME = 0x400
MNT_DETACH = 2

_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_ONLYDIR = 0x0100_0000

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_CHILD_SUBREAPER = 36

_SECCOMP_MODE_FILTER = 2
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_SPEC_ALLOW = 4
_SECCOMP_CALL = {"x86_64": 317, "aarch64": 277, "riscv64": 277}
_CAPABILITY_VERSION_3 = 0x2008_0522

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
    """Keeps processes of the same user from the memory, descriptors and root directory of this one (prctl(2),
    PR_SET_DUMPABLE).

    A process with CAP_SYS_PTRACE in the user namespace of the execution is not stopped. A change of
    credentials ends this.
    """
    _check(_prctl(_PR_SET_DUMPABLE, 0), "prctl")


def set_child_subreaper(enabled: bool = True) -> None:
    """Makes orphaned descendants children of this process instead of init's, so that it can end them."""
    _check(_prctl(_PR_SET_CHILD_SUBREAPER, int(enabled)), "prctl")


def set_process_name(name: str) -> None:
    """Sets the name that `ps` shows: 15 bytes at most."""
    _libc.prctl(ctypes.c_int(_PR_SET_NAME), name.encode(), ctypes.c_ulong(0))


def install_seccomp_filter(program: bytes) -> None:
    """Installs a filter for the calling thread (seccomp(2)). `program` is an array of struct sock_filter."""
    steps = ctypes.create_string_buffer(program, len(program))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(steps)))
    address = ctypes.c_ulong(ctypes.addressof(described))
    # Kernels before 5.16 slow a process under a filter down against speculation, unless told otherwise.
    number = _SECCOMP_CALL.get(os.uname().machine)
    if number is not None:
        mode, flags = _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_SPEC_ALLOW
        if _libc.syscall(ctypes.c_long(number), ctypes.c_long(mode), ctypes.c_long(flags), address) == 0:
            return
    zero = ctypes.c_ulong(0)
    mode_filter = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    _check(_libc.prctl(ctypes.c_int(_PR_SET_SECCOMP), mode_filter, address, zero, zero), "seccomp")


def open_inotify() -> int:
    """A new inotify descriptor, nonblocking (inotify_init1(2))."""
    fd = int(_libc.inotify_init1(ctypes.c_int(os.O_NONBLOCK | os.O_CLOEXEC)))
    if fd < 0:
        _check(fd, "inotify_init1")
    return fd


def watch_directory(fd: int, path: str) -> None:
    """Reports entries of a directory that are made, removed or renamed (inotify_add_watch(2))."""
    mask = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR
    if _libc.inotify_add_watch(ctypes.c_int(fd), os.fsencode(path), ctypes.c_uint32(mask)) < 0:
        _check(-1, path)


def set_no_new_privileges() -> None:
    """Programs that this thread and its threads execute gain no rights (prctl(2), PR_SET_NO_NEW_PRIVS)."""
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "prctl")


def limit_capabilities(kept: int) -> None:
    """Drops the calling thread's capabilities that are not in `kept`, a bit for each (capset(2))."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    sets = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, sets), "capget")
    permitted = struct.unpack("=6I", sets.raw[:24])[1::3]
    low, high = (have & keep for have, keep in zip(permitted, (kept & 0xFFFF_FFFF, kept >> 32), strict=True))
    sets.raw = struct.pack("=6I", low, low, 0, high, high, 0)
    _check(_libc.capset(header, sets), "capset")


def has_capability(number: int) -> bool:
    """Whether the process has the capability in its effective set."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False
