#!/usr/bin/env python3
"""dns.py [--rounds N] [--seconds S] [COMMAND ...]: DNS queries a second of a guest, by UDP and TCP.

Each COMMAND is a guestnet to measure (the one of this checkout by default); several are measured in turns, so
that a slow moment of the machine affects all of them. dnsperf runs in the guest and asks for one record of
the network. A cell is the median with [lowest highest] of the rounds. No packet leaves the guest.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME, ADDRESS, GATEWAY = "web.example", "192.0.2.7", "192.168.64.1"
ROWS = {
    "UDP, one name": ("-m", "udp"),
    "TCP, one name, 8 connections": ("-m", "tcp"),
    "TCP, one name, 1 connection": ("-m", "tcp", "-c", "1", "-q", "100"),
}
"""With few queries at a time dnsperf itself waits for most of the time."""


def measure(guestnet: str, words: tuple[str, ...], seconds: float, queries: Path) -> float:
    """Queries a second that were answered."""
    guest = [guestnet, "run", "--quiet", "--dns-record", f"{NAME}={ADDRESS}", "--"]
    perf = ["dnsperf", "-s", GATEWAY, "-d", str(queries), "-l", str(seconds), "-T", "1"]
    if "-c" not in words:
        perf += ["-c", "8", "-q", "200"]
    done = subprocess.run(
        [*guest, *perf, *words], capture_output=True, text=True, timeout=seconds + 60, check=False
    )
    found = re.search(r"Queries per second:\s+([\d.]+)", done.stdout)
    lost = re.search(r"Queries lost:\s+(\d+)", done.stdout)
    if found is None or lost is None:
        raise SystemExit(f"dnsperf did not run: {done.stderr or done.stdout}")
    if int(lost[1]):
        print(f"  {guestnet} {' '.join(words)}: {lost[1]} queries were lost", file=sys.stderr)
    return float(found[1])


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("commands", nargs="*", default=[str(ROOT / ".venv/bin/guestnet")])
    options = parser.parse_args()
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory:
        queries = Path(directory, "queries")
        queries.write_text(f"{NAME} A\n")
        queries.chmod(0o644)
        Path(directory).chmod(0o755)
        for _ in range(options.rounds):
            for row, words in ROWS.items():
                for command in options.commands:
                    cells[row, command].append(measure(command, words, options.seconds, queries))
    print("| queries a second | " + " | ".join(options.commands) + " |")
    print("|---|" + "---|" * len(options.commands))
    for row in ROWS:
        values = (cells[row, command] for command in options.commands)
        texts = [f"{statistics.median(v):.0f} [{min(v):.0f} {max(v):.0f}]" for v in values]
        print(f"| {row} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
