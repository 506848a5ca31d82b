"""The launcher alone: namespaces, TAP, resolv.conf, exit statuses; no network behind the TAP.

The launcher wants a process without threads, which pytest does not promise, so each test drives a fresh one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from guestnet._linux import mounts
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
import fcntl, json, os, sys
from ipaddress import IPv4Address, IPv4Interface
from guestnet.errors import GuestnetError
from guestnet._linux.links import Interface
from guestnet._linux.namespace import Guest, launch
mac, address, gateway = bytes.fromhex("02abcdef0102"), IPv4Interface("10.9.8.2/24"), IPv4Address("10.9.8.1")
interface = Interface(mac, address, gateway, 1400)
host_ids = os.geteuid() == 0 and "OWN_IDS" not in os.environ
guest = Guest(
    interface,
    nameserver="10.9.8.1",
    search=("guestnet.internal",),
    hostname="g1",
    host_ids=host_ids,
    ends_first="ENDS_FIRST" in os.environ,
)
try:
    namespace = launch(guest, sys.argv[1:])
    tap = namespace.take_tap()
    assert not os.get_inheritable(tap)
    assert namespace.notes == (), namespace.notes
    name_and_flags = fcntl.ioctl(tap, 0x800454D2, bytes(40))  # TUNGETIFF
    persistent = bool(int.from_bytes(name_and_flags[16:18], sys.byteorder) & 0x0800)  # IFF_PERSIST
    assert persistent == guest.ends_first
    namespace.go()
except GuestnetError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(namespace.pid, 0)[1]) % 256)
"""


def launch(
    *command: str, prefix: tuple[str, ...] = (), own_ids: bool = False
) -> subprocess.CompletedProcess[str]:
    """With `own_ids` also root's command has none of the host's ids, and may have no way to root's Python."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", _DRIVER, *command],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "OWN_IDS": "1"} if own_ids else None,
    )


def test_the_interface_ends_with_its_descriptor_or_with_its_namespace() -> None:
    """The second costs whoever closes the descriptor no time, and is for namespaces that end before it."""
    for environment in ({}, {"ENDS_FIRST": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, "true"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stderr


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
                "pid": os.getpid(), "processes": sorted(int(p) for p in os.listdir("/proc") if p.isdigit()),
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
    assert (seen["pid"], seen["processes"]) == (2, [1, 2])
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


_ROOT = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root to change /etc in a mount namespace of the test"
)
_IN_A_COPY = (
    "set -e; mount -t tmpfs none /mnt; mkdir /mnt/etc /mnt/run; cp /etc/passwd /etc/group /mnt/etc; "
    '{prepare}; mount --bind /mnt/etc /etc; mount --bind /mnt/run /run; exec "$@"'
)
_BY_RENAME = "echo nameserver 127.0.0.53 >/etc/new; mv /etc/new /etc/resolv.conf"
_CHANGES = {
    "a file is replaced by rename": ("echo nameserver 192.0.2.9 >/mnt/etc/resolv.conf", _BY_RENAME),
    "a symlink is pointed elsewhere": (
        "echo nameserver 192.0.2.9 >/mnt/run/resolv.conf; ln -s /run/resolv.conf /mnt/etc/resolv.conf",
        "echo nameserver 127.0.0.53 >/run/other; ln -s /run/other /etc/new; mv /etc/new /etc/resolv.conf",
    ),
    "what a symlink points to is replaced": (
        "mkdir /mnt/run/systemd; echo nameserver 192.0.2.9 >/mnt/run/systemd/stub; "
        "ln -s ../run/systemd/stub /mnt/etc/resolv.conf",
        "echo nameserver 127.0.0.53 >/run/systemd/new; mv /run/systemd/new /run/systemd/stub",
    ),
    "a file is removed and made again": (
        "echo nameserver 192.0.2.9 >/mnt/etc/resolv.conf",
        "rm /etc/resolv.conf; echo nameserver 127.0.0.53 >/etc/resolv.conf",
    ),
    "there was none": (":", _BY_RENAME),
}


class Running:
    """A guest whose host's /etc and /run are a copy that can be changed while it runs. It does a step of a
    shell for each line that it is sent."""

    def __init__(self, prepare: str, step: str, *, own_ids: bool) -> None:
        words = [
            "unshare",
            "-m",
            "sh",
            "-c",
            _IN_A_COPY.format(prepare=prepare),
            "sh",
            sys.executable,
            "-c",
            _DRIVER,
        ]
        environment = {**os.environ, "OWN_IDS": "1"} if own_ids else None
        self._process = subprocess.Popen(
            [*words, "sh", "-c", f"while read line; do {step}; done"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def step(self) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def change(self, script: str) -> None:
        subprocess.run(
            ["nsenter", "-m", "-t", str(self._process.pid), "sh", "-ec", script], check=True, timeout=30
        )

    def until(self, wanted: str) -> None:
        deadline = time.monotonic() + 20
        while (seen := self.step()) != wanted:
            assert time.monotonic() < deadline, seen
            time.sleep(0.01)


@_ROOT
@pytest.mark.parametrize("change", _CHANGES)
def test_the_guest_keeps_its_resolv_conf_when_the_host_changes_its_own(change: str) -> None:
    """An overlay is over the whole directory: there is no moment in which the host's file is seen."""
    prepare, script = _CHANGES[change]
    with Running(prepare, "head -1 /etc/resolv.conf", own_ids=True) as guest:
        assert guest.step() == "nameserver 10.9.8.1"
        guest.change(script)
        assert [guest.step() for _ in range(20)] == ["nameserver 10.9.8.1"] * 20


