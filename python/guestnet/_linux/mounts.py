"""What a process in its own mount namespace sees instead of the host's: names, devices, processes.

Nothing is written to a disk, and no other process sees it.

Names: resolv.conf and nsswitch.conf are in a read-only overlay over /etc. A file that is mounted over one of
the host's would be lost: the kernel removes a mount, in every namespace, when the file or the symlink under
it is replaced by rename or removed, as network managers do. An overlay is on the directory, which stays.
Sockets of name services have to be mounted over one by one, and so do the two files where an overlay is not
available or not wanted. `NameFiles.restore` mounts again what was lost; `_linux/init_process.py` calls it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from guestnet._linux import libc

RESOLV_CONF = "/etc/resolv.conf"
NSSWITCH_CONF = "/etc/nsswitch.conf"

# Name services that answer by a unix socket in the file system: glibc asks them before it reads
# resolv.conf, and a unix socket with a path is not confined by a network namespace. Left open, names would
# be resolved by the host, not by guestnet: neither its records nor its policy would count.
_NAME_SERVICE_SOCKETS = (
    "/run/nscd/socket",
    "/var/run/nscd/socket",
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/systemd/resolve/io.systemd.Resolve.Monitor",
)
# Modules of nsswitch.conf for `hosts` that ask nobody outside the namespace. Others ask by a socket (resolve,
# mdns, sss, libvirt) or by files that need not be the guest's.
_OWN_MODULES = ("files", "myhostname", "dns")

_SYS = _PROC = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
_TMPFS_OPTIONS = "mode=0755,size=1m"

# Where the tmpfs that holds the new files is mounted for a moment: any directory that is surely there.
_SCRATCH = ("/tmp", "/mnt", "/var", "/usr")

_KERNEL_FILES = ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/acpi")
_OWN_SYSCTLS = "/proc/sys/net"
"""Those of the network namespace."""


def make_private() -> None:
    """Later mounts stay in this mount namespace. Mounts of the host still arrive (slave)."""
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_SLAVE)


# --- devices and processes


def show_own_devices(*, read_only: bool = False) -> None:
    """Mounts a /sys that shows the devices of this network namespace instead of the host's.

    Mounts in the old one (cgroups, for example) are in the new one too. With `read_only` nothing in it can be
    written. Raises OSError if a container forbids it.
    """
    below = _open_outermost("/sys/")
    flags = _SYS | libc.MS_RDONLY
    try:
        try:
            libc.mount("sysfs", "/sys", "sysfs", flags if read_only else _SYS)
        except OSError:
            libc.mount("sysfs", "/sys", "sysfs", flags)
        _mount_again(below)
        if read_only:
            _make_read_only("/sys")
    finally:
        for fd in below.values():
            os.close(fd)


def mount_own_proc() -> int:
    """Mounts a /proc that shows the processes of this PID namespace, and a hidden empty tmpfs under it.

    The files that are mounted over others come from the tmpfs. Returns a descriptor of it. Raises OSError if
    it is forbidden (a container that hides parts of /proc); /proc is unchanged then.
    """
    libc.mount("tmpfs", "/proc", "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, _TMPFS_OPTIONS)
    place = os.open("/proc", os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY)
    # The kernel wants the flags of the one that is there already.
    for more in (0, libc.MS_NOATIME, libc.MS_RDONLY, libc.MS_RDONLY | libc.MS_NOATIME):
        try:
            libc.mount("proc", "/proc", "proc", _PROC | more)
        except OSError as error:
            refused = error
        else:
            return place
    os.close(place)
    libc.umount("/proc", libc.MNT_DETACH)
    raise refused


def protect_kernel_files() -> None:
    """Makes the kernel's files in /proc read-only, except the settings of this network namespace.

    It protects from mistakes: root of this mount namespace can undo it.
    """
    own = _open_path(_OWN_SYSCTLS)
    for path in _KERNEL_FILES:
        with contextlib.suppress(OSError):
            libc.mount(path, path, None, libc.MS_BIND | libc.MS_REC)
            _make_read_only(path)
    if own is not None:
        libc.mount(f"/proc/self/fd/{own}", _OWN_SYSCTLS, None, libc.MS_BIND)
        os.close(own)


def _mounts_below(top: str) -> list[str]:
    """The mount points below a directory, outer ones first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return sorted({place for line in file if (place := line.split()[4]).startswith(top)})


def _open_outermost(top: str) -> dict[str, int]:
    """Descriptors of the mounts below a directory, without those below another of them."""
    found: dict[str, int] = {}
    last = None
    for place in _mounts_below(top):
        if last is None or not place.startswith(f"{last}/"):
            last = place
            if (fd := _open_path(place)) is not None:
                found[place] = fd
    return found


def _mount_again(opened: dict[str, int]) -> None:
    """Mounts what `_open_outermost` found at the same places, if they exist."""
    for path, fd in opened.items():
        with contextlib.suppress(OSError):
            libc.mount(f"/proc/self/fd/{fd}", path, None, libc.MS_BIND | libc.MS_REC)


def _make_read_only(top: str) -> None:
    """Makes a mount, and all mounts below it, read-only in this namespace."""
    for path in (top, *_mounts_below(f"{top}/")):
        with contextlib.suppress(OSError):
            libc.mount("none", path, None, libc.MS_BIND | libc.MS_REMOUNT | libc.MS_RDONLY | _PROC)


# --- names


def resolv_conf_text(nameserver: str, search: tuple[str, ...]) -> str:
    """The text of resolv.conf for one name server."""
    lines = [f"nameserver {nameserver}"]
    if search:
        lines.append("search " + " ".join(search))
    return "\n".join(lines) + "\n"


