"""TCP connections through `guestnet run`: keep-alive both ways, vanished ends, connects with a small TTL."""

from __future__ import annotations

import sys
import textwrap

import pytest
from lab import Lab, Process, need, wait_until
from lab.namespaces import FAR4, OUT4, ip
from lab.runner import GUESTNET, GuestRunner

KEEP_ALIVE = """
import socket, struct, subprocess, time
def heard(s):  # segments
    return struct.unpack_from("=I", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 140)[0]
def keep_alive(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3)):
        s.setsockopt(socket.IPPROTO_TCP, option, value)
"""
HOLD = """
import socket
listener = socket.create_server(("", 7100), backlog=4096)
print("ready", flush=True)
held = []
while True:
    held.append(listener.accept()[0])
    held[-1].sendall(b"x")
"""
"""Takes connections, says one byte, and never closes."""


def script(text: str) -> list[str]:
    return [sys.executable, "-u", "-c", KEEP_ALIVE + textwrap.dedent(text)]


def run(lab: Lab, text: str) -> Process:
    """Starts a Python program in a guest of its own."""
    need.program(GUESTNET, "guestnet: run make build")
    return lab.start([GUESTNET, "run", "--", *script(text)], ordinary=True)


@pytest.fixture
def holder(own_lab: Lab) -> Lab:
    for ns in (own_lab.out, own_lab.far):
        own_lab.start(script(HOLD), ns=ns, ready="^ready$")
    return own_lab


def test_a_guests_keep_alive_finds_that_its_peer_is_gone(holder: Lab) -> None:
    guest = run(
        holder,
        f"""
        s = socket.create_connection(("{FAR4}", 7100), timeout=10)
        s.recv(1); keep_alive(s); s.settimeout(60); print("open")
        try: print(s.recv(1))
        except OSError as error: print("heard", error.errno)
        """,
    )
    guest.wait_line("^open$")
    ip("-n", holder.far, "link", "set", "up0", "down")
    assert guest.wait_line("^heard (.*)$", seconds=40)[1] == "110"


def test_a_guests_keep_alive_keeps_a_connection_whose_peer_answers(holder: Lab) -> None:
    """More probes than a guest would wait for: each of them has to be answered."""
    guest = run(
        holder,
        f"""
        s = socket.create_connection(("{OUT4}", 7100), timeout=10)
        s.recv(1); keep_alive(s)
        first, end = heard(s), time.monotonic() + 60
        while heard(s) < first + 4 and time.monotonic() < end: time.sleep(0.1)
        print("answers", heard(s) - first >= 4, s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        """,
    )
    assert guest.wait_line("^answers (.*)$", seconds=70)[1] == "True 0"


def test_a_guests_keep_alive_reaches_the_outside(own_lab: Lab) -> None:
    server = own_lab.start(
        script(
            """
            listener = socket.create_server(("", 7101)); print("ready", flush=True)
            s, _ = listener.accept(); s.sendall(b"x"); time.sleep(1)
            first, end = heard(s), time.monotonic() + 60
            while heard(s) < first + 3 and time.monotonic() < end: time.sleep(0.1)
            print("segments", heard(s) - first)
            """
        ),
        ns=own_lab.out,
        ready="^ready$",
    )
    run(
        own_lab,
        f"""
        s = socket.create_connection(("{OUT4}", 7101), timeout=10); s.recv(1); keep_alive(s); s.settimeout(70)
        s.recv(1)
        """,
    )
    assert server.wait_line("^segments (.*)$", seconds=70)[1] == "3"


def test_a_servers_keep_alive_finds_that_the_guest_has_forgotten(own_lab: Lab) -> None:
    server = own_lab.start(
        script(
            """
            listener = socket.create_server(("", 7102)); print("ready", flush=True)
            s, _ = listener.accept(); keep_alive(s); s.sendall(b"x"); s.settimeout(60)
            try: print("heard", s.recv(1))
            except OSError as error: print("heard", error.errno)
            """
        ),
        ns=own_lab.out,
        ready="^ready$",
    )
    run(
        own_lab,
        f"""
        s = socket.create_connection(("{OUT4}", 7102), timeout=10); s.recv(1)
        s.setsockopt(socket.IPPROTO_TCP, 19, 1); s.close()   # TCP_REPAIR: gone without a segment
        time.sleep(60)
        """,
    )
    assert server.wait_line("^heard (.*)$", seconds=40)[1] == "104"


