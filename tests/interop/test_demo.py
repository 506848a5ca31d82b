"""`guestnet demo` does what it says wherever it runs, and leaves nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lab import Lab, user
from lab.runner import GUESTNET, GuestRunner

STEPS = [
    *("guest attached", "lease by DHCP", "name resolved", "own name resolved", "page through NAT"),
    *("published port", "throughput up", "throughput down"),
]
SHORT = [GUESTNET, "demo", "--seconds", "0.2"]


def check(done: subprocess.CompletedProcess[str]) -> str:
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert [line.split("  ")[2].strip() for line in said.splitlines() if line.startswith("ok ")] == STEPS
    assert "failed" not in said
    assert "rx bytes" in said, "the counters come last"
    return said


@pytest.mark.parametrize("ordinary", [True, False], ids=["user", "root"])
def test_in_namespaces(guest: GuestRunner, ordinary: bool) -> None:
    said = check(guest.lab.run(SHORT, ordinary=ordinary, seconds=60))
    assert "--TAP--" in said
    assert "the guest said: Hello from the guest, you are 198.51.100.1" in said


def test_in_memory_beside_a_server_on_its_port(guest: GuestRunner) -> None:
    other = guest.lab.start(
        [sys.executable, "-c", "import socket; s = socket.create_server(('', 8080)); print('up'); input()"],
        stdin=subprocess.PIPE,
        env={"PYTHONUNBUFFERED": "1"},
        ready="^up$",
    )
    said = check(guest.lab.run([*SHORT, "--no-namespace"], ordinary=True, seconds=60))
    assert "(in memory)" in said
    assert "127.0.0.1:8080," not in said
    other.stop()


@pytest.mark.parametrize(
    "forbid",
    [
        "mount -t tmpfs -o mode=755 none /dev/net",
        "mount -t tmpfs -o mode=755 none /dev/net; mknod -m 0600 /dev/net/tun c 10 200",
    ],
    ids=["no tun", "tun of root"],
)
def test_where_the_system_forbids_it(guest: GuestRunner, forbid: str) -> None:
    """A guest in memory then; `guestnet run` and `doctor` say what is missing."""
    lab: Lab = guest.lab
    script = f'mount --make-rprivate /; {forbid}; exec "$@"'

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["unshare", "-m", "sh", "-c", script, "sh", *user.become(list(words))]
        return lab.run(command, env=user.environment(str(lab.dir)), seconds=60)

    assert "(in memory)" in check(run(*SHORT))
    refused = run(GUESTNET, "run", "--", "true")
    assert refused.returncode == 125
    assert "/dev/net/tun" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    looked = run(GUESTNET, "doctor")
    assert looked.returncode == 1
    assert "MISSING  /dev/net/tun" in looked.stdout


def test_where_no_namespaces_can_be_made(guest: GuestRunner) -> None:
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["unshare", "-U", "-r", "sh", "-c", script, "sh", *words]
        return guest.lab.run(command, ordinary=True, seconds=60)

    assert "(in memory)" in check(run(*SHORT))
    refused = run(GUESTNET, "run", "--", "true")
    assert refused.returncode == 125
    assert "sudo sysctl user.max_user_namespaces=" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_interrupted(guest: GuestRunner) -> None:
    process = guest.lab.start([GUESTNET, "demo", "--seconds", "30"], ordinary=True, ready="published port")
    process.signal(2)
    assert process.wait() == 130
    assert "Traceback" not in process.output
