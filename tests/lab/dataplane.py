"""A guest on the data plane alone (crates/guestnet-io/examples/tap.rs): no Python, no services, only NAT."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lab.namespaces import OUT4, Lab, ip
from lab.process import Process

ROOT = Path(__file__).resolve().parents[2]
START = """
import os, sys
from lab.tap import open_tap
fd = open_tap(sys.argv[1], "eth0")
os.set_inheritable(fd, True)
os.execv(sys.argv[2], [sys.argv[2], str(fd), *sys.argv[3:]])
"""
_serial = 0


def program() -> Path:
    """The example, built as a release."""
    command = ["cargo", "build", "--quiet", "--release", "--locked", "-p", "guestnet-io", "--example", "tap"]
    subprocess.run(command, cwd=ROOT, check=True)
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "examples" / "tap"


def add_dataplane_guest(lab: Lab, *forwards: str, mtu: int = 1500) -> tuple[str, Process]:
    """A namespace whose only device is a TAP that the example serves from *host*; and the example."""
    global _serial  # noqa: PLW0603 - each has a name of its own
    _serial += 1
    name = lab.add_namespace(f"{lab.host}-d{_serial}")
    env = {"PYTHONPATH": str(ROOT / "tests"), "MTU": str(mtu)}
    command = [sys.executable, "-c", START, name, str(program()), *forwards]
    process = lab.start(command, env=env, stdin=subprocess.PIPE, ready="^ready$")
    ip("-n", name, "address", "add", "192.168.64.2/24", "dev", "eth0")
    # As the launcher of `guestnet run` has it.
    ip("-n", name, "link", "set", "eth0", "up", "mtu", str(mtu), "txqueuelen", "2000")
    ip("-n", name, "route", "add", "default", "via", "192.168.64.1")
    lab.sysctl(name, "net.ipv4.ping_group_range", "0 2147483647")
    lab.sysctl(name, "net.ipv4.ip_unprivileged_port_start", "0")
    directory = Path("/etc/netns") / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "resolv.conf").write_text(f"nameserver {OUT4}\n")
    return name, process
