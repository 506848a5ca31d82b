"""The launcher of `guestnet run`: a program in new namespaces whose only way out is a TAP interface.

The order of a launch (P is this process, C the child):

    P  fork, before any thread of this process starts
    C  unshare(user, net, mount, uts, pid); report
    P  write C's uid and gid maps; report
    C  become root of the user namespace; lo up, TAP made and configured, terminal filter
    C  fork I, the first process of the PID namespace: /proc and the name files mounted
    C  fork K, which waits; send the TAP's descriptor by SCM_RIGHTS; exit: I and K are children of P now
    P  `Namespace.take_tap()` is attached to a network, ports are published
    P  `go()`: K executes the command; P learns at once if it could not

No program is spawned, and nothing is written to a disk. When P ends, for any reason, I ends, and with it
everything in the PID namespace, because its network is gone.
"""

from __future__ import annotations

import array as _array  # noqa: F401 - for socket.send_fds: a child that became another user may not find it
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterable, Sequence

from guestnet._linux import libc, links, mounts, terminal_filter
from guestnet._linux.child_process import (
    EXIT_NOT_EXECUTABLE,
    READY,
    Command,
    Held,
    StartError,
    fork_held,
    pack,
    unpack,
)
from guestnet._linux.init_process import fork_init
from guestnet.model.frozen_record import FrozenRecord

__all__ = ["Guest", "Namespace", "StartError", "launch", "write_id_maps"]


class Guest(FrozenRecord, kw_only=False):
    """The properties of the namespace."""

    interface: links.Interface
    nameserver: str | None = None
    """Address for resolv.conf; None leaves the host's file in view."""
    search: tuple[str, ...] = ()
    hostname: str | None = None
    host_ids: bool = False
    """Root keeps the host's user ids: the guest's root is root of the host's files."""
    ends_first: bool = False
    """The namespace ends before its network does, so its interface may end with it."""

    @property
    def resolv_conf(self) -> str | None:
        """The text of the guest's resolv.conf."""
        return None if self.nameserver is None else mounts.resolv_conf_text(self.nameserver, self.search)


# Where root's guests get their ids from: beyond those of users, of subuid(5) and of directory services, up to
# what systemd gives to foreign images.
_IDS = range(0x7739_0000, 0x7FFE_0000, 0x1_0000)
_IDS_OF_A_GUEST = 0x1_0000
_NOBODY = 65534


class IdMaps(FrozenRecord):
    """What the ids in a user namespace are."""

    root: bool
    """Root in the namespace is the host's root."""
    own: bool
    """It has ids of its own, which the process still has to take."""

    @classmethod
    def read(cls, words: Sequence[str]) -> IdMaps:
        """Reads what the parent said."""
        root, own = (word == "1" for word in words)
        return cls(root=root, own=own)


