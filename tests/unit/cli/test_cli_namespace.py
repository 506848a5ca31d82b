"""The launcher alone: namespaces, TAP, resolv.conf, exit statuses; no network behind the TAP.

The launcher wants a process without threads, which pytest does not promise, so each test drives a fresh one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from guestnet.cli import checks

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux")
    or checks.check_namespaces().state != checks.OK
    or checks.check_tun().state != checks.OK,
    reason="no namespaces or no /dev/net/tun here: `guestnet doctor` says how to get them",
)

# A container may forbid a /sys of one's own.
_SYSFS = not subprocess.run(
    ["unshare", "-rnm", "mount", "-t", "sysfs", "none", "/sys"], capture_output=True, check=False
).returncode

_DRIVER = """
import json, os, sys
from ipaddress import IPv4Address, IPv4Interface
from guestnet.errors import GuestnetError
from guestnet._linux.links import Interface
from guestnet.namespace import Guest, launch
mac, address, gateway = bytes.fromhex("02abcdef0102"), IPv4Interface("10.9.8.2/24"), IPv4Address("10.9.8.1")
interface = Interface(mac, address, gateway, 1400)
guest = Guest(interface, nameserver="10.9.8.1", search=("guestnet.internal",), hostname="g1")
try:
    namespace = launch(guest, sys.argv[1:])
    tap = namespace.take_tap()
    assert not os.get_inheritable(tap)
    assert namespace.notes == (), namespace.notes
    namespace.go()
except GuestnetError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(namespace.pid, 0)[1]) % 256)
"""


def launch(*command: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", _DRIVER, *command],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code))


def test_interface_route_names_and_ping() -> None:
    got = launch(
        *python(
            """
            import fcntl, json, os, socket, struct
            s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            def ask(number):
                return fcntl.ioctl(s, number, struct.pack("16s24x", b"eth0"))[16:]
            with open("/proc/net/route") as f:
                routes = [line.split()[:3] for line in f][1:]
            print(json.dumps({
                "names": sorted(name for _, name in socket.if_nameindex()),
                "mac": ask(0x8927)[2:8].hex(), "address": socket.inet_ntoa(ask(0x8915)[4:8]),
                "mask": socket.inet_ntoa(ask(0x891b)[4:8]), "broadcast": socket.inet_ntoa(ask(0x8919)[4:8]),
                "mtu": struct.unpack_from("i", ask(0x8921))[0], "routes": routes,
                "resolv": open("/etc/resolv.conf").read(), "host": socket.gethostname(),
                "ping": open("/proc/sys/net/ipv4/ping_group_range").read().split()[0],
                "ignored": [l.split()[1] for l in open("/proc/self/status") if l.startswith("SigBlk")],
                "devices": sorted(os.listdir("/sys/class/net")),
                "cgroups": os.path.ismount("/sys/fs/cgroup"),
                "uid": os.getuid(), "fds": len(os.listdir("/proc/self/fd")),
            }))
            """
        )
    )
    assert got.returncode == 0, got.stderr
    seen = json.loads(got.stdout)
    assert {"eth0", "lo"} <= set(seen["names"])
    assert seen["mac"] == "02abcdef0102"
    assert (seen["address"], seen["mask"], seen["broadcast"]) == ("10.9.8.2", "255.255.255.0", "10.9.8.255")
    assert seen["mtu"] == 1400
    assert ["eth0", "00000000", "0108090A"] in seen["routes"]
    assert seen["resolv"] == "nameserver 10.9.8.1\nsearch guestnet.internal\n"
    assert seen["host"] == "g1"
    assert seen["ping"] == "0"
    assert seen["ignored"] == ["0000000000000000"]
    assert seen["uid"] == 0
    if _SYSFS:
        assert seen["devices"] == seen["names"]
        assert seen["cgroups"] == os.path.ismount("/sys/fs/cgroup")


def test_nothing_changes_outside() -> None:
    def view() -> tuple[object, ...]:
        with open("/etc/resolv.conf", "rb") as file:
            text = file.read()
        with open("/proc/self/mountinfo", "rb") as file:
            mounts = len(file.readlines())
        return text, mounts, os.uname().nodename, sorted(os.listdir("/tmp"))[:0]

    before = view()
    assert launch("true").returncode == 0
    assert view() == before


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (("no-such-command-here",), 127, "install it"),
        (("/no/such/path",), 127, "install it"),
        (("",), 127, "There is no command"),
        (("/etc/passwd",), 126, "Permission denied"),
        (("/",), 126, "Cannot execute"),
        (("sh", "-c", "exit 7"), 7, ""),
        (("sh", "-c", "kill -TERM $$"), (-15) % 256, ""),
    ],
)
def test_statuses(command: tuple[str, ...], status: int, words: str) -> None:
    got = launch(*command)
    assert got.returncode == status
    assert words in got.stderr
    assert got.stderr.count("\n") == (1 if words else 0)


def test_the_command_dies_with_its_parent() -> None:
    code = _DRIVER.replace(
        "sys.exit(os.waitstatus", "print(namespace.pid, flush=True)\nsys.exit(os.waitstatus"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, "sleep", "600"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline()
    parent.kill()
    parent.wait()
    # The pipe ends when the last process that holds it is gone, and the command has it as its stdout: a
    # command that lived on would keep this waiting for the test's time limit.
    assert parent.stdout.read() == ""
    parent.stdout.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change /etc in a mount namespace of the test")
@pytest.mark.parametrize("kind", ["symlink", "dangling", "missing"])
def test_resolv_conf_of_every_kind(kind: str) -> None:
    prepare = {
        "symlink": "echo 'nameserver 192.0.2.9' >/mnt/target; ln -s /mnt/target /mnt/etc/resolv.conf",
        "dangling": "ln -s /mnt/nowhere /mnt/etc/resolv.conf",
        "missing": ":",
    }[kind]
    script = (
        "set -e; mount -t tmpfs none /mnt; mkdir /mnt/etc; cp /etc/passwd /etc/group /mnt/etc; "
        f'{prepare}; mount --bind /mnt/etc /etc; "$@"; '
        "ls /etc | sort | tr '\\n' ' '; cat /mnt/target || true"
    )
    got = launch("cat", "/etc/resolv.conf", prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    lines = got.stdout.splitlines()
    assert lines[:2] == ["nameserver 10.9.8.1", "search guestnet.internal"], got.stderr
    left = ["group", "passwd"] + (["resolv.conf"] if kind != "missing" else [])
    assert lines[2].split()[: len(left)] == left
    if kind == "symlink":
        assert lines[2].endswith("nameserver 192.0.2.9")
