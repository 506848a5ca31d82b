#!/usr/bin/env python3
"""Compares guestnet with its peers over the same two namespaces and prints one table.

Rounds alternate between the contenders, so a slow moment of the machine affects all of them. A cell is the
median of the rounds with the lowest and the highest. It needs root, for the namespaces; the contenders run as
an ordinary user.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

import contenders  # noqa: E402 - the path above makes them importable
import machines  # noqa: E402
import report  # noqa: E402
from contenders import Contender  # noqa: E402
from crowd import crowds  # noqa: E402
from guests import Arena, Failed, Guest  # noqa: E402
from lab import Lab  # noqa: E402
from lab.namespaces import sweep  # noqa: E402
from lab.process import Timeout  # noqa: E402
from results import Results, machine_description  # noqa: E402
from workloads import Setting, Workload, all_workloads  # noqa: E402

LOAD = "guestnet-load"


def build_load() -> Path:
    """The load program, linked statically so that it runs in the machines' tiny system too."""
    command = ["cargo", "rustc", "--quiet", "--release", "--locked", "-p", LOAD, "--", "-C"]
    subprocess.run([*command, "target-feature=+crt-static"], cwd=ROOT, check=True)
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / LOAD


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Race:
    """The guests that are up, and the rounds. A guest lives until it fails; then another takes its place."""

    def __init__(self, arena: Arena, results: Results, setting: Setting) -> None:
        self.arena, self.results, self.setting = arena, results, setting
        self.guests: dict[str, Guest] = {}

    def guest(self, contender: Contender) -> Guest:
        if contender.name not in self.guests:
            try:
                self.guests[contender.name] = contender.start(self.arena)
            except (Timeout, OSError, RuntimeError, AssertionError) as error:
                raise Failed(f"it does not start: {str(error)[-300:]}") from error
        return self.guests[contender.name]

    def end(self, contender: Contender) -> None:
        guest = self.guests.pop(contender.name, None)
        if guest is not None:
            try:
                guest.stop()
            except (Timeout, OSError) as error:
                say(f"  {contender.name}: {error}")

    def once(self, workload: Workload, contender: Contender, label: str) -> None:
        """One cell. Whatever fails costs this cell alone: the contender and the server start anew."""
        try:
            values = workload.measure(self.arena, self.guest(contender), self.setting)
        except (Failed, Timeout, OSError, RuntimeError, AssertionError, LookupError, ValueError) as error:
            why = str(error)[-300:] or type(error).__name__
            self.results.fail(contender.name, workload, why)
            say(f"  {label}{workload.id}, {contender.name}: FAILED: {why}")
            self.end(contender)
            self.renew_server()
            return
        for row in workload.rows:
            if row.id in values:
                self.results.add(contender.name, row.id, values[row.id])
        shown = ", ".join(f"{values[r.id]:.{r.digits}f} {r.unit}" for r in workload.rows if r.id in values)
        say(f"  {label}{workload.id}, {contender.name}: {shown}")
        if self.guest(contender).worn:
            self.end(contender)

    def renew_server(self) -> None:
        try:
            self.arena.renew_server()
        except (Timeout, OSError) as error:
            # The next cell fails too, and tries again.
            say(f"  the server outside does not start: {str(error)[-300:]}")

    def run(
        self,
        racers: Sequence[Contender],
        workloads: Sequence[Workload],
        rounds: int,
        until: float,
        least: int = 0,
    ) -> None:
        """`until`: by the monotonic clock. Nothing begins after it, and no round that would end after it, but
        for the first `least` rounds. What is measured once comes after those."""
        took = 0.0
        once = [w for w in workloads if w.once]
        try:
            for number in range(rounds):
                start = time.monotonic()
                if number >= least and start + took > until:
                    say(f"  no time for round {number + 1}: {number} of {rounds} were run")
                    break
                for workload in workloads:
                    if workload.once:
                        continue
                    if number >= least and time.monotonic() > until:
                        say(f"  no time for {workload.id}")
                        continue
                    # Who is first changes, so that nobody always follows the same neighbour.
                    turn = number % len(racers)
                    for contender in [*racers[turn:], *racers[:turn]]:
                        self.once(workload, contender, f"{number + 1}/{rounds} ")
                took = time.monotonic() - start
                if number + 1 == max(least, 1) or (number + 1 == rounds < least):
                    for workload, contender in [(w, c) for w in once for c in racers]:
                        self.once(workload, contender, "once ")
        finally:
            for contender in racers:
                self.end(contender)


def chosen(name: str, words: Sequence[str]) -> bool:
    return not words or any(word in name for word in words)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    add = parser.add_argument
    add("--full", action="store_true", help="more rounds, longer runs, more loads; some 40 minutes")
    add("--rounds", type=int, help="rounds (namespaces 3, machines 1; full: 7 and 5)")
    add("--seconds", type=float, help="one throughput run (0.5; full: 2)")
    add("--only", type=words, default=[], metavar="WORD,...", help="workloads with such a word in their id")
    add("--contenders", type=words, default=[], metavar="WORD,...", help="contenders with it in the name")
    add("--no-machines", action="store_true", help="namespaces alone")
    add("--no-namespaces", action="store_true", help="machines alone")
    add("--accel", default="tcg", help="QEMU's accelerator (tcg; kvm where it works)")
    add("--pasta", type=Path, metavar="PATH", help="another build of pasta (and passt beside it) races too")
    add("--install-gvproxy", action="store_true", help="`go install` gvproxy and its forwarder first")
    add("--add-to", type=Path, metavar="JSON", help="put the rows of --only into those of an earlier run")
    add("--list", action="store_true", help="name the workloads and end")
    add(
        "--output",
        type=Path,
        default=ROOT / "target" / "bench",
        metavar="DIR",
        help="for all that is written",
    )
    add(
        "--publish",
        action="store_true",
        help="write to docs/performance, and the short table and picture of README.md",
    )
    return parser.parse_args(argv)


