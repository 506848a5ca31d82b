#!/usr/bin/env python3
"""Races guestnet with its peers over the same two namespaces and prints one table.

Rounds alternate between the contenders, so a slow moment of the machine hits all of them; a cell is the
median of the rounds with [lowest highest]. Needs root, for the namespaces; the contenders themselves run as
an ordinary user.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from contenders import Contender, all_present  # noqa: E402 - the path above makes them importable
from lab import Lab, Process  # noqa: E402
from lab.namespaces import OUT4, sweep  # noqa: E402
from lab.process import Timeout  # noqa: E402

HERE = ROOT / "bench"
IDLE_CONNECTIONS = 1000


class Failed(Exception):
    """A contender could not do it; the message says what was seen."""


@dataclass(frozen=True)
class Arena:
    """The namespaces, and how long one measurement takes."""

    lab: Lab
    seconds: int

    def run(self, contender: Contender, command: list[str], seconds: float = 60) -> str:
        try:
            done = self.lab.run(contender.wrap(command), ns=contender.ns, ordinary=True, seconds=seconds)
        except Timeout as error:
            raise Failed(str(error)[-200:]) from error
        if done.returncode != 0:
            raise Failed((done.stderr.strip() or done.stdout.strip())[-200:])
        return done.stdout

    def start(self, contender: Contender, command: list[str]) -> Process:
        return self.lab.start(contender.wrap(command), ns=contender.ns, ordinary=True, stdin=subprocess.PIPE)


def iperf3(*words: str) -> Callable[[Arena, Contender], float]:
    """Gbit/s that arrived."""

    def measure(arena: Arena, contender: Contender) -> float:
        command = ["iperf3", "-J", "-c", OUT4, "-t", str(arena.seconds), *words]
        end = json.loads(arena.run(contender, command))["end"]
        if "-u" not in words:
            return float(end["sum_received"]["bits_per_second"]) / 1e9
        total = end["sum"]
        return float(total["bits_per_second"]) * (1 - total["lost_percent"] / 100) / 1e9

    return measure


def latency(arena: Arena, contender: Contender) -> float:
    """Microseconds for a byte there and back."""
    return float(arena.run(contender, [sys.executable, str(HERE / "latency.py"), OUT4, "9100", "3000"]))


def ab(*words: str) -> Callable[[Arena, Contender], float]:
    """Requests per second."""

    def measure(arena: Arena, contender: Contender) -> float:
        out = arena.run(contender, ["ab", "-q", "-c", "32", *words, f"http://{OUT4}:9180/"])
        found = re.search(r"Requests per second:\s+([\d.]+)", out)
        bad = re.search(r"Failed requests:\s+([1-9]\d*)", out)
        if not found or bad:
            raise Failed(out[-200:])
        return float(found[1])

    return measure


def startup(arena: Arena, contender: Contender) -> float:
    """Milliseconds for a command that does nothing; the entry into the namespace itself taken off."""

    def timed(command: list[str]) -> float:
        start = time.monotonic()
        done = arena.lab.run(command, ns=contender.ns, ordinary=True)
        if done.returncode != 0:
            raise Failed(done.stderr[-200:])
        return (time.monotonic() - start) * 1000

    return max(timed(contender.wrap(["true"])) - timed(["true"]), 0.0)


def resident(pids: list[int]) -> float:
    """Kilobytes, shared pages counted by their share."""
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        total += int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1])  # type: ignore[index]
    return float(total)


def serving(contender: Contender, top: int) -> list[int]:
    """The contender's own processes: those of its name, from `top` down."""
    out = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [row.split(None, 3) for row in out.splitlines()]
    family = {str(top)}
    for _ in range(4):
        family |= {pid for pid, parent, *_ in rows if parent in family}
    # The program itself, or the script that an interpreter runs.
    named = [(pid, {os.path.basename(word) for word in " ".join(args).split()[:2]}) for pid, _, *args in rows]
    return [int(pid) for pid, words in named if pid in family and contender.process in words]


def memory(arena: Arena, contender: Contender) -> tuple[float, float]:
    """Megabytes with one guest, and bytes for each idle connection that it relays."""
    command = [sys.executable, str(HERE / "idle.py"), OUT4, "9100", str(IDLE_CONNECTIONS)]
    process = arena.start(contender, command)
    try:
        process.wait_line("^0$")
        pids = serving(contender, process.pid)
        before = resident(pids)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.wait_line("^open$", 60)
        after = resident(pids)
    except (Timeout, OSError) as error:
        raise Failed(str(error)[-200:]) from error
    finally:
        process.stop()
    return before / 1024, (after - before) * 1024 / IDLE_CONNECTIONS


