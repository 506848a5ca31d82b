"""The checks of `guestnet doctor`: one function for each, which tries the real thing if that leaves no trace.

A check reports what was found. If something is missing, it says what it is good for and how to get it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network

from guestnet._linux import libc, links

OK = "ok"
LIMITED = "limited"
MISSING = "missing"

# linux/if_tun.h: what a TAP can be asked to leave to us.
_OFFLOADS = {"checksum": 0x01, "TSO": 0x01 | 0x02, "TSO for IPv6": 0x01 | 0x04, "USO": 0x01 | 0x20 | 0x40}
_SO_PEEK_OFF = 42
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_CAP_NET_ADMIN = 12
_CAP_NET_RAW = 13
_OLDEST_QEMU = (7, 2)
_WANTED_FILES = 65536


@dataclass(frozen=True)
class Check:
    """One finding. `needed` is set if `guestnet run` cannot work without it."""

    name: str
    state: str
    found: str
    remedy: str | None = None
    needed: bool = False

    def as_dict(self) -> dict[str, object]:
        """The finding for --json."""
        return asdict(self)


def all_checks(subnet: str) -> Iterator[Check]:
    """Every check, in the order of the report."""
    yield check_kernel()
    yield check_namespaces()
    yield check_tun()
    yield check_tap_offloads()
    yield check_resolvers()
    yield check_subnet(subnet)
    yield check_ping()
    yield check_low_ports()
    yield check_uplink()
    yield check_open_files()
    yield check_peek_offset()
    yield check_udp_offload()
    yield check_io_uring()
    yield check_confinement()
    yield check_qemu()
    yield check_kvm()
    yield check_vhost()


def check_kernel() -> Check:
    """The system and its version."""
    python = platform.python_version()
    found = f"{platform.system()} {platform.release()} on {platform.machine()}, Python {python}"
    if platform.system() == "Linux":
        return Check("system", OK, found)
    return Check(
        "system", LIMITED, found, "Use Linux for `guestnet run`; `guestnet up` works here, untested."
    )


def check_namespaces() -> Check:
    """Whether this user can make user, network, mount and PID namespaces and map ids; tried in a child."""
    from guestnet._linux.child_process import READY, StartError, fork_held
    from guestnet._linux.namespace import why_no_namespaces, write_id_maps

    def prepare(control: socket.socket) -> None:
        try:
            libc.unshare(libc.CLONE_NEWUSER | libc.CLONE_NEWNET | libc.CLONE_NEWNS | libc.CLONE_NEWPID)
        except OSError as error:
            raise StartError(why_no_namespaces(error)) from error
        control.send(READY)

    name = "namespaces"
    child = fork_held(prepare, lambda: 0)
    try:
        child.receive()
        write_id_maps(child.pid)
    except StartError as error:
        return Check(name, MISSING, "refused", str(error), needed=True)
    finally:
        child.close()
    return Check(name, OK, "user, network, mount and PID namespaces can be made", needed=True)


def check_tun(device: str = links.TUN_DEVICE) -> Check:
    """The device that TAP interfaces come from, and its mode."""
    try:
        mode = os.stat(device).st_mode
        if not stat.S_ISCHR(mode):
            return Check(
                device, MISSING, "not a device", f"Remove {device} and load the module.", needed=True
            )
    except OSError as error:
        remedy = (
            f"Load the module with `sudo modprobe tun`; in a container start it with `--device {device}`. "
            f"`guestnet vm` and `guestnet up` do not need it."
        )
        return Check(device, MISSING, str(error.strerror), remedy, needed=True)
    found = f"mode {stat.S_IMODE(mode):04o}"
    if os.access(device, os.R_OK | os.W_OK):
        return Check(device, OK, found, needed=True)
    return Check(device, MISSING, found, f"Let users open it with `sudo chmod 0666 {device}`.", needed=True)


def check_tap_offloads() -> Check:
    """Which offloads a TAP supports. They make large transfers several times as fast."""
    name = "TAP offloads"

    def attempt() -> str:
        libc.unshare(libc.CLONE_NEWUSER | libc.CLONE_NEWNET)
        fd = links.open_tap("probe0")
        taken = []
        for offload, bits in _OFFLOADS.items():
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, links.TUNSETOFFLOAD, bits)
                taken.append(offload)
        return ", ".join(taken)

    number, taken = _in_child(attempt)
    if number:
        return Check(
            name, MISSING, f"no TAP to ask ({os.strerror(number)})", "Get namespaces and /dev/net/tun first."
        )
    missing = [offload for offload in _OFFLOADS if offload not in taken.split(", ")]
    if not missing:
        return Check(name, OK, taken)
    remedy = f"Use Linux 6.2 or newer for {' and '.join(missing)}; all works without, at a lower speed."
    return Check(name, LIMITED, taken or "none", remedy)


def check_resolvers(path: str = "/etc/resolv.conf") -> Check:
    """The name servers that guests' queries are forwarded to."""
    name = "name servers"
    remedy = f"Write `nameserver ADDRESS` to {path}, unless a name server runs on this host itself."
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = _name_servers(file.read())
    except OSError as error:
        return Check(name, LIMITED, f"{path}: {error.strerror}: 127.0.0.1 is asked", remedy)
    if not found:
        return Check(name, LIMITED, f"none in {path}: 127.0.0.1 is asked", remedy)
    return Check(name, OK, ", ".join(found))


