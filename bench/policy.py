#!/usr/bin/env python3
"""What rules cost: connections a second and TCP throughput of one guest, with none, 10 and 10,000 rules.

`guestnet run` leads to a server in another namespace that this script makes, and nothing leaves the machine.
Each round runs every case once, in turn; medians are printed.

    sudo bench/policy.py [--rounds 5] [--seconds 3]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests")]

from guestnet import Policy, Rule  # noqa: E402
from lab import Lab, need  # noqa: E402
from lab.namespaces import OUT4  # noqa: E402

GUESTNET = str(Path(sys.prefix) / "bin" / "guestnet")
CONNECTS = """
import socket, sys, time
end, count = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    with socket.create_connection((sys.argv[1], 80), 10):
        count += 1
print(count / float(sys.argv[2]))
"""


def many(count: int) -> list[Rule]:
    """Half prefixes and half names, none of which the traffic matches; then the rule that allows it."""
    half = count // 2
    nets = [Rule("deny", f"10.{n >> 8 & 255}.{n & 255}.0/24") for n in range(half)]
    names = [Rule("allow", f"n{n}.example") for n in range(count - half - 1)]
    return [*nets, *names, Rule("allow", OUT4)]


def cases(directory: Path) -> dict[str, list[str]]:
    """Options by the name of the case."""
    found: dict[str, list[str]] = {"no policy": []}
    policies = {
        "10 rules": Policy("deny", many(10)),
        "10,000 rules": Policy("deny", many(10_000)),
        "by name, every request read": Policy("deny", [Rule("allow", "www.example.test")]),
    }
    for name, policy in policies.items():
        path = directory / f"{name.split()[0].replace(',', '')}.toml"
        policy.save(path)
        path.chmod(0o644)
        found[name] = ["--policy", str(path)]
    return found


def measure(lab: Lab, options: list[str], host: str, seconds: float) -> tuple[float, float]:
    """Connections a second, and Gbit/s of a download."""

    def run(*command: str) -> str:
        full = [GUESTNET, "run", "--quiet", *options, "--", *command]
        done = lab.run(full, ordinary=True, seconds=seconds + 60)
        if done.returncode:
            raise SystemExit(f"{' '.join(full)}: {done.stderr}")
        return done.stdout

    connects = float(run(sys.executable, "-c", CONNECTS, host, str(seconds)))
    speed = float(run("curl", "-sS", "-o", "/dev/null", "-w", "%{speed_download}", f"http://{host}/blob"))
    return connects, speed * 8 / 1e9


def main() -> int:
    """Runs the rounds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    need.root()
    need.program("curl")
    with tempfile.TemporaryDirectory(prefix="gn-policy-") as name, Lab() as lab:
        directory = Path(name)
        directory.chmod(0o755)
        blob = directory / "blob"
        with blob.open("wb") as file:
            file.truncate(1 << 30)
        server = [sys.executable, "-m", "lab.servers", str(blob)]
        lab.start(server, ns=lab.out, env={"PYTHONPATH": str(ROOT / "tests")}, ready="ready")
        results: dict[str, list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            for case, words in cases(directory).items():
                # A policy without rules about names leaves no name to ask for.
                host = "www.example.test" if case.startswith("by name") else OUT4
                results.setdefault(case, []).append(measure(lab, words, host, options.seconds))
    base = [statistics.median(column) for column in zip(*results["no policy"], strict=True)]
    print("| rules | connections/s | of none | download Gbit/s | of none |")
    print("|---|---|---|---|---|")
    for case, rounds in results.items():
        connects, speed = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(
            f"| {case} | {connects:,.0f} | {connects / base[0]:.2f} | {speed:.1f} | {speed / base[1]:.2f} |"
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.TimeoutExpired as error:
        sys.exit(str(error))