@_ROOT
@pytest.mark.parametrize("change", _CHANGES)
def test_a_resolv_conf_that_was_mounted_alone_is_restored(change: str) -> None:
    """The guest may write the host's /etc here, so its files are mounted one by one."""
    prepare, script = _CHANGES[change]
    with Running(prepare, "head -1 /etc/resolv.conf", own_ids=False) as guest:
        assert guest.step() == "nameserver 10.9.8.1"
        for _ in range(3):
            guest.change(script)
            guest.until("nameserver 10.9.8.1")


_SOCKET = (
    f'{sys.executable} -c "import os, socket, sys; os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True); '
    'socket.socket(socket.AF_UNIX).bind(sys.argv[1])" '
)


@_ROOT
@pytest.mark.parametrize("own_ids", [True, False])
@pytest.mark.parametrize("path", ["/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve"])
def test_the_socket_of_a_name_service_stays_closed_when_the_service_starts_again(
    path: str, own_ids: bool
) -> None:
    step = f"test -S {path} && echo open || echo closed"
    with Running(f"{_SOCKET} /mnt{path}", step, own_ids=own_ids) as guest:
        assert guest.step() == "closed"
        guest.change(f"rm -r $(dirname {path}); {_SOCKET} {path}")
        guest.until("closed")


@_ROOT
def test_the_socket_of_a_name_service_is_closed_when_the_service_starts_later() -> None:
    path = "/run/nscd/socket"
    step = f"test -S {path} && echo open || echo closed"
    with Running(":", step, own_ids=True) as guest:
        assert guest.step() == "closed"  # it runs, so its /run is the copy
        guest.change(f"{_SOCKET} {path}")
        guest.until("closed")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("hosts: files dns", "hosts: files dns"),
        ("hosts:\tmymachines resolve [!UNAVAIL=return] files myhostname dns", "hosts: files myhostname dns"),
        ("hosts: files mdns4_minimal [NOTFOUND=return] resolve  # a comment", "hosts: files dns"),
        ("passwd: files systemd sss", "passwd: files systemd sss"),
    ],
)
def test_nsswitch_leaves_hosts_to_modules_that_ask_nothing_outside(text: str, hosts: str) -> None:
    assert mounts.nsswitch_text(f"group: files\n{text}\n") == f"group: files\n{hosts}\n"


_WRITE = 'if v=$(cat {0}) && {{ echo "$v" >{0}; }} 2>/dev/null; then echo {0} is written; fi; '


@_ROOT
@pytest.mark.parametrize("own_ids", [True, False])
def test_root_writes_no_setting_of_the_kernel(own_ids: bool) -> None:
    settings = ("/proc/sys/kernel/core_pattern", "/proc/sys/fs/file-max", "/proc/sys/vm/swappiness")
    script = "".join(_WRITE.format(path) for path in settings)
    got = launch(
        "sh", "-c", f"{script} echo 1 >/proc/sys/net/ipv4/ip_forward && echo looked", own_ids=own_ids
    )
    assert (got.stdout, got.returncode) == ("looked\n", 0), got.stderr


@_ROOT
def test_the_guest_of_root_owns_nothing_of_the_host(tmp_path: Path) -> None:
    """It has ids of its own, several of them, and none of root's groups. With the host's ids it is root."""
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    secret.chmod(0o640)
    for parent in tmp_path.parents[:-2]:
        parent.chmod(0o755)
    tmp_path.chmod(0o755)
    script = (
        f"cat {secret} 2>&1; id -u; id -G; touch /tmp/own-$$; chown 7:7 /tmp/own-$$; stat -c %u /tmp/own-$$; "
        "rm /tmp/own-$$"
    )
    got = launch("sh", "-c", script, own_ids=True)
    assert got.stdout.splitlines()[1:] == ["0", "0", "7"], got.stderr
    assert "Permission denied" in got.stdout
    assert launch("sh", "-c", script).stdout.splitlines()[:2] == ["secret", "0"]


@_ROOT
def test_a_command_that_only_root_may_read_says_how(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    command = tmp_path / "command"
    command.write_text("#!/bin/sh\necho started\n")
    command.chmod(0o755)
    got = launch(str(command), own_ids=True)
    assert got.returncode == 126
    assert "--host-ids" in got.stderr
    assert launch(str(command)).stdout == "started\n"


@_ROOT
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_a_root_that_may_not_map_ids_is_warned() -> None:
    """As in a container without CAP_SETUID. CAP_SETFCAP is what lets it be root of a namespace at all."""
    code = _DRIVER.replace(
        "assert namespace.notes == (), namespace.notes", "print(*namespace.notes, file=sys.stderr)"
    )
    words = ["setpriv", "--bounding-set=-all,+setfcap,+net_admin", sys.executable, "-c", code, "true"]
    got = subprocess.run(
        words, capture_output=True, text=True, timeout=30, check=False, env={**os.environ, "OWN_IDS": "1"}
    )
    assert got.returncode == 0, got.stderr
    assert "root of this host's files" in got.stderr


@_ROOT
def test_a_system_that_forbids_its_own_proc_is_reported() -> None:
    """As in a container that hides parts of /proc. Processes outside stay out of reach, and names are
    kept."""
    code = _DRIVER.replace(
        "assert namespace.notes == (), namespace.notes", "print(*namespace.notes, file=sys.stderr)"
    )
    hide = 'mount -t tmpfs none /proc/fs; mount -t tmpfs none /proc/irq; exec "$@"'
    step = "kill -KILL -1 2>&-; head -1 /etc/resolv.conf"
    words = ["unshare", "-m", "sh", "-ec", hide, "sh", sys.executable, "-c", code, "sh", "-c", step]
    environment = {**os.environ, "OWN_IDS": "1"}
    got = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, env=environment)
    assert (got.returncode, got.stdout) == (0, "nameserver 10.9.8.1\n"), got.stderr
    assert "Cannot mount a /proc of the guest's own" in got.stderr