def _name_servers(text: str) -> list[str]:
    """The name servers that guests' queries would be forwarded to."""
    import logging

    from guestnet.services.dns.resolvers import NOT_NAMED, parse_resolv_conf

    logging.getLogger("guestnet").addHandler(logging.NullHandler())  # the check says what is missing
    servers = parse_resolv_conf(text).servers
    return [] if servers is NOT_NAMED else [server.host for server in servers]


def check_subnet(subnet: str, table: str = "/proc/net/route") -> Check:
    """Whether the host has a route into the guests' subnet, whose hosts guests could not reach."""
    name = "subnet"
    taken = links.routes_into(IPv4Network(subnet), table)
    if not taken:
        return Check(name, OK, f"{subnet} is free")
    remedy = "Give --subnet another one, or guests cannot reach the hosts of that network."
    return Check(name, LIMITED, f"{subnet} overlaps {', '.join(taken)}", remedy)


def check_ping() -> Check:
    """Whether echo requests can leave: by a ping socket, or by a raw one."""
    name = "ping"
    allowed = links.read_sysctl("net/ipv4/ping_group_range") or "unknown"
    found = f"net.ipv4.ping_group_range = {' '.join(allowed.split())}"
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except OSError:
        pass
    else:
        return Check(name, OK, found)
    remedy = 'Allow ping with `sudo sysctl net.ipv4.ping_group_range="0 2147483647"`.'
    if libc.has_capability(_CAP_NET_RAW):
        return Check(name, OK, f"{found}; by a raw socket, which this process may open")
    return Check(name, LIMITED, f"{found}: guests' pings are answered with an error", remedy)


def check_low_ports() -> Check:
    """The lowest port that this user may publish."""
    start = links.read_sysctl("net/ipv4/ip_unprivileged_port_start") or "1024"
    name = "publishing"
    if os.geteuid() == 0 or int(start) <= 1:
        return Check(name, OK, "any port")
    remedy = (
        "Allow lower ones with `sudo sysctl net.ipv4.ip_unprivileged_port_start=80`, or publish higher ones."
    )
    return Check(name, OK, f"ports from {start}", remedy)


def check_uplink() -> Check:
    """What the uplink `tun` needs: the capability, and nft for masquerading."""
    name = "uplink tun"
    if not libc.has_capability(_CAP_NET_ADMIN):
        remedy = "Run as root, or in `unshare -Urn`, for `--uplink tun`; the uplink `sockets` needs nothing."
        return Check(name, LIMITED, "no CAP_NET_ADMIN", remedy)
    if not os.access(links.TUN_DEVICE, os.R_OK | os.W_OK):
        return Check(name, LIMITED, f"{links.TUN_DEVICE} cannot be opened", f"See {links.TUN_DEVICE} above.")
    nft = shutil.which("nft")
    if nft is None:
        return Check(
            name, LIMITED, "devices can be made, no nft in PATH", "Install nftables for `--masquerade`."
        )
    forwards = links.read_sysctl("net/ipv4/ip_forward") == "1"
    switch = "forwarding is on" if forwards else "forwarding is off: `--forwarding` turns it on"
    return Check(name, OK, f"devices can be made, nft at {nft}, {switch}")


