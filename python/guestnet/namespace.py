"""The launcher of `guestnet run`: a program in new namespaces, and the TAP interface that is its only way
out.

The way of a launch (P is this process, C the child):

    P  fork, before any thread of this process starts
    C  unshare(user, net, mount[, uts]), say so
    P  write C's uid and gid maps, say so
    C  lo up, TAP made and configured, resolv.conf bound, the TAP's descriptor sent by SCM_RIGHTS; wait
    P  `Namespace.take_tap()` is attached to a network, ports are published
    P  `go()`: C executes the command; P learns at once if it could not

Nothing spawns a program and nothing is written to a disk. The child is killed when the parent dies, however
that happens, since its network would be dead as well; what the command left in the background is ended by a
guard (`_linux/guard.py`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from guestnet._linux import libc, links, mounts
from guestnet._linux.held import Command, Held, StartError, fork_held

__all__ = ["Guest", "Namespace", "StartError", "launch", "write_id_maps"]


@dataclass(frozen=True)
class Guest:
    """What the namespace is to be."""

    interface: links.Interface
    nameserver: str | None = None
    """Address for resolv.conf; None leaves the host's file in view."""
    search: tuple[str, ...] = ()
    hostname: str | None = None


class Namespace:
    """A child process that waits in its namespaces for `go()`."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self.notes: tuple[str, ...] = ()
        """What could not be set up and does not keep the guest from running; known after `take_tap`."""

    @property
    def pid(self) -> int:
        """The child's process id, the command's own once it runs."""
        return self._held.pid

    def take_tap(self) -> int:
        """The TAP's file descriptor; the caller owns it from here on. Waits for the set-up to be done."""
        message, (tap,) = self._held.receive(1)
        self.notes = tuple(message["notes"])
        return tap

    def go(self) -> None:
        """Lets the command start. Returns when it runs; raises StartError when it could not be executed."""
        self._held.go()

    def close(self) -> None:
        """Ends a child that was never started, and waits for it. Does nothing to one that was."""
        self._held.close()

    def kill(self) -> None:
        """Ends the child, started or not, and waits for it."""
        self._held.kill()


def launch(guest: Guest, command: Command, signal_mask: Iterable[int] = ()) -> Namespace:
    """Forks a child into new namespaces set up as `guest` says. It waits for `go()` and then executes
    `command` with `signal_mask` blocked, or calls it and exits with what it returns.

    Call this before any thread exists. Raises StartError with the remedy; no child is left then.
    """

    def prepare(control: socket.socket) -> None:
        _enter(guest)
        control.send(b"{}")
        if control.recv(1):
            tap, notes = _set_up(guest)
            socket.send_fds(control, [json.dumps({"notes": notes}).encode()], [tap])
            os.close(tap)

    held = fork_held(prepare, command, signal_mask)
    try:
        held.receive()
        write_id_maps(held.pid)
        held.answer()
    except BaseException:
        held.close()
        raise
    return Namespace(held)


def write_id_maps(pid: int) -> None:
    """Maps the user ids of the new user namespace of process `pid`.

    An ordinary user becomes root there and nothing else, the only map that the kernel lets them write. Root
    keeps every id as it is, so that files keep their owners and `su` works; where root may not (a container
    without CAP_SETUID) it gets the small map too.
    """
    if os.geteuid() == 0:
        try:
            for name in ("uid_map", "gid_map"):
                _write_proc(pid, name, _identity_map(name))
            return
        except OSError:
            pass
    try:
        _write_proc(pid, "setgroups", "deny")
        _write_proc(pid, "uid_map", f"0 {os.geteuid()} 1")
        _write_proc(pid, "gid_map", f"0 {os.getegid()} 1")
    except OSError as error:
        raise StartError(_why_no_map(error)) from error