class Namespace:
    """A child process that waits in its namespaces for `go()`."""

    def __init__(self, held: Held, lifeline: int) -> None:
        self._held = held
        self._lifeline = lifeline
        self._init: int | None = None
        self.has_own_ids = False
        """Whether the command's ids own nothing on the host, though root started it."""
        self.notes: tuple[str, ...] = ()
        """What could not be set up and does not keep the guest from running; known after `take_tap`."""

    @property
    def pid(self) -> int:
        """The process id of the process that becomes the command, known after `take_tap`."""
        return self._held.pid

    def take_tap(self) -> int:
        """Waits for the set-up, and returns the descriptor of the TAP, which then belongs to the caller."""
        (init, command, *notes), (tap,) = self._held.receive(1)
        self.notes = tuple(notes)
        self._init = int(init)
        self._held.hand_over(int(command))
        return tap

    def go(self) -> None:
        """Lets the command start, and returns when it runs. Raises StartError if it could not be executed."""
        try:
            self._held.go()
        except StartError as error:
            if not self.has_own_ids or error.exit_status != EXIT_NOT_EXECUTABLE:
                raise
            text = f"{error} It owns none of this host's files, unless you give --host-ids."
            raise StartError(text, error.exit_status) from None

    def close(self) -> None:
        """Ends a child that was never started, and waits for it. It does nothing to a started one."""
        if not self._held.started:
            self.kill()

    def kill(self) -> None:
        """Ends everything in the namespace, started or not, and waits for it."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        self._held.kill()
        if self._init is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._init, 0)


def launch(
    guest: Guest,
    command: Command,
    signal_mask: Iterable[int] = (),
    before: Callable[[], None] | None = None,
) -> Namespace:
    """Forks a child into new namespaces that are set up as `guest` says.

    The child calls `before`, waits for `go()`, and then executes `command` with `signal_mask` blocked, or
    calls it and exits with the result. Call this before any thread exists. Orphaned descendants of this
    process become its children from here on (`libc.set_child_subreaper`).

    Raises:
        StartError: It cannot be done. The message says what to do, and no child is left.
    """
    libc.set_child_subreaper()
    watched, lifeline = os.pipe()

    def prepare(control: socket.socket) -> None:
        os.close(lifeline)
        _enter()
        control.send(READY)
        if answer := control.recv(_MESSAGE_BYTES):
            _set_up(guest, IdMaps.read(unpack(answer)), watched, control)
            if before is not None:
                before()

    try:
        held = fork_held(prepare, command, signal_mask)
    except BaseException:
        os.close(lifeline)
        raise
    finally:
        os.close(watched)
    namespace = Namespace(held, lifeline)
    try:
        held.receive()
        mapped = write_id_maps(held.pid, host_ids=guest.host_ids)
        namespace.has_own_ids = mapped.own
        held.answer(int(mapped.root), int(mapped.own))
    except BaseException:
        namespace.close()
        raise
    return namespace


def write_id_maps(pid: int, *, host_ids: bool = False) -> IdMaps:
    """Maps the user ids of the new user namespace of process `pid`. Returns what they are.

    An ordinary user becomes root there and nothing else, the only map that the kernel allows them. Guests of
    root get ids that own nothing on the host: a range, so that files can be given away and `su` works, or the
    ids of nobody if there is no range. With `host_ids` root keeps every id. If root may not map others (a
    container without CAP_SETUID), it gets the small map too.
    """
    if os.geteuid() == 0:
        try:
            first = _IDS[int.from_bytes(os.urandom(4), "little") % len(_IDS)]
            maps = [_identity_map(name) if host_ids else _foreign_map(name, first) for name in _MAPS]
            if all(maps):
                for name, text in zip(_MAPS, maps, strict=True):
                    _write_proc(pid, name, text or "")
                return IdMaps(root=host_ids and _is_hosts_root(), own=not host_ids)
        except OSError:
            pass
    try:
        _write_proc(pid, "setgroups", "deny")
        _write_proc(pid, "uid_map", f"0 {os.geteuid()} 1")
        _write_proc(pid, "gid_map", f"0 {os.getegid()} 1")
    except OSError as error:
        raise StartError(_why_no_map(error)) from error
    return IdMaps(root=os.geteuid() == 0 and _is_hosts_root(), own=False)


def _why_no_map(error: OSError) -> str:
    what = f"Cannot map user ids in the new namespace ({error.strerror})"
    if os.geteuid() == 0:
        # Linux 5.12 lets only who may set file capabilities map root to root.
        return (
            f"{what}: this root lacks CAP_SETFCAP, so start it with that (a container with "
            f"`--cap-add SETFCAP`), or as an ordinary user."
        )
    return f"{what}: leave the container or sandbox, or let it allow user namespaces."


_MAPS = ("uid_map", "gid_map")


def _known_ids(name: str) -> list[tuple[int, int, int]]:
    """The ids of this user namespace: first inside, first outside, count."""
    with open(f"/proc/self/{name}", encoding="utf-8") as file:
        return [(int(inside), int(outside), int(count)) for inside, outside, count in map(str.split, file)]


def _identity_map(name: str) -> str:
    """Every id that exists in this user namespace, mapped to itself."""
    return "".join(f"{inside} {inside} {count}\n" for inside, _, count in _known_ids(name))


def _foreign_map(name: str, first: int) -> str | None:
    """A map to ids that own nothing, from `first` on; None if there are only ids of this user."""
    for wanted, count in ((first, _IDS_OF_A_GUEST), (_NOBODY, 1)):
        if any(i <= wanted and wanted + count <= i + n for i, _, n in _known_ids(name)):
            return f"0 {wanted} {count}"
    return None


def _is_hosts_root() -> bool:
    """Whether root here is also root outside of this user namespace, as far as it can be seen."""
    return any(inside == outside == 0 for inside, outside, _ in _known_ids("uid_map"))


def _write_proc(pid: int, name: str, text: str) -> None:
    fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())  # the kernel wants a map in one write
    finally:
        os.close(fd)


# --- in the child
# --------------------------------------------------------------------------------------------


_MESSAGE_BYTES = 4096
_OWN_ROOT = (
    "The command is root of this host's files, since this root may not map other user ids: start guestnet as "
    "an ordinary user, or with CAP_SETUID and CAP_SETGID."
)
_NO_FILTER = (
    "The command can type into the terminal that it was started from ({}): use a kernel with seccomp, or "
    "`sudo sysctl dev.tty.legacy_tiocsti=0`."
)


def _enter() -> None:
    flags = libc.CLONE_NEWUSER | libc.CLONE_NEWNET | libc.CLONE_NEWNS | libc.CLONE_NEWPID | libc.CLONE_NEWUTS
    try:
        libc.unshare(flags)
    except OSError as error:
        raise StartError(why_no_namespaces(error)) from error


def _set_up(guest: Guest, mapped: IdMaps, lifeline: int, control: socket.socket) -> None:
    """Prepares the namespaces, and returns in the process that becomes the command.

    The process that calls this exits.
    """
    notes: list[str] = []
    device = _open_device()  # with the rights of who started guestnet: it may be closed to others
    if mapped.own:
        _become_root()
    elif mapped.root and not guest.host_ids:
        notes.append(_OWN_ROOT)
    try:
        mounts.make_private()
    except OSError as error:
        raise StartError(why_no_namespaces(error)) from error
    with contextlib.suppress(OSError):  # where it is forbidden, programs see the host's devices in /sys
        mounts.show_own_devices(read_only=mapped.root)
    links.set_up("lo")
    tap = _make_tap(guest.interface.name, device)
    if guest.ends_first:
        links.leave_to_namespace(tap)
    try:
        links.configure(guest.interface)
    except OSError as error:
        raise StartError(
            f"Cannot configure the guest's interface ({error.strerror}): use another --subnet or --mtu."
        ) from error
    # Ping without CAP_NET_RAW for every group that exists here: all of them, or those that are mapped.
    for last in ("2147483647", "65535", "0"):
        if links.write_sysctl("net/ipv4/ping_group_range", f"0 {last}"):
            break
    if guest.hostname is not None:
        socket.sethostname(guest.hostname)
    try:
        terminal_filter.install()
    except OSError as error:
        notes.append(_NO_FILTER.format(error.strerror))
    init, more = fork_init(lifeline, guest.resolv_conf, root=mapped.root)
    command = os.fork()
    if command == 0:
        os.close(lifeline)
        os.close(tap)
        return
    socket.send_fds(control, [pack(init, command, *notes, *more)], [tap])
    os._exit(0)


def _become_root() -> None:
    """Takes the mapped ids, and leaves the groups of the user who started guestnet."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _open_device() -> int:
    device = links.TUN_DEVICE
    try:
        return links.open_tun_device()
    except FileNotFoundError:
        remedy = (
            f"There is no {device}: load the module (`sudo modprobe tun`), "
            f"or start the container with `--device {device}`."
        )
    except PermissionError:
        remedy = f"No permission to open {device}: let users open it with `sudo chmod 0666 {device}`."
    except OSError as error:
        remedy = _no_tap(error)
    raise StartError(remedy)


