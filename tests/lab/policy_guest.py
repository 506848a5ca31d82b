"""A guest under a policy: a namespace whose only way out is a network of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import guestnet

from lab import need
from lab.namespaces import Lab, ip
from lab.process import Process

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = Path(guestnet.__file__).resolve().parents[1]
CLIENT = str(TESTS / "interop" / "clients" / "policy_network.py")


@dataclass
class Guest:
    """A namespace whose only way out is the network of `network`."""

    lab: Lab
    ns: str
    network: Process
    directory: Path

    def run(self, *command: str, stdin: str = "", seconds: float = 20) -> subprocess.CompletedProcess[str]:
        return self.lab.run(list(command), ns=self.ns, stdin=stdin, seconds=seconds)

    def curl(self, *args: str) -> tuple[int, str]:
        """The exit status of curl, and what it printed: the body, then the status of HTTP."""
        done = self.run("curl", "-sS", "-m", "15", "-w", "%{http_code}", *args)
        return done.returncode, done.stdout + done.stderr

    def tls(self, address: str, *args: str) -> str:
        command = ["timeout", "15", "openssl", "s_client", "-connect", f"{address}:443", *args]
        done = self.run(*command, stdin="GET / HTTP/1.0\r\n\r\n")
        return done.stdout + done.stderr

    def dig(self, *args: str) -> str:
        return self.run("dig", "+tries=1", "+time=3", *args).stdout

    def say(self, line: str, answer: str) -> str:
        before = len(self.network.lines)
        self.network.stdin.write(f"{line}\n".encode())
        self.network.stdin.flush()
        return self.network.wait_line(answer, start=before)[1]

    def denials(self) -> list[list[str | None]]:
        found: list[list[str | None]] = json.loads(self.say("denials", "^denials (.*)$"))
        return found

    def put_in_force(self, policy: str) -> int:
        path = self.directory / "other.toml"
        path.write_text(policy)
        return int(self.say(f"policy {path}", "^cut (.*)$"))


@contextmanager
def policy_guest(lab: Lab, directory: Path, policy: str, uplink: str) -> Iterator[Guest]:
    """Starts the network and connects the namespace; both end with the block."""
    file = directory / "policy.toml"
    file.write_text(policy)
    name = lab.add_namespace(f"{lab.host}-policy")
    network = lab.start(
        [sys.executable, CLIENT, name, str(file), uplink],
        env={"PYTHONPATH": f"{PACKAGE}:{TESTS}"},
        stdin=subprocess.PIPE,
    )
    try:
        ready = network.wait_line(r"^ready (\S+) (\S+)$")
        ip("-n", name, "link", "set", "eth0", "address", ready[2], "up")
        ip("-n", name, "address", "add", f"{ready[1]}/24", "dev", "eth0")
        ip("-n", name, "route", "add", "default", "via", "192.168.64.1")
        resolv = Path("/etc/netns") / name
        resolv.mkdir(parents=True, exist_ok=True)
        (resolv / "resolv.conf").write_text("nameserver 192.168.64.1\n")
        yield Guest(lab, name, network, directory)
    finally:
        network.stop()
        lab.remove_namespace(name)


def certificate(lab: Lab, directory: Path) -> tuple[str, str]:
    """The files of a certificate for the names of the outside, and of its key."""
    cert, key = str(directory / "cert.pem"), str(directory / "key.pem")
    names = "subjectAltName=DNS:www.example.test,DNS:second.example.test"
    request = [
        need.program("openssl"),
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=example.test",
    ]
    lab.check([*request, "-keyout", key, "-out", cert, "-addext", names])
    return cert, key