def _why_no_map(error: OSError) -> str:
    what = f"Cannot map user ids in the new namespace ({error.strerror})"
    if os.geteuid() == 0:
        # Linux 5.12 lets only who may set file capabilities map root to root.
        return (
            f"{what}: this root lacks CAP_SETFCAP, so start it with that (a container with "
            f"`--cap-add SETFCAP`), or as an ordinary user."
        )
    return f"{what}: leave the container or sandbox, or let it allow user namespaces."


def _identity_map(name: str) -> str:
    """Every id that exists in this user namespace, mapped to itself."""
    with open(f"/proc/self/{name}", encoding="ascii") as file:
        ranges = [line.split() for line in file]
    return "".join(f"{inside} {inside} {count}\n" for inside, _, count in ranges)


def _write_proc(pid: int, name: str, text: str) -> None:
    fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())  # the kernel wants a map in one write
    finally:
        os.close(fd)


# --- in the child
# --------------------------------------------------------------------------------------------


def _enter(guest: Guest) -> None:
    flags = libc.CLONE_NEWUSER | libc.CLONE_NEWNET | libc.CLONE_NEWNS
    if guest.hostname is not None:
        flags |= libc.CLONE_NEWUTS
    try:
        libc.unshare(flags)
    except OSError as error:
        raise StartError(why_no_namespaces(error)) from error


def _set_up(guest: Guest) -> tuple[int, list[str]]:
    notes: list[str] = []
    try:
        mounts.make_private()
    except OSError as error:
        raise StartError(why_no_namespaces(error)) from error
    with contextlib.suppress(OSError):  # where it is forbidden, programs see the host's devices in /sys
        mounts.show_own_devices()
    links.set_up("lo")
    tap = _open_tap(guest.interface.name)
    try:
        links.configure(guest.interface)
    except OSError as error:
        raise StartError(
            f"Cannot configure the guest's interface ({error.strerror}): use another --subnet or --mtu."
        ) from error
    # Ping without CAP_NET_RAW for every group that exists here: all of them, or the one that is mapped.
    for last in ("2147483647", "0"):
        if links.write_sysctl("net/ipv4/ping_group_range", f"0 {last}"):
            break
    if guest.hostname is not None:
        socket.sethostname(guest.hostname)
    if guest.nameserver is not None:
        try:
            done = mounts.replace_resolv_conf(mounts.resolv_conf_text(guest.nameserver, guest.search))
        except OSError:
            done = False
        if not done:
            notes.append(
                f"Cannot lay a private /etc/resolv.conf over the host's: "
                f"make that file exist, or have the guest's programs ask {guest.nameserver}."
            )
    return tap, notes


def _open_tap(name: str) -> int:
    device = links.TUN_DEVICE
    try:
        return links.open_tap(name)
    except FileNotFoundError:
        remedy = (
            f"There is no {device}: load the module (`sudo modprobe tun`), "
            f"or start the container with `--device {device}`."
        )
    except PermissionError as error:
        if os.access(device, os.R_OK | os.W_OK):
            remedy = why_no_namespaces(error)
        else:
            remedy = f"No permission to open {device}: let users open it with `sudo chmod 0666 {device}`."
    except OSError as error:
        remedy = (
            f"Cannot make a TAP from {device} ({error.strerror}): "
            f"load the module (`sudo modprobe tun`), or run `guestnet doctor`."
        )
    raise StartError(remedy)


def why_no_namespaces(error: OSError) -> str:
    """Why namespaces were refused, as far as this system tells, and what to do about it."""
    if links.read_sysctl("user/max_user_namespaces") == "0" or error.errno in (errno.ENOSPC, errno.EUSERS):
        return (
            "This system allows no more user namespaces: "
            "raise the limit with `sudo sysctl user.max_user_namespaces=15000`."
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
        return "This kernel has no user namespaces: use one with CONFIG_USER_NS and CONFIG_NET_NS."
    return (
        f"This system refuses new namespaces ({error.strerror}): leave the chroot or, in a container, "
        f"start it with a seccomp profile that allows unshare (`--security-opt seccomp=unconfined`)."
    )