@dataclass(frozen=True)
class Event:
    """One row of the table."""

    name: str
    unit: str
    measure: Callable[[Arena, Contender], float]
    more_is_better: bool = True
    digits: int = 2


def events(quick_requests: int) -> list[Event]:
    n = str(quick_requests)
    return [
        Event("TCP up, 1 stream", "Gbit/s", iperf3()),
        Event("TCP down, 1 stream", "Gbit/s", iperf3("-R")),
        Event("TCP up, 4 streams", "Gbit/s", iperf3("-P", "4")),
        Event("TCP down, 4 streams", "Gbit/s", iperf3("-P", "4", "-R")),
        Event("UDP 1400 up, arrived", "Gbit/s", iperf3("-u", "-b", "0", "-l", "1400")),
        Event("UDP 1400 down, arrived", "Gbit/s", iperf3("-u", "-b", "0", "-l", "1400", "-R")),
        Event("TCP round trip", "us", latency, more_is_better=False, digits=0),
        Event("connections", "1/s", ab("-n", n), digits=0),
        Event("keep-alive requests", "1/s", ab("-k", "-n", str(4 * quick_requests)), digits=0),
        Event("start to finish of `true`", "ms", startup, more_is_better=False, digits=0),
    ]


Results = dict[str, dict[str, list[float]]]


def race(arena: Arena, racers: list[Contender], rows: list[Event], rounds: int) -> Results:
    results: Results = {e.name: {c.name: [] for c in racers} for e in rows}
    for number in range(rounds):
        for event in rows:
            for contender in racers:
                try:
                    value = event.measure(arena, contender)
                except (Failed, json.JSONDecodeError, KeyError, ValueError) as error:
                    print(f"  {event.name}, {contender.name}: {error}", file=sys.stderr)
                    continue
                results[event.name][contender.name].append(value)
                print(
                    f"  round {number + 1}, {event.name}, {contender.name}: {value:.2f} {event.unit}",
                    file=sys.stderr,
                )
    return results


def cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.{digits}f} {max(values):.{digits}f}]"


def ratio(event: Event, results: Results, own: str, peer: str) -> str:
    """How many times better guestnet is; under 1.00 it is worse."""
    a, b = results[event.name].get(own), results[event.name].get(peer)
    if not a or not b or not statistics.median(a) or not statistics.median(b):
        return "-"
    value = statistics.median(a) / statistics.median(b)
    return f"{value if event.more_is_better else 1 / value:.2f}"


def table(racers: list[Contender], rows: list[Event], results: Results) -> str:
    names = [c.name for c in racers]
    own = "guestnet 1500"
    peers = [n for n in names if own in names and n.startswith(("kernel", "pasta"))]
    head = ["", "unit", *names, *(f"guestnet 1500 : {p}" for p in peers)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for e in rows:
        cells = [cell(results[e.name].get(n, []), e.digits) for n in names]
        ratios = [ratio(e, results, own, p) for p in peers]
        lines.append("| " + " | ".join([e.name, e.unit, *cells, *ratios]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs each event (3)")
    parser.add_argument("--seconds", type=int, default=2, help="how long one throughput run takes (2)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="contenders with this in the name"
    )
    parser.add_argument(
        "--event", action="append", default=[], metavar="WORD", help="events with this in the name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("bench needs root, to make network namespaces: sudo make bench", file=sys.stderr)
        return 1
    sweep()
    with Lab() as lab:
        arena = Arena(lab, args.seconds)
        lab.start([sys.executable, str(HERE / "responder.py")], ns=lab.out, ready="^ready$")
        lab.start(["iperf3", "-s", "--forceflush"], ns=lab.out, ready="Server listening")
        racers = [c for c in all_present(lab) if not args.only or any(w in c.name for w in args.only)]
        rows = [e for e in events(2000) if not args.event or any(w in e.name for w in args.event)]
        results = race(arena, racers, rows, args.rounds)
        if not args.event or "memory" in args.event:
            small = Event("memory, one guest", "MB", startup, more_is_better=False, digits=1)
            each = Event("memory, idle connection", "bytes", startup, more_is_better=False, digits=0)
            rows += [small, each]
            results[small.name], results[each.name] = {}, {}
            for contender in (c for c in racers if c.process):
                try:
                    base, per = memory(arena, contender)
                except Failed as error:
                    print(f"  memory, {contender.name}: {error}", file=sys.stderr)
                    continue
                results[small.name][contender.name] = [base]
                results[each.name][contender.name] = [per]
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, {args.rounds} rounds\n"
    )
    print(table(racers, rows, results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