def test_connections_that_the_guest_has_closed_and_forgotten_are_given_up(holder: Lab) -> None:
    """The server never closes its side. The guest then looks for the gateway anew, as after a reboot."""
    guest = run(
        holder,
        f"""
        for _ in range(50):
            s = socket.create_connection(("{OUT4}", 7100), timeout=10); s.recv(1)
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1); s.close()
        command = ["ss", "-Htn", "state", "connected", "exclude", "time-wait"]
        while subprocess.check_output(command): time.sleep(0.1)
        print("closed", flush=True)
        while True:
            subprocess.run(["ip", "neigh", "flush", "all"])
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("{OUT4}", 7))
            time.sleep(0.5)
        """,
    )
    command = ["ss", "-Htnp", "state", "connected", "exclude", "time-wait", "dport", "=", ":7100"]

    def sockets() -> int:
        """Those that guestnet holds; the kernel keeps what was closed for a minute more."""
        return holder.run(command, ns=holder.host).stdout.count("users:")

    guest.wait_line("^closed$", seconds=60)
    assert sockets() == 50
    # Without the question they would be asked about after a minute.
    wait_until(lambda: sockets() == 0, "guestnet to close its sockets", seconds=45, step=0.5)


def test_traceroute_with_tcp(guest: GuestRunner) -> None:
    command = ["traceroute", "-T", "-p", "9", "-n", "-q", "1", "-w", "3", "-m", "5", FAR4]
    lines = guest.check(command, ordinary=False).splitlines()[1:]
    assert [line.split()[1:] for line in lines if "!" in line] == [], lines
    assert [line.split()[1] for line in lines] == ["192.168.64.1", OUT4, FAR4]


@pytest.mark.parametrize(("ttl", "wanted"), [(1, 113), (2, 113), (3, 111), (64, 111)])
def test_a_connect_with_a_small_ttl_ends_where_the_ttl_does(
    guest: GuestRunner, ttl: int, wanted: int
) -> None:
    """Time exceeded is EHOSTUNREACH at once, as on the host; far enough, the destination refuses."""
    code = f"""
import socket
s = socket.socket(); s.settimeout(15); s.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, {ttl})
print(s.connect_ex(("{FAR4}", 9)))
"""
    assert guest.check(["python3", "-c", code]).strip() == str(wanted)


def test_an_urgent_byte_of_the_guest_is_urgent_outside(own_lab: Lab) -> None:
    server = own_lab.start(
        script(
            """
            listener = socket.create_server(("", 7103)); print("ready", flush=True)
            s, _ = listener.accept(); s.sendall(b"x")
            import select
            select.select([], [], [s], 30); print("urgent", s.recv(1, socket.MSG_OOB))
            data = b""
            while more := s.recv(100): data += more
            print("plain", data)
            """
        ),
        ns=own_lab.out,
        ready="^ready$",
    )
    run(
        own_lab,
        f"""
        s = socket.create_connection(("{OUT4}", 7103), timeout=10); s.recv(1)
        s.sendall(b"before"); s.send(b"!", socket.MSG_OOB); s.sendall(b"after"); s.close()
        """,
    )
    assert server.wait_line("^urgent (.*)$")[1] == "b'!'"
    assert server.wait_line("^plain (.*)$")[1] == "b'beforeafter'"


def test_an_urgent_byte_of_the_outside_is_urgent_for_the_guest(own_lab: Lab) -> None:
    own_lab.start(
        script(
            """
            listener = socket.create_server(("", 7104)); print("ready", flush=True)
            s, _ = listener.accept(); s.recv(1)
            s.sendall(b"before"); s.send(b"!", socket.MSG_OOB); s.sendall(b"after"); s.close()
            """
        ),
        ns=own_lab.out,
        ready="^ready$",
    )
    guest = run(
        own_lab,
        f"""
        import select
        s = socket.create_connection(("{OUT4}", 7104), timeout=10); s.sendall(b"x")
        select.select([], [], [s], 30); print("urgent", s.recv(1, socket.MSG_OOB))
        data = b""
        while more := s.recv(100): data += more
        print("plain", data)
        """,
    )
    assert guest.wait_line("^urgent (.*)$")[1] == "b'!'"
    assert guest.wait_line("^plain (.*)$")[1] == "b'beforeafter'"


def test_the_dscp_of_a_guest_is_seen_outside(own_lab: Lab) -> None:
    """Of datagrams all of the field, of TCP what the guest sets once it is connected."""
    seen = own_lab.start(
        script(
            """
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x800)); raw.settimeout(40)
            wanted = {(6, 0x48), (6, 0x20), (17, 0xb8), (17, 0x2)}
            print("ready", flush=True)
            while wanted: b = raw.recv(100); wanted.discard((b[9], b[1]))
            print("all seen")
            """
        ),
        ns=own_lab.out,
        ready="^ready$",
    )
    run(
        own_lab,
        f"""
        s = socket.socket(); s.settimeout(10); s.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x48)
        s.connect(("{OUT4}", 7)); s.sendall(b"a"); s.recv(1)
        s.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x20); s.sendall(b"b"); s.recv(1)
        u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for tos in (0xb8, 0x02):
            u.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos); u.sendto(b"x", ("{OUT4}", 7))
        """,
    )
    seen.wait_line("^all seen$", seconds=45)
