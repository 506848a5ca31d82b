"""Flows leave the host from the address or the interface of `--source`, or not at all."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lab import Lab
from lab.namespaces import HOST4, OUT4, ip
from lab.runner import GUESTNET, GuestRunner

SOURCE4 = "203.0.113.9"
"""A second address of the host."""
PEER = f"curl -sS -m 10 http://{OUT4}/peer"
UDP = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(8)\n"
    f"s.connect(('{OUT4}', 7)); s.send(b'hello'); print(s.recv(9).decode())"
)
EVERY_PROTOCOL = f"{PEER} && ping -n -c 1 -W 5 {OUT4} && dig +short +time=4 +tries=2 www.example.test"


def everything(guest: GuestRunner, *options: str) -> tuple[str, str]:
    """What TCP, UDP, ping and DNS of a guest bring back: from ordinary datagrams, and the rest."""
    udp = guest.check(["python3", "-c", UDP], *options)
    return udp, guest.check(["sh", "-c", EVERY_PROTOCOL], *options)


def test_every_protocol_leaves_from_the_address(own_lab: Lab) -> None:
    """The outside has no way back to the host's first address."""
    ip("-n", own_lab.host, "address", "add", f"{SOURCE4}/24", "dev", "up0")
    ip("-n", own_lab.out, "route", "add", "blackhole", f"{HOST4}/32")
    guest = GuestRunner(own_lab, "guestnet")
    udp, rest = everything(guest, "--source", SOURCE4)
    assert udp == "hello\n"
    assert f':{SOURCE4}"' in rest
    assert "1 received" in rest
    assert rest.splitlines()[-1] == OUT4
    assert guest(["curl", "-s", "-m", "2", f"http://{OUT4}/peer"]).returncode != 0


def test_every_protocol_leaves_through_the_interface(own_lab: Lab) -> None:
    """The host's routes lead elsewhere."""
    own_lab.join(own_lab.host, "other0", own_lab.far, "other0")
    ip("-n", own_lab.host, "route", "add", f"{OUT4}/32", "dev", "other0", "src", HOST4)
    guest = GuestRunner(own_lab, "guestnet")
    udp, rest = everything(guest, "--source", "up0")
    assert udp == "hello\n"
    assert f':{HOST4}"' in rest
    assert "1 received" in rest
    assert rest.splitlines()[-1] == OUT4
    assert guest(["curl", "-s", "-m", "2", f"http://{OUT4}/peer"]).returncode != 0


def test_an_address_that_disappears_refuses_new_flows(own_lab: Lab) -> None:
    """The guest is told so at once, and no flow leaves from the other address."""
    ip("-n", own_lab.host, "address", "add", f"{SOURCE4}/24", "dev", "up0")
    udp = UDP.replace("print(s.recv(9).decode())", "s.recv(9)")
    script = f'{PEER}; echo; read go; {PEER}; echo tcp $?; python3 -c "{udp}"; echo udp $?'
    guest = GuestRunner(own_lab, "guestnet")
    process = guest.start(["sh", "-c", script], "--source", SOURCE4, stdin=subprocess.PIPE)
    assert SOURCE4 in process.wait_line(r"^\[").string
    ip("-n", own_lab.host, "address", "delete", f"{SOURCE4}/24", "dev", "up0")
    process.stdin.write(b"go\n")
    process.stdin.flush()
    process.wait()
    assert "Network is unreachable" in process.output or "Couldn't connect" in process.output
    assert "tcp 7" in process.output, process.output
    assert "udp 1" in process.output, process.output
    assert HOST4 not in process.output


@pytest.mark.parametrize(
    ("source", "what"),
    [("198.51.100.77", "an address"), ("2001:db8:99::1", "an address"), ("none0", "an interface")],
)
def test_what_the_host_has_not_is_refused_at_the_start(lab: Lab, source: str, what: str) -> None:
    done = lab.run([GUESTNET, "run", "--source", source, "--", "true"], ordinary=True)
    assert done.returncode == 2, done.stderr
    assert f"--source {source} is not {what} of this host" in done.stderr


def test_the_hosts_loopback_is_reached_as_ever(own_lab: Lab) -> None:
    """Connections to it do not leave the host, so they have its ordinary address."""
    ip("-n", own_lab.host, "address", "add", f"{SOURCE4}/24", "dev", "up0")
    server = (
        "import socket; s = socket.create_server(('127.0.0.1', 8099)); print('ready', flush=True)\n"
        "c, peer = s.accept(); c.sendall(peer[0].encode()); c.close()"
    )
    own_lab.start([sys.executable, "-c", server], ready="ready")
    client = (
        "import socket; c = socket.create_connection(('host.guestnet.internal', 8099), 9)\n"
        "print(c.recv(99).decode())"
    )
    guest = GuestRunner(own_lab, "guestnet")
    assert guest.check(["python3", "-c", client], "--source", SOURCE4, "--host-loopback") == "127.0.0.1\n"
