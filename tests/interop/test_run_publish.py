"""Published ports, reached from outside."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from lab import Process
from lab.namespaces import HOST4, OUT4
from lab.runner import GUESTNET, GuestRunner

CLIENTS = Path(__file__).parent / "clients"


def serve(guest: GuestRunner, proto: str, ports: str, *options: str) -> Process:
    return guest.start(
        [sys.executable, str(CLIENTS / "serve.py"), proto, *ports.split()], *options, ready="^ready$"
    )


def call(guest: GuestRunner, port: int, text: str, proto: str = "TCP", host: str = HOST4) -> str:
    done = guest.lab.run(["socat", "-t", "5", "-", f"{proto}:{host}:{port}"], ns=guest.lab.out, stdin=text)
    return done.stdout


def test_tcp(guest: GuestRunner) -> None:
    serve(guest, "tcp", "80", "-p", "8080:80")
    first, *rest = call(guest, 8080, "hello\n").splitlines()
    assert rest == ["hello", "goodbye"]
    assert first.split()[2] == "80"


def test_the_guest_sees_the_client(guest: GuestRunner) -> None:
    serve(guest, "tcp", "80", "-p", "8080:80")
    assert call(guest, 8080, "").split()[0] == OUT4


def test_udp(guest: GuestRunner) -> None:
    serve(guest, "udp", "5353", "-p", "5300:5353/udp")
    answer = call(guest, 5300, "ask", "UDP").split()
    assert answer[0] == OUT4
    assert answer[2] == "ask"


def test_many_calls_at_once(guest: GuestRunner) -> None:
    serve(guest, "tcp", "7", "-p", "7000:7")
    # serve.py says a line first, so ask through a client that reads it.
    script = f"""
import socket
socks = [socket.create_connection(("{HOST4}", 7000), timeout=20) for _ in range(300)]
for i, s in enumerate(socks):
    s.sendall(b"%04d" % i); s.shutdown(socket.SHUT_WR)
right = 0
for i, s in enumerate(socks):
    heard = b""
    while data := s.recv(4096):
        heard += data
    right += heard.splitlines()[1] == b"%04dgoodbye" % i
print(right)
"""
    assert guest.lab.check([sys.executable, "-c", script], ns=guest.lab.out, seconds=60) == "300\n"


def test_a_range(guest: GuestRunner) -> None:
    serve(guest, "tcp", "80 81 82", "-p", "9080-9082:80-82")
    assert [call(guest, 9080 + i, "").split()[2] for i in range(3)] == ["80", "81", "82"]


def test_one_host_address_only(guest: GuestRunner) -> None:
    serve(guest, "tcp", "80", "-p", f"{HOST4}:8081:80")
    assert call(guest, 8081, "x").endswith("goodbye\n")
    refused = guest.lab.run(["socat", "-", "TCP:127.0.0.1:8081"])
    assert "refused" in refused.stderr


def test_a_published_port_without_a_listener_in_the_guest_is_refused(guest: GuestRunner) -> None:
    """The client outside is told, and not left hanging."""
    guest.start(["sh", "-c", "echo up; exec sleep 60"], "-p", "8082:80", ready="^up$")
    done = guest.lab.run(["socat", "-t", "5", "-", f"TCP:{HOST4}:8082"], ns=guest.lab.out, stdin="hello")
    assert done.stdout == ""


def test_a_port_in_use_is_reported_before_the_guest_starts(guest: GuestRunner) -> None:
    taken = guest.lab.start([sys.executable, str(CLIENTS / "serve.py"), "tcp", "8083"], ready="^ready$")
    done = guest(["echo", "started"], "-p", "8083:80")
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert re.search(r"8083", done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    taken.stop()


@pytest.mark.parametrize("spec", ["x:80", "80:99999", "1-3:4-5", ":", "80:80/sctp"])
def test_a_bad_spec_is_one_sentence(guest: GuestRunner, spec: str) -> None:
    done = guest(["echo", "started"], "-p", spec)
    assert done.returncode == 2
    assert "started" not in done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_host_loopback_is_off_unless_asked_for(guest: GuestRunner) -> None:
    served = guest.lab.start([sys.executable, str(CLIENTS / "serve.py"), "tcp", "8084"], ready="^ready$")
    closed = guest(["socat", "-t", "3", "-", "TCP:192.168.64.254:8084,connect-timeout=3"], stdin="x")
    assert closed.returncode != 0
    assert "goodbye" not in closed.stdout
    for name in (
        "192.168.64.254",
        "host.guestnet.internal",
        "host.docker.internal",
        "host.containers.internal",
    ):
        done = guest(["socat", "-t", "5", "-", f"TCP4:{name}:8084"], "--host-loopback", stdin="x")
        assert done.stdout.endswith("goodbye\n"), (name, done.stderr)
    served.stop()


def test_help_has_an_example(guest: GuestRunner) -> None:
    for command in ("run", "vm", "up", "demo", "doctor"):
        out = guest.lab.check([GUESTNET, command, "--help"], ordinary=True)
        assert f"guestnet {command}" in out