def check_open_files() -> Check:
    """How many connections can be open at once. Each of them needs a file descriptor."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name = "open files"
    if hard == resource.RLIM_INFINITY or hard >= _WANTED_FILES:
        return Check(name, OK, "unlimited" if hard == resource.RLIM_INFINITY else f"up to {hard}")
    remedy = f"Raise the hard limit (`nofile` in /etc/security/limits.conf) to {_WANTED_FILES}."
    return Check(name, LIMITED, f"up to {hard}", remedy)


def check_peek_offset() -> Check:
    """SO_PEEK_OFF on TCP sockets, so that data without an acknowledgement is not read twice."""
    name = "SO_PEEK_OFF"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        except OSError:
            return Check(
                name, LIMITED, "not for TCP", "Use Linux 6.9 or newer to save a copy of what guests receive."
            )
    return Check(name, OK, "for TCP")


def check_udp_offload() -> Check:
    """Segmentation of UDP in the kernel."""
    name = "UDP offload"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(_SOL_UDP, _UDP_SEGMENT, 0)
            sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        except OSError:
            return Check(name, LIMITED, "not complete", "Use Linux 5.0 or newer for fast UDP.")
    return Check(name, OK, "GSO and GRO")


def check_io_uring() -> Check:
    """io_uring: many small writes in one call."""
    from guestnet._native import io_uring_works

    name = "io_uring"
    if io_uring_works():
        return Check(name, OK, "small writes are gathered")
    remedy = (
        "For more small requests a second: Linux 6.0 or newer, kernel.io_uring_disabled=0, and a container "
        "that allows io_uring."
    )
    return Check(name, LIMITED, "not to be had", remedy)


def check_confinement() -> Check:
    """Whether packet threads can drop what they never need."""
    from guestnet._native import confinement_lack

    name = "confinement"
    lack = confinement_lack()
    if lack is None:
        return Check(name, OK, "packet threads: no new privileges, few capabilities, a seccomp filter")
    remedy = (
        "Use a kernel with CONFIG_SECCOMP_FILTER, and a container that allows seccomp; all works without."
    )
    return Check(name, LIMITED, lack, remedy)


def check_qemu() -> Check:
    """QEMU, for `guestnet vm`."""
    name = "QEMU"
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine().lower(), platform.machine().lower()
    )
    program = f"qemu-system-{machine}"
    path = shutil.which(program)
    if path is None:
        remedy = "Install it for `guestnet vm` (Debian: `sudo apt install qemu-system-x86`)."
        return Check(name, MISSING, f"no {program} in PATH", remedy)
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    match = re.search(r"version (\d+)\.(\d+)(\.\d+)?", answer)
    if match is None:
        return Check(name, LIMITED, f"{path} does not tell its version", "Install QEMU 7.2 or newer.")
    number = int(match[1]), int(match[2])
    found = f"{match[0].removeprefix('version ')} at {path}; {_reconnects(number)}"
    if number < _OLDEST_QEMU:
        return Check(name, MISSING, found, "Install QEMU 7.2 or newer: older ones have no `-netdev stream`.")
    return Check(name, OK, found)


def _reconnects(version: tuple[int, int]) -> str:
    """How a machine on `guestnet up --stream` stays connected when guestnet restarts."""
    if version >= (9, 2):
        return "-netdev stream connects again with reconnect-ms=1000"
    if version >= (8, 0):
        return "-netdev stream connects again with reconnect=1"
    return "-netdev stream does not connect again (QEMU 8.0 does)"


def check_kvm(device: str = "/dev/kvm") -> Check:
    """Hardware virtualisation. Without it QEMU works slowly."""
    if not os.path.exists(device):
        return Check(
            "KVM", LIMITED, f"no {device}", "Turn virtualisation on in the firmware; QEMU is slow without."
        )
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return Check(
            "KVM", LIMITED, "not for this user", 'Join the group with `sudo usermod -aG kvm "$USER"`.'
        )
    except OSError as error:
        return Check(
            "KVM", LIMITED, f"{device}: {error.strerror}", "Load the module: `sudo modprobe kvm_intel`."
        )
    return Check("KVM", OK, "usable")


def check_vhost() -> Check:
    """Shared memory for vhost-user guests."""
    try:
        os.close(os.memfd_create("guestnet-doctor", os.MFD_CLOEXEC))
    except OSError as error:
        return Check("shared memory", LIMITED, f"no memfd ({error.strerror})", "Use Linux 3.17 or newer.")
    return Check("shared memory", OK, "memfd")


def _in_child(attempt: Callable[[], str]) -> tuple[int, str]:
    """Calls `attempt` in a child process. Returns the errno of its OSError (0: none) and its answer.

    `attempt` moves to other namespaces, from which this process could not return.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        number, text = errno.EIO, ""
        try:
            number, text = 0, attempt()
        except OSError as error:
            number = error.errno or errno.EIO
        except BaseException:
            number = errno.EIO
        finally:
            os.write(writer, f"{number}\n{text}".encode())
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        number_text, _, answer = file.read().partition("\n")
    os.waitpid(pid, 0)
    return int(number_text or errno.EIO), answer
