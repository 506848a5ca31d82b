"""`guestnet run` is like running the command itself: status, signals, terminal; and leaves nothing."""

from __future__ import annotations

import re
import shlex
import signal
import sys

import pytest
from lab import need, wait_until
from lab.runner import GUESTNET, GuestRunner

pytestmark = pytest.mark.usefixtures("guest")


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_exit_status(guest: GuestRunner, status: int) -> None:
    assert guest(["sh", "-c", f"exit {status}"]).returncode == status


def test_death_by_signal(guest: GuestRunner) -> None:
    assert guest(["sh", "-c", "kill -KILL $$"]).returncode in (128 + 9, -9)


def test_a_command_that_is_not_there(guest: GuestRunner) -> None:
    done = guest(["no-such-program"])
    assert done.returncode == 127
    assert "no-such-program" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_reach_the_command(guest: GuestRunner, number: signal.Signals) -> None:
    script = f"""
import signal, sys
signal.signal({int(number)}, lambda *_: sys.exit(33))
print("ready", flush=True)
while True:
    signal.pause()
"""
    process = guest.start([sys.executable, "-c", script], ready="^ready$")
    process.signal(number)
    assert process.wait() == 33


def test_stdin_and_stdout_are_the_commands_own(guest: GuestRunner) -> None:
    assert guest(["cat"], stdin="one\ntwo\n").stdout == "one\ntwo\n"


def test_a_terminal_stays_a_terminal(guest: GuestRunner) -> None:
    inner = " ".join(guest.command(["sh", "-c", "'test -t 0 && test -t 1 && stty size'"]))
    done = guest.lab.run(["script", "-qec", f"stty rows 33 cols 99; {inner}", "/dev/null"], ordinary=True)
    assert "33 99" in done.stdout, done.stdout + done.stderr


def test_the_namespace_is_configured(guest: GuestRunner) -> None:
    out = guest.check(["sh", "-c", "ip -4 -o addr; ip route; cat /etc/resolv.conf"])
    assert "192.168.64.2/24" in out
    assert "default via 192.168.64.1" in out
    assert "nameserver 192.168.64.1" in out
    assert "127.0.0.1/8" in out


def test_the_command_keeps_its_limit_of_descriptors(guest: GuestRunner) -> None:
    """guestnet raises its own: every relayed connection is one."""
    inner = guest.command(["sh", "-c", "ulimit -Sn"])
    done = guest.lab.run(["sh", "-c", f"ulimit -Sn 321; exec {shlex.join(inner)}"], ordinary=True)
    assert (done.stdout, done.stderr) == ("321\n", "")


def test_the_queue_to_guestnet_is_long(guest: GuestRunner) -> None:
    assert " qlen 2000" in guest.check(["ip", "link", "show", "eth0"])


def test_another_subnet(guest: GuestRunner) -> None:
    out = guest.check(["sh", "-c", "ip -4 -o addr; ip route"], "--subnet", "10.77.0.0/16")
    assert "10.77.0.2/16" in out
    assert "default via 10.77.0.1" in out


@pytest.mark.parametrize(
    "words", [("--subnet", "10.0.0.0/33"), ("--mtu", "12"), ("--no-such-option",), ("--dns-record", "x")]
)
def test_bad_options_are_one_sentence(guest: GuestRunner, words: tuple[str, ...]) -> None:
    done = guest(["echo", "started"], *words)
    assert done.returncode == 2
    assert "started" not in done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert words[-1] in done.stderr


def test_host_only_goes_nowhere(guest: GuestRunner) -> None:
    out = guest(["curl", "-sS", "-m", "5", "http://203.0.113.2/"], "--mode", "host_only")
    assert out.returncode != 0
    done = guest(["ping", "-c", "1", "-W", "3", "192.168.64.1"], "--mode", "host_only")
    assert done.returncode == 0, done.stdout


def test_nothing_is_left_when_the_launcher_is_killed(guest: GuestRunner) -> None:
    files = sorted(guest.lab.dir.iterdir())
    script = "sleep 300 & (setsid sh -c 'sleep 300 & sleep 300' &); echo ready; exec sleep 300"
    process = guest.start(["sh", "-c", script], ready="^ready$")
    process.signal(signal.SIGKILL)
    process.wait()
    # They hold the command's output open.
    wait_until(lambda: process.ended, "everything that the command started to end")
    assert sorted(guest.lab.dir.iterdir()) == files
    # The fixture now waits for the host namespace to have no process left.


def test_pcap(guest: GuestRunner) -> None:
    need.program("tshark")
    file = guest.lab.dir / "run.pcapng"
    guest.check(["curl", "-sS", "http://203.0.113.2/"], "--pcap", str(file))
    out = guest.lab.check(
        ["tshark", "-nr", str(file), "-T", "fields", "-e", "tcp.flags.str", "-e", "http.request.uri"]
    )
    assert "··········S·" in out
    assert "/\n" in out


def test_nothing_runs_when_nothing_happens(guest: GuestRunner) -> None:
    """No system call returns over ten idle seconds in any thread of guestnet, but for expiry."""
    need.program("strace")
    process = guest.start(["sh", "-c", "echo ready; exec sleep 60"], ready="^ready$")
    # The guest's own start-up chatter (neighbour discovery, address checks) has to end first: wait until
    # the process has spent no more CPU for a while.
    last = [""]

    def quiet() -> bool:
        with open(f"/proc/{process.pid}/stat") as f:
            now = " ".join(f.read().rpartition(")")[2].split()[11:13])
        same = now == last[0]
        last[0] = now
        return same

    wait_until(quiet, "guestnet to be idle", step=3)
    # strace's own arrival ends every wait with EINTR, and each thread then has to take the interpreter's lock
    # to wait again: what happens in the first second is its doing.
    command = ["timeout", "11", "strace", "-f", "-qq", "-ttt", "-p", str(process.pid)]
    trace = guest.lab.run(command, seconds=30)
    lines = re.findall(r"^(?:\[pid +\d+\] )?(\d+\.\d+) (.*)$", trace.stderr, re.MULTILINE)
    assert lines, f"strace saw no thread: {trace.stderr}"
    arrived = float(lines[0][0])
    calls = [
        text for when, text in lines
        if float(when) > arrived + 1 and not re.search("unfinished|detached", text)
    ]  # fmt: skip
    assert len(calls) <= 2, trace.stderr
    process.stop()


def test_doctor(guest: GuestRunner) -> None:
    out = guest.lab.run([GUESTNET, "doctor"], ordinary=True)
    assert "/dev/net/tun" in out.stdout
