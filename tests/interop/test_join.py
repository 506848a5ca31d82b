"""Guests that join a running network, and namespaces that somebody else made."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, Process, wait_until
from lab.namespaces import HOST4, OUT4, ip
from lab.runner import GUESTNET

Start = Callable[..., Process]
NAME = "joined"


@pytest.fixture
def network(guestnet: Start) -> Process:
    return guestnet("up", "--name", NAME, "--json", ready='"event": "ready"')


@pytest.fixture
def namespace(lab: Lab) -> Iterator[Callable[..., Process]]:
    """Starts a process in user and network namespaces of its own, as a rootless container has them."""
    started: list[Process] = []

    def start(*command: str) -> Process:
        script = "echo in-namespace; exec " + " ".join(command or ("sleep", "300"))
        full = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", script]
        started.append(lab.start(full, ordinary=True, ready="in-namespace"))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def pid_in_namespace(process: Process) -> int:
    """The process that `unshare` became; the doors of an ordinary user are ways through other programs."""
    pid = process.pid
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


def inside(lab: Lab, pid: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the namespaces of a process, as their root."""
    return lab.run(["nsenter", f"--target={pid}", "--user", "--net", "--", *command])


def joined(lab: Lab, *options: str) -> subprocess.CompletedProcess[str]:
    return lab.run([GUESTNET, "join", *options], ordinary=True)


def run_joined(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    return lab.run([GUESTNET, "run", "--network", NAME, *words], ordinary=True)


def test_commands_and_namespaces_share_a_network(
    lab: Lab, network: Process, namespace: Callable[..., Process]
) -> None:
    pid = pid_in_namespace(namespace())
    done = joined(lab, NAME, "--pid", str(pid), "--id", "web", "-p", "8095:80")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["web", "192.168.64.2"]

    page = f"http://{OUT4}/"
    assert inside(lab, pid, "curl", "-sS", "-m", "20", page).returncode == 0
    server = lab.start(
        ["nsenter", f"--target={pid}", "--user", "--net", "--", "python3", "-u", "-m", "http.server", "80"],
        ready="Serving",
    )
    by_name = run_joined(lab, "--", "curl", "-sS", "-m", "20", "http://web.guestnet.internal/")
    assert (by_name.returncode, by_name.stderr) == (0, "")
    assert "Directory listing" in by_name.stdout
    assert "Directory listing" in lab.check(["curl", "-sS", "-m", "20", f"http://{HOST4}:8095/"], ns=lab.out)
    out = run_joined(lab, "--id", "client", "--", "curl", "-sS", "-m", "20", page)
    assert (out.returncode, out.stderr) == (0, "")
    server.stop()
    assert network.running


def test_a_guest_leaves_with_its_command_or_its_namespace(
    lab: Lab, network: Process, namespace: Callable[..., Process]
) -> None:
    # The same id and port are free again each time.
    for _ in range(2):
        done = run_joined(lab, "--id", "one", "-p", "8096:80", "--", "true")
        assert (done.returncode, done.stderr) == (0, "")
    for _ in range(2):
        process = namespace()
        done = joined(lab, NAME, "--pid", str(pid_in_namespace(process)), "--id", "one", "-p", "8096:80")
        assert (done.returncode, done.stderr) == (0, "")
        seen = len(network.lines)
        process.stop()
        network.wait_line('"guest_down".*"one"', start=seen)
        wait_until(lambda: not_published(lab), "the published port to be closed")


def not_published(lab: Lab) -> bool:
    return "8096" not in lab.check(["ss", "-Hltn", "sport", "=", ":8096"])


def test_status_and_signals_of_a_joined_command(lab: Lab, network: Process) -> None:
    assert run_joined(lab, "--", "sh", "-c", "exit 7").returncode == 7
    assert run_joined(lab, "--", "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM
    assert run_joined(lab, "--", "there-is-no-such-command").returncode == 127


_SINK = """
import socket
listener = socket.create_server(("", 9123))
print("listening")
got, connection = 0, listener.accept()[0]
while data := connection.recv(65536):
    got += len(data)
print(got)
"""
_SEND = f"""
import socket
sock = socket.create_connection(({OUT4!r}, 9123))
sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
sock.sendall(bytes(3000000))
"""


def test_what_a_command_wrote_before_it_ended_arrives(lab: Lab, network: Process) -> None:
    sink = lab.start(["python3", "-u", "-c", _SINK], ns=lab.out, ready="listening")
    done = run_joined(lab, "--", "python3", "-c", _SEND)
    assert (done.returncode, done.stderr) == (0, "")
    sink.wait_line("^3000000$")


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["run", "--network", "nothing", "--", "true"], 125, "No network 'nothing' runs"),
        (["run", "--network", NAME, "--subnet", "10.0.0.0/24", "--", "true"], 2, "--subnet is a setting"),
        (["run", "--network", "a b", "--", "true"], 2, "network name 'a b'"),
        (["run", "--id", "x", "--", "true"], 2, "add --network"),
        (["join", NAME], 2, "Say which namespace"),
        (["join", NAME, "--pid", "1", "--netns", "/x"], 2, "Say which namespace"),
        (["join", NAME, "--netns", "/nowhere"], 125, "There is no namespace '/nowhere'"),
        (["join", NAME, "--netns", "/proc/self/ns/uts"], 125, "is not a network namespace"),
        (["join", NAME, "--netns", "/etc/passwd"], 125, "is not a network namespace"),
        (["join", NAME, "--pid", "4194303"], 125, "There is no process 4194303"),
        (["join", NAME, "--pid", "1"], 125, "be the user that made it, or root"),
        (["join", NAME, "--pid", "self"], 2, "--pid 'self' is not between"),
        (["join", NAME, "--pid", "1", "--interface", "a/b"], 2, "--interface 'a/b'"),
        (["join", NAME, "--pid", "1", "--mtu", "9000"], 2, "--mtu is a setting"),
        (["up", "--name", NAME], 125, "Another process serves"),
        (["up", "--name", "../x"], 2, "network name '../x'"),
    ],
)
def test_what_cannot_be_says_why(
    lab: Lab, network: Process, words: list[str], status: int, text: str
) -> None:
    done = lab.run([GUESTNET, *words], ordinary=True)
    assert done.returncode == status, done.stderr
    assert text in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert network.running