NAMESPACES, CROWDS, MACHINES = 320.0, 420.0, 550.0
"""Seconds from the start after which the quick run begins nothing more of each: it is done in ten minutes."""
QUICK_LEAST = 2
"""Rounds of the quick run that are run in any case: one value is no median."""


def race(args: argparse.Namespace, results: Results) -> None:
    """All rounds; `results` fills as they go, so that an interrupted run still has a table."""
    full = args.full
    setting = Setting(args.seconds or (2.0 if full else 0.5), full)
    rounds = args.rounds or (7 if full else 3)
    load = build_load()
    start = time.monotonic()

    def until(seconds: float) -> float:
        return float("inf") if full else start + seconds

    with Lab() as lab:
        target = lab.dir / "load"
        shutil.copyfile(load, target)
        target.chmod(0o755)
        arena = Arena(lab, str(target), args.accel)
        arena.renew_server()
        newer = contenders.newer_pasta(args.pasta, lab.dir) if args.pasta else None
        gv = contenders.go_copies(arena, args.install_gvproxy)
        if gv is None:
            say("gvproxy is not here: --install-gvproxy installs it with Go")
        spaces = [] if args.no_namespaces else contenders.namespaces(newer, gv)
        racers = [c for c in spaces if chosen(c.name, args.contenders)]
        every = [w for w in all_workloads(full) if chosen(w.id, args.only)]
        results.want(racers, [w for w in every if w.namespace])
        if racers and every:
            first = [w for w in every if w.namespace]
            least = 0 if full else min(QUICK_LEAST, rounds)
            Race(arena, results, setting).run(racers, first, rounds, until(NAMESPACES), least)
        crowd = [w for w in crowds(full) if chosen(w.id, args.only)]
        if racers and crowd:
            results.want(racers, crowd)
            for workload in crowd:
                for contender in racers:
                    if time.monotonic() > until(CROWDS):
                        say(f"  no time for {workload.id}, {contender.name}")
                        continue
                    workload.run(arena, contender, setting, results, say)
        virtual = [w for w in every if w.machine]
        if not args.no_machines and virtual:
            boxes = [c for c in machines.machines(newer, gv) if chosen(c.name, args.contenders)]
            results.want(boxes, virtual)
            turns = args.rounds or (5 if full else 1)
            if boxes:
                Race(arena, results, setting).run(boxes, virtual, turns, until(MACHINES))


def _interrupt(number: int, _frame: object) -> None:
    # Once: a second signal must not end the cleaning.
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(f"signal {number}")


def main() -> int:
    args = arguments()
    if args.list:
        print("\n".join(w.id for w in [*all_workloads(args.full), *crowds(args.full)]))
        return 0
    if os.geteuid() != 0:
        print("bench needs root, to make network namespaces: sudo make bench", file=sys.stderr)
        return 1
    # What ends it ends it through the lab, which leaves nothing behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    sweep()
    # For 10,000 connections: pasta takes two descriptors for one. Containers may forbid more.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    if hard < 65536:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
    results = Results(
        machine_description(
            {
                "run": "full" if args.full else "quick",
                "date": time.strftime("%Y-%m-%d"),
                **contenders.versions(args.pasta),
            }
        )
    )
    if args.add_to:  # its description stays
        results = Results.from_plain(json.loads(args.add_to.read_text(encoding="utf-8")))
        every = [*all_workloads(args.full), *crowds(args.full)]
        again = [w for w in every if chosen(w.id, args.only)]
        for machine in (False, True):
            if not (args.no_machines if machine else args.no_namespaces):
                names = results.names(machine=machine)
                results.forget([n for n in names if chosen(n, args.contenders)], again)
    start = time.monotonic()
    status = 0
    try:
        race(args, results)
    except KeyboardInterrupt:
        say("interrupted: what follows is what was measured so far")
        status = 130
    if not args.add_to:
        results.about["minutes"] = f"{(time.monotonic() - start) / 60:.1f}"
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "race.json").write_text(json.dumps(results.plain(), indent=1) + "\n", encoding="utf-8")
    written = report.write(results, args.output)
    if args.publish:
        written += report.publish(results, ROOT)
        shutil.copyfile(args.output / "race.json", ROOT / "docs" / "performance" / "race.json")
    print(report.markdown(results))
    say("written: " + ", ".join(str(path) for path in written))
    missing = results.missing()
    if missing:
        say(f"{len(missing)} rows are missing: " + "; ".join(missing))
        return status or 1
    return status


if __name__ == "__main__":
    sys.exit(main())
