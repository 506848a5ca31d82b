#!/usr/bin/env python3
"""Runs every test suite of the project, in order, and ends with a summary.

A suite that fails does not stop the next ones, so one run shows everything that is wrong. The last line is `N
passed, N failed, N skipped`. The exit status is 1 if anything failed. What a suite leaves behind is a failure
too (`leftovers.py`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from leftovers import Leftovers

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
CARGO_LINE = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored")
PYTEST_WORD = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed)")
PYTEST_LINE = re.compile(r"^(=+ )?\d+ (passed|failed|errors?|skipped|xfailed)\b.* in [\d.]+s")


@dataclass(frozen=True)
class Suite:
    """One command; `counts` says that its output is that of cargo test or pytest."""

    name: str
    command: tuple[str, ...]
    counts: bool = False


@dataclass
class Outcome:
    suite: Suite
    status: int
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: int = 0


def suites(basetemp: str) -> list[Suite]:
    python_dirs = [d for d in ("python", "tests", "bench", "scripts") if (ROOT / d).is_dir()]
    fuzz_seconds = os.environ.get("FUZZ_SECONDS", "20")
    return [
        Suite("rustfmt", ("cargo", "fmt", "--all", "--check")),
        Suite(
            "clippy",
            (
                "cargo",
                "clippy",
                "--workspace",
                "--all-targets",
                "--locked",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ),
        ),
        Suite("ruff", (PYTHON, "-m", "ruff", "check", "--quiet", *python_dirs)),
        Suite("ruff format", (PYTHON, "-m", "ruff", "format", "--quiet", "--check", *python_dirs)),
        Suite("mypy", (PYTHON, "-m", "mypy")),
        Suite("stubtest", ("scripts/stubtest.sh", PYTHON)),
        Suite("docs", (PYTHON, "scripts/build_docs.py")),
        Suite("cargo test", ("cargo", "test", "--workspace", "--locked", "--no-fail-fast"), counts=True),
        Suite("loom", ("scripts/loom.sh",), counts=True),
        Suite("pytest", (PYTHON, "-m", "pytest", "-ra", f"--basetemp={basetemp}", "tests"), counts=True),
        Suite("instructions", (PYTHON, "scripts/instructions.py")),
        # The same inputs each time: a run that fails can be had again. `make fuzz` looks for new ones.
        Suite("fuzz", (PYTHON, "scripts/fuzz.py", "--seed", "1", "--seconds", fuzz_seconds)),
    ]


def count(line: str, outcome: Outcome) -> None:
    """Adds what a closing line of cargo test or pytest says."""
    if found := CARGO_LINE.match(line):
        outcome.passed += int(found[1])
        outcome.failed += int(found[2])
        outcome.skipped += int(found[3])
    elif PYTEST_LINE.match(line):
        for number, word in PYTEST_WORD.findall(line):
            if word == "passed":
                outcome.passed += int(number)
            elif word in ("skipped", "xfailed"):
                outcome.skipped += int(number)
            else:
                outcome.failed += int(number)


def run(suite: Suite, leftovers: Leftovers) -> Outcome:
    print(f"\n==== {suite.name}: {' '.join(suite.command)}", flush=True)
    start = time.monotonic()
    outcome = Outcome(suite, 0, 0.0)
    with subprocess.Popen(
        suite.command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **leftovers.environment},
    ) as process:
        leftovers.pids.append(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if suite.counts:
                count(line, outcome)
    outcome.status = process.returncode
    outcome.seconds = time.monotonic() - start
    if not suite.counts:
        outcome.passed, outcome.failed = (1, 0) if outcome.status == 0 else (0, 1)
    elif outcome.status != 0 and outcome.failed == 0:
        # It died before it could count: a compile error, a crash of the runner, or no tests at all.
        outcome.failed = 1
    return outcome


def check(leftovers: Leftovers) -> Outcome:
    """One more suite: whether the others left nothing."""
    start = time.monotonic()
    found = leftovers.find()
    print("\n==== leftovers")
    for line in found:
        print(f"left behind: {line}")
    leftovers.remove()
    outcome = Outcome(Suite("leftovers", ()), 1 if found else 0, time.monotonic() - start)
    outcome.passed, outcome.failed = (0, len(found)) if found else (1, 0)
    return outcome


def main() -> int:
    only = set(sys.argv[1:])
    leftovers = Leftovers()
    known = suites(leftovers.pytest_directory)
    chosen = [s for s in known if not only or s.name in only]
    if not chosen:
        leftovers.remove()
        print(
            f"no such suite: {', '.join(sorted(only))}; there are {', '.join(s.name for s in known)}",
            file=sys.stderr,
        )
        return 2
    try:
        outcomes = [run(s, leftovers) for s in chosen]
    except BaseException:
        leftovers.remove()
        raise
    outcomes.append(check(leftovers))
    print("\n==== summary")
    for o in outcomes:
        word = "ok" if o.status == 0 else "FAILED"
        counts = f"{o.passed:6} passed {o.failed:4} failed {o.skipped:4} skipped"
        print(f"{o.suite.name:12} {word:7} {counts} {o.seconds:7.1f} s")
    passed, failed, skipped = (sum(getattr(o, f) for o in outcomes) for f in ("passed", "failed", "skipped"))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or any(o.status for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
