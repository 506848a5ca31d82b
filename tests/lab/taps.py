"""A network in the host namespace whose guests are namespaces with a TAP each.

`python -m lab.taps WORKERS POLLING NS...` runs it; takes words on stdin: "stats" (frames and drops
by worker), "leave NAME" (that guest goes; they are vm0, vm1, ...).
`TapNetwork` starts it and sets the guests up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from lab.namespaces import Lab, ip
from lab.process import Process
from lab.tap import open_tap

TESTS = Path(__file__).resolve().parents[1]
GATEWAY = "192.168.64.1"


def address(n: int) -> str:
    """Of the guest with that number, from 0."""
    return f"192.168.64.{n + 10}"


class TapNetwork:
    """The running network and its guests' namespaces. Guest N's port 80 is published as 8080 + N."""

    def __init__(
        self, lab: Lab, tag: str, guests: int, *, workers: int = 1, polling: str = "adaptive"
    ) -> None:
        self.lab = lab
        self.ns = [lab.add_namespace(lab.host.replace("-host", f"-{tag}{n}")) for n in range(guests)]
        command = [sys.executable, "-m", "lab.taps", str(workers), polling, *self.ns]
        env = {"PYTHONPATH": str(TESTS)}
        self.process: Process = lab.start(command, stdin=subprocess.PIPE, ready="^ready$", env=env)
        for n, ns in enumerate(self.ns):
            ip("-n", ns, "address", "add", f"{address(n)}/24", "dev", "eth0")
            ip("-n", ns, "link", "set", "eth0", "up")
            ip("-n", ns, "route", "add", "default", "via", GATEWAY)
            lab.check(["ping", "-c", "1", "-W", "5", GATEWAY], ns=ns)

    def __enter__(self) -> TapNetwork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.stop()
        for ns in self.ns:
            self.lab.remove_namespace(ns)

    def tell(self, words: str) -> str:
        """Says something to the network; what it answers."""
        before = len(self.process.lines)
        self.process.stdin.write(f"{words}\n".encode())
        self.process.stdin.flush()
        return self.process.wait_line("^done (.*)$", start=before)[1]

    def stats(self) -> list[dict[str, Any]]:
        """Frames and drops of each worker."""
        found: list[dict[str, Any]] = json.loads(self.tell("stats"))
        return found


def main(workers: str, polling: str, *namespaces: str) -> None:
    from guestnet import NatConfig, NatNetwork

    taps = [open_tap(ns, "eth0") for ns in namespaces]
    with NatNetwork(NatConfig(workers=int(workers), polling=polling)) as network:
        for n, tap in enumerate(taps):
            network.create_endpoint(f"vm{n}", ip=address(n))
            network.attach(f"vm{n}", "tap", fd=tap)
            network.publish(f"{8080 + n}:vm{n}:80")
        print("ready", flush=True)
        serve(network, sys.stdin)


def serve(network: Any, lines: Iterable[str]) -> None:
    for line in lines:
        answer = ""
        match line.split():
            case ["stats"]:
                found = network.worker_stats()
                answer = json.dumps([{"rx_frames": s.rx_frames, "drops": dict(s.drops)} for s in found])
            case ["leave", name]:
                network.remove_endpoint(name)
        print(f"done {answer}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