def _make_tap(name: str, device: int) -> int:
    try:
        return links.open_tap(name, device)
    except PermissionError as error:
        remedy = why_no_namespaces(error)
    except OSError as error:
        remedy = _no_tap(error)
    raise StartError(remedy)


def _no_tap(error: OSError) -> str:
    return (
        f"Cannot make a TAP from {links.TUN_DEVICE} ({error.strerror}): "
        f"load the module (`sudo modprobe tun`), or run `guestnet doctor`."
    )


def why_no_namespaces(error: OSError) -> str:
    """Why namespaces were refused, as far as the system shows, and what to do about it."""
    for kind in ("user", "pid"):
        if links.read_sysctl(f"user/max_{kind}_namespaces") == "0":
            return (
                f"This system allows no {kind} namespaces: "
                f"raise the limit with `sudo sysctl user.max_{kind}_namespaces=15000`."
            )
    if error.errno in (errno.ENOSPC, errno.EUSERS):
        return (
            "This system allows no more namespaces: raise the limits, such as with "
            "`sudo sysctl user.max_user_namespaces=15000 user.max_pid_namespaces=15000`."
        )
    if links.read_sysctl("kernel/unprivileged_userns_clone") == "0":
        return (
            "This system keeps user namespaces to root: "
            "allow them with `sudo sysctl kernel.unprivileged_userns_clone=1`."
        )
    if links.read_sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor keeps user namespaces from programs without a profile: allow them with "
            "`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`, or write a profile for guestnet."
        )
    if error.errno == errno.EINVAL:
        return "This kernel lacks namespaces: use one with CONFIG_USER_NS, CONFIG_NET_NS and CONFIG_PID_NS."
    return (
        f"This system refuses new namespaces ({error.strerror}): leave the chroot or, in a container, "
        f"start it with a seccomp profile that allows unshare (`--security-opt seccomp=unconfined`)."
    )
