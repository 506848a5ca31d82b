"""A private /etc/resolv.conf, and its own network devices in /sys, for a process in a mount namespace of its
own, with nothing left on disk."""

from __future__ import annotations

import contextlib
import os
import stat

from guestnet._linux import libc

RESOLV_CONF = "/etc/resolv.conf"

# Name services that answer by a unix socket in the file system: glibc asks them before it reads
# resolv.conf, and a unix socket with a path is not confined by a network namespace. Left open, names would
# be resolved by the host, not by guestnet: neither its records nor its policy would count.
_NAME_SERVICE_SOCKETS = (
    "/run/nscd/socket",
    "/var/run/nscd/socket",
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/systemd/resolve/io.systemd.Resolve.Monitor",
)

_SYS = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC

# Where the tmpfs that holds the new files is mounted for a moment: any directory that is surely there.
_SCRATCH = ("/tmp", "/mnt", "/var", "/usr")


def make_private() -> None:
    """Mounts made from here on stay in this mount namespace; those of the host still arrive (slave)."""
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_SLAVE)


def show_own_devices() -> None:
    """Mounts a /sys that shows the devices of this network namespace; the host's shows the host's.

    What was mounted in the old one (cgroups, say) is in the new one too. A container may forbid it: OSError.
    """
    below = [(path, fd) for path in _mounts_below("/sys/") if (fd := _open_path(path)) is not None]
    try:
        try:
            libc.mount("sysfs", "/sys", "sysfs", _SYS)
        except OSError:
            libc.mount("sysfs", "/sys", "sysfs", _SYS | libc.MS_RDONLY)
        for path, fd in below:
            with contextlib.suppress(OSError):
                libc.mount(f"/proc/self/fd/{fd}", path, None, libc.MS_BIND | libc.MS_REC)
    finally:
        for _, fd in below:
            os.close(fd)


def _mounts_below(top: str) -> list[str]:
    """The places of mounts below a directory, those below another of them left out."""
    found: list[str] = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        places = sorted({line.split()[4] for line in file})
    for place in places:
        if place.startswith(top) and not (found and place.startswith(found[-1] + "/")):
            found.append(place)
    return found


def resolv_conf_text(nameserver: str, search: tuple[str, ...]) -> str:
    """The text of resolv.conf for one name server."""
    lines = [f"nameserver {nameserver}"]
    if search:
        lines.append("search " + " ".join(search))
    return "\n".join(lines) + "\n"


def replace_resolv_conf(text: str) -> bool:
    """Binds a file with `text` over /etc/resolv.conf in this mount namespace.

    False when the system has no such file and none can be laid over it. The file lives in a tmpfs that has no
    name any more when this returns, so nothing is left on any disk, nor seen by any other process.
    """
    # Opened first and mounted on through its descriptor: that follows a symlink (systemd-resolved), and still
    # works when the scratch mount hides the place that it leads to.
    target: int | None
    try:
        target = os.open(RESOLV_CONF, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        target = None
    scratch = next((place for place in _SCRATCH if os.path.isdir(place)), None)
    if scratch is None:
        return False
    sockets = [_open_path(path) for path in _NAME_SERVICE_SOCKETS if _is_socket(path)]
    libc.mount("tmpfs", scratch, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, "mode=0755,size=1m")
    try:
        source = f"{scratch}/resolv.conf"
        _write(source, text)
        if sockets:
            _write(f"{scratch}/closed", "")
        for fd in sockets:
            if fd is not None:
                # A connect to what is not a socket is refused at once, and glibc goes on to DNS.
                libc.mount(f"{scratch}/closed", f"/proc/self/fd/{fd}", None, libc.MS_BIND)
        if target is not None:
            libc.mount(source, f"/proc/self/fd/{target}", None, libc.MS_BIND)
            return True
        return _overlay_etc(scratch, text)
    finally:
        with contextlib.suppress(OSError):
            libc.umount(scratch, libc.MNT_DETACH)
        for fd in (target, *sockets):
            if fd is not None:
                os.close(fd)


def _overlay_etc(scratch: str, text: str) -> bool:
    """/etc with a resolv.conf where there is none, or a symlink that leads nowhere (overlayfs, Linux
    5.11)."""
    upper, work = f"{scratch}/upper", f"{scratch}/work"
    os.mkdir(upper, 0o755)
    os.mkdir(work, 0o755)
    _write(f"{upper}/resolv.conf", text)
    try:
        libc.mount("overlay", "/etc", "overlay", 0, f"lowerdir=/etc,upperdir={upper},workdir={work}")
    except OSError:
        return False
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, 0o644)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _open_path(path: str) -> int | None:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