def nsswitch_text(text: str) -> str:
    """nsswitch.conf whose `hosts` line has only modules that ask nothing outside the namespace."""
    lines = []
    for line in text.splitlines():
        database, colon, rest = line.partition(":")
        if colon and database.strip() == "hosts":
            kept = [word for word in rest.partition("#")[0].split() if word in _OWN_MODULES]
            lines.append(f"hosts: {' '.join(dict.fromkeys([*kept, 'dns']))}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


@contextmanager
def scratch() -> Iterator[int]:
    """A descriptor of a tmpfs that has no name any more at the end. What was mounted from it stays."""
    where = next((place for place in _SCRATCH if os.path.isdir(place)), None)
    if where is None:
        raise FileNotFoundError
    libc.mount("tmpfs", where, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, _TMPFS_OPTIONS)
    try:
        place = os.open(where, os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            yield place
        finally:
            os.close(place)
    finally:
        libc.umount(where, libc.MNT_DETACH)


class NameFiles:
    """The files by which programs resolve names: mounted once, restored when they were lost."""

    def __init__(self, resolv_conf: str) -> None:
        self._texts = {RESOLV_CONF: resolv_conf, "closed": ""}
        with contextlib.suppress(OSError), open(NSSWITCH_CONF, encoding="utf-8", errors="replace") as file:
            self._texts[NSSWITCH_CONF] = nsswitch_text(file.read())
        self._made: dict[str, tuple[int, int]] = {}
        """Device and inode of each file of ours."""
        self._single = [RESOLV_CONF, NSSWITCH_CONF]
        """Those that are not in an overlay."""
        self._place = -1

    def lay(self, place: int | None = None, *, overlay: bool = True) -> bool:
        """Mounts the files. Returns False if resolv.conf could not be mounted.

        `place` is a descriptor of a directory for the files, which `restore` needs later; without it, a
        temporary tmpfs is used. With `overlay` False, /etc stays as it is if it has a file to mount over, so
        that /etc can be written.
        """
        found = self._lost()  # before the tmpfs is in the way of what they are mounted over
        if place is not None:
            return self._lay(place, found, overlay)
        with scratch() as moment:
            return self._lay(moment, found, overlay)

    def restore(self) -> None:
        """Mounts again what was lost; after `lay` with a place."""
        self._cover(self._lost())

    @property
    def is_single(self) -> bool:
        """Whether there is a mount that the host can remove."""
        return bool(self._single) or any(map(_is_socket, _NAME_SERVICE_SOCKETS))

    def directories(self) -> set[str]:
        """The directories in which a change can mean that a mount was lost."""
        paths = [*self._single, *_NAME_SERVICE_SOCKETS]
        paths += [os.path.realpath(path) for path in self._single]
        return {parent for path in paths for parent in _parents(path)}

    def _lay(self, place: int, found: list[tuple[int, str]], overlay: bool) -> bool:
        self._place = place
        os.mkdir("etc", dir_fd=place)
        os.chmod("etc", 0o755, dir_fd=place)  # whatever the umask is
        for path, text in self._texts.items():
            self._made[path] = _write(self._source(path), text, place)
        exists = any(source == RESOLV_CONF for _, source in found)
        if (overlay or not exists) and self._lay_over_etc():
            self._single = []
            for fd, source in found:
                if source != "closed":
                    os.close(fd)
            self._cover([(fd, source) for fd, source in found if source == "closed"])
            return True
        self._cover(found)
        try:
            return self._is_ours(os.stat(RESOLV_CONF), RESOLV_CONF)
        except OSError:
            return False

    def _lay_over_etc(self) -> bool:
        """Mounts /etc with these files in front of the host's (overlayfs in a user namespace: Linux 5.11)."""
        below = _open_outermost("/etc/")
        try:
            layers = f"lowerdir=/proc/self/fd/{self._place}/etc:/etc"
            libc.mount("overlay", "/etc", "overlay", libc.MS_RDONLY, layers)
            _mount_again({path: fd for path, fd in below.items() if path not in self._texts})
        except OSError:
            return False
        finally:
            for fd in below.values():
                os.close(fd)
        return True

    def _lost(self) -> list[tuple[int, str]]:
        """What the files have to be mounted over, as descriptors, and which file each is for.

        A descriptor follows a symlink (systemd-resolved), and reaches what a mount may hide later.
        """
        found = []
        for path in self._single:
            if path in self._texts and (fd := _open_path(path)) is not None:
                found.append((fd, path))
        for path in _NAME_SERVICE_SOCKETS:
            # A connect to what is not a socket is refused at once, and glibc goes on to DNS.
            if _is_socket(path) and (fd := _open_path(path)) is not None:
                found.append((fd, "closed"))
        lost = []
        for fd, source in found:
            if self._is_ours(os.fstat(fd), source):
                os.close(fd)
            else:
                lost.append((fd, source))
        return lost

    def _cover(self, found: list[tuple[int, str]]) -> None:
        for fd, source in found:
            with contextlib.suppress(OSError):
                libc.mount(
                    f"/proc/self/fd/{self._place}/{self._source(source)}",
                    f"/proc/self/fd/{fd}",
                    None,
                    libc.MS_BIND,
                )
            os.close(fd)

    def _is_ours(self, status: os.stat_result, source: str) -> bool:
        return source in self._made and self._made[source] == (status.st_dev, status.st_ino)

    @staticmethod
    def _source(path: str) -> str:
        return path.lstrip("/")


def _parents(path: str) -> Iterator[str]:
    """The directories of a path, without the root."""
    while (path := os.path.dirname(path)) != "/":
        yield path


def _write(path: str, text: str, directory: int) -> tuple[int, int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=directory)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
        os.fchmod(fd, 0o644)
        status = os.fstat(fd)
    return status.st_dev, status.st_ino


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