def test_a_taken_interface_id_or_port_takes_nothing(
    lab: Lab, network: Process, namespace: Callable[..., Process]
) -> None:
    first, second = pid_in_namespace(namespace()), pid_in_namespace(namespace())
    assert joined(lab, NAME, "--pid", str(first), "--id", "one", "-p", "8097:80").returncode == 0
    again = joined(lab, NAME, "--pid", str(first))
    assert again.returncode == 125
    assert "choose another with --interface" in again.stderr
    same = joined(lab, NAME, "--pid", str(second), "--id", "one")
    assert (same.returncode, "endpoint 'one' already" in same.stderr) == (125, True)
    port = joined(lab, NAME, "--pid", str(second), "-p", "8097:80")
    assert (port.returncode, "8097" in port.stderr) == (125, True)
    # Nothing of the refused guests stayed, in the namespace either.
    assert "eth0" not in inside(lab, second, "ip", "link").stdout
    fine = joined(lab, NAME, "--pid", str(second), "--id", "two", "--interface", "tap0")
    assert (fine.returncode, fine.stderr) == (0, "")
    assert inside(lab, second, "ping", "-c", "1", "-W", "5", "192.168.64.1").returncode == 0


def test_a_namespace_is_served_without_a_network(
    lab: Lab, guestnet: Start, namespace: Callable[..., Process]
) -> None:
    process = namespace()
    pid = pid_in_namespace(process)
    server = guestnet("join", "--pid", str(pid), "-v", "-p", "8098:80", ready="the guest in process")
    assert inside(lab, pid, "curl", "-sS", "-m", "20", f"http://{OUT4}/").returncode == 0
    process.stop()
    assert server.wait() == 0


def test_a_signal_ends_the_server_of_a_namespace(
    lab: Lab, guestnet: Start, namespace: Callable[..., Process]
) -> None:
    pid = pid_in_namespace(namespace())
    server = guestnet("join", "--pid", str(pid), "-v", ready="the guest in process")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "eth0" not in inside(lab, pid, "ip", "link").stdout


def test_a_named_namespace_joins_as_root(lab: Lab, guestnet: Start) -> None:
    name = f"{lab.host}-blue"
    ip("netns", "add", name)
    try:
        network = guestnet("up", "--name", "blue", "-v", ordinary=False, ready="is up")
        command = [GUESTNET, "join", "blue", "--netns", f"/run/netns/{name}"]
        done = lab.run(command)
        assert (done.returncode, done.stderr) == (0, "")
        assert lab.run(["curl", "-sS", "-m", "20", f"http://{OUT4}/"], ns=name).returncode == 0
        # Nobody else joins the network of root.
        assert lab.run([*command, "--interface", "eth1"], ordinary=True).returncode == 125
        assert network.running
    finally:
        ip("netns", "del", name)
    network.wait_line("vm1 left")
