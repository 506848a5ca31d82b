"""Ports that guests open themselves: a client outside reaches them while they are mapped, by both uplinks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, Process, need, wait_until
from lab.namespaces import HOST4, OUT4, ip
from lab.runner import GuestRunner

CLIENTS = Path(__file__).parent / "clients"
EXTERNAL = "192.0.2.78"
PORTS = range(40000, 40010)
GATEWAY = "192.168.64.1"


def tell(process: Process, line: str, answer: str) -> re.Match[str]:
    seen = len(process.lines)
    process.stdin.write(f"{line}\n".encode())
    process.stdin.flush()
    return process.wait_line(answer, start=seen)


def call(lab: Lab, protocol: str, host: str, port: int) -> subprocess.CompletedProcess[str]:
    limit = ",connect-timeout=3" if protocol == "tcp" else ""
    command = ["socat", "-t", "3", "-", f"{protocol.upper()}:{host}:{port}{limit}"]
    return lab.run(command, ns=lab.out, stdin="hello")


def assert_closed(lab: Lab, protocol: str, host: str, port: int) -> None:
    """By sockets the host refuses; the packet engine is silent about what nobody asked for."""
    done = call(lab, protocol, host, port)
    assert done.stdout == ""
    assert host != HOST4 or "refused" in done.stderr, done.stderr


@pytest.fixture
def tun() -> Iterator[tuple[GuestRunner, list[str]]]:
    """A lab whose outside has a route to the external address."""
    need.root()
    need.tun()
    with Lab() as lab:
        ip("-n", lab.out, "route", "add", f"{EXTERNAL}/32", "via", HOST4)
        yield GuestRunner(lab, "guestnet"), ["--uplink", "tun", "--external", EXTERNAL, "--forwarding"]


def served(guest: GuestRunner, command: list[str], *options: str, ordinary: bool = True) -> Process:
    process = guest.start(
        command, "--pcp", f"{PORTS[0]}-{PORTS[-1]}", *options, ordinary=ordinary, stdin=subprocess.PIPE
    )
    return process


def reached_while_it_is_mapped(
    guest: GuestRunner, protocol: str, address: str, *options: str, ordinary: bool = True
) -> None:
    command = [sys.executable, str(CLIENTS / "map_port.py"), protocol, "8000", GATEWAY]
    process = served(guest, command, *options, ordinary=ordinary)
    result, external, port, lifetime = process.wait_line(r"^mapped (\d+) (\S+) (\d+) (\d+)$").groups()
    assert (result, external, lifetime) == ("0", address, "3600")
    assert int(port) in PORTS
    assert call(guest.lab, protocol, address, int(port)).stdout == OUT4
    assert tell(process, "delete", r"^deleted (\d+)$")[1] == "0"
    assert_closed(guest.lab, protocol, address, int(port))
    # And once more, until the guest ends.
    again = tell(process, "map", r"^mapped 0 \S+ (\d+)")[1]
    assert call(guest.lab, protocol, address, int(again)).stdout == OUT4
    process.stdin.close()
    process.wait()
    assert_closed(guest.lab, protocol, address, int(again))


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_by_sockets(guest: GuestRunner, protocol: str) -> None:
    reached_while_it_is_mapped(guest, protocol, HOST4)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_by_tun(tun: tuple[GuestRunner, list[str]], protocol: str) -> None:
    guest, options = tun
    reached_while_it_is_mapped(guest, protocol, EXTERNAL, *options, ordinary=False)


NATPMPC = """
{python} {serve} tcp 80 >/dev/null &
natpmpc
natpmpc -a 40007 80 tcp 3600
echo asked
read line
natpmpc -a 0 80 tcp 0
echo deleted
read line
kill $!
"""


@pytest.mark.parametrize("uplink", ["sockets", "tun"])
def test_natpmpc(uplink: str, request: pytest.FixtureRequest) -> None:
    """A client that was written by others."""
    need.program("natpmpc")
    if uplink == "tun":
        guest, options = request.getfixturevalue("tun")
        address = EXTERNAL
    else:
        guest, options, address = request.getfixturevalue("guest"), [], HOST4
    script = NATPMPC.format(python=sys.executable, serve=CLIENTS / "serve.py")
    process = served(guest, ["sh", "-c", script], *options, ordinary=uplink == "sockets")
    process.wait_line("^asked$")
    assert f"Public IP address : {address}" in process.output
    assert re.search(r"Mapped public port 40007 protocol TCP to local port 80 liftime 3600", process.output)
    wait_until(
        lambda: call(guest.lab, "tcp", address, 40007).stdout.endswith("hellogoodbye\n"), "the guest's server"
    )
    tell(process, "", "^deleted$")
    assert re.search(r"Mapped public port 0 protocol TCP to local port 80 liftime 0", process.output)
    assert_closed(guest.lab, "tcp", address, 40007)
    process.stdin.close()
    process.wait()


def test_pcp_is_not_served_by_default(guest: GuestRunner) -> None:
    need.program("natpmpc")
    done = guest(["sh", "-c", "timeout 1 natpmpc; echo ended"])
    assert "Public IP address" not in done.stdout
    assert "ended" in done.stdout


def test_a_wrong_mode_is_one_sentence(guest: GuestRunner) -> None:
    done = guest(["echo", "started"], "--pcp", "40000-40009", "--mode", "host_only")
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
