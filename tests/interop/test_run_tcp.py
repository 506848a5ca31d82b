"""TCP through `guestnet run`: many at once, half-closed, refused, reset, unreachable, stalled."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from lab.namespaces import BLACKHOLE4, FAR_UNREACHABLE4, OUT4, UNREACHABLE4
from lab.runner import GuestRunner

CLIENTS = Path(__file__).parent / "clients"

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)
    print("connected")
except OSError as error:
    print(type(error).__name__, error.errno)
"""


def connect(guest: GuestRunner, address: str, port: int) -> str:
    return guest.check(["python3", "-c", CONNECT, address, str(port)]).strip()


def test_two_thousand_at_once(guest: GuestRunner) -> None:
    out = guest.check(["python3", str(CLIENTS / "many.py"), OUT4, "7", "2000"], seconds=90)
    assert out.splitlines() == ["open 2000", "right 2000"]


def test_half_close_by_the_guest(guest: GuestRunner) -> None:
    """The server answers only after the guest's FIN."""
    sent = "0123456789" * 5000
    done = guest(["socat", "-t", "15", "-", f"TCP:{OUT4}:9007"], stdin=sent)
    assert done.stdout.split() == [str(len(sent)), hashlib.sha256(sent.encode()).hexdigest()], done.stderr


def test_half_close_by_the_server(guest: GuestRunner) -> None:
    """The server's FIN comes first; what the guest sends after it still arrives."""
    script = f"""
import socket
s = socket.create_connection(("{OUT4}", 9008), timeout=10)
heard = b""
while data := s.recv(100):
    heard += data
s.sendall(b"x" * 300000)
s.shutdown(socket.SHUT_WR)
print(heard)
"""
    assert guest.check(["python3", "-c", script]) == "b'bye\\n'\n"
    guest.lab.wait_output(["curl", "-sS", f"http://{OUT4}/read-after-bye"], "300000")


def test_refused(guest: GuestRunner) -> None:
    assert connect(guest, OUT4, 9) == "ConnectionRefusedError 111"


@pytest.mark.parametrize("address", [UNREACHABLE4, FAR_UNREACHABLE4])
def test_unreachable(guest: GuestRunner, address: str) -> None:
    assert connect(guest, address, 80) in ("OSError 113", "OSError 101")


def test_the_gateway_refuses_ports_without_a_service(guest: GuestRunner) -> None:
    assert connect(guest, "192.168.64.1", 81) == "ConnectionRefusedError 111"


def test_port_zero_is_refused(guest: GuestRunner) -> None:
    assert connect(guest, OUT4, 0) in ("ConnectionRefusedError 111", "TimeoutError None", "TimeoutError 110")
    assert connect(guest, OUT4, 80) == "connected"


def test_reset_is_passed_on(guest: GuestRunner) -> None:
    script = f"""
import socket
s = socket.create_connection(("{OUT4}", 9009), timeout=10)
s.sendall(b"x")
try:
    print(s.recv(10))
except ConnectionResetError:
    print("reset")
"""
    assert guest.check(["python3", "-c", script]) == "reset\n"


def test_stalled_connects_do_not_block_other_connections(guest: GuestRunner) -> None:
    """200 connects that nobody answers are under way; another one is not slowed by them."""
    script = f"""
import socket, time
stalled = []
for i in range(200):
    s = socket.socket(); s.setblocking(False); s.connect_ex(("{BLACKHOLE4}", 80)); stalled.append(s)
s = socket.create_connection(("{OUT4}", 80), timeout=5)
s.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
print(s.recv(15).decode().split()[1])
"""
    assert guest.check(["python3", "-c", script]) == "200\n"


def test_udp_echo_and_its_sizes(guest: GuestRunner) -> None:
    client = str(CLIENTS / "udp.py")
    assert guest.check(["python3", client, OUT4, "7", "200"]) == f"answered 200 from {OUT4}\n"
    assert guest.check(["python3", client, OUT4, "7", "20", "1472"]) == f"answered 20 from {OUT4}\n"
    # Fragments both ways.
    assert guest.check(["python3", client, OUT4, "7", "20", "9000"]) == f"answered 20 from {OUT4}\n"
