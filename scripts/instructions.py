#!/usr/bin/env python3
"""Counts the instructions of the hot paths and compares them with the committed counts.

Instruction counts do not depend on the load of the machine. valgrind counts two runs of each path (the
example `hotpaths` of guestnet-core) of different lengths; their difference is the path alone. A path that
takes more than TOLERANCE above benches/instructions.json is a failure. `make instructions-renew` writes new
counts, after a change that justifies them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "benches" / "instructions.json"
TOLERANCE = 0.05
"""Other processors choose other copies of memory, other linkers other places; real slips are larger."""
FEW, MANY = 1000, 3000
REFS = re.compile(r"I\s+refs:\s+([\d,]+)")


def build() -> Path:
    """The example, as a release."""
    command = ["cargo", "build", "--release", "--locked", "--quiet", "-p", "guestnet-core"]
    subprocess.run([*command, "--example", "hotpaths"], cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / "release" / "examples" / "hotpaths"


def counted(program: Path, path: str, count: int) -> int:
    """Instructions of a whole run."""
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    done = subprocess.run(
        [*command, str(program), path, str(count)], capture_output=True, text=True, check=False
    )
    found = REFS.search(done.stderr)
    if done.returncode != 0 or found is None:
        raise SystemExit(f"{path}: {done.stderr.strip()[-800:]}")
    return int(found[1].replace(",", ""))


def measure(program: Path) -> dict[str, int]:
    """Instructions for one time through each path."""
    names = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    return {
        name: round((counted(program, name, MANY) - counted(program, name, FEW)) / (MANY - FEW))
        for name in names
    }


def compare(seen: dict[str, int], known: dict[str, int]) -> list[str]:
    """What is wrong, a line each."""
    problems = [
        f"{name}: {count} instructions, {count / known[name] - 1:+.1%} against {known[name]}"
        for name, count in seen.items()
        if name in known and count > known[name] * (1 + TOLERANCE)
    ]
    problems += [f"{name}: no committed count" for name in seen if name not in known]
    return problems + [f"{name}: committed, but no path" for name in known if name not in seen]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--renew", action="store_true", help="write the counts as the committed ones")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        print("instructions.py needs valgrind (Debian package valgrind): nothing was compared")
        return 1 if os.environ.get("CI") == "true" else 0
    seen = measure(build())
    if args.renew:
        BASELINE.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    known: dict[str, int] = json.loads(BASELINE.read_text(encoding="utf-8"))
    print(f"{'path':10} {'instructions':>12} {'committed':>10} {'change':>8}")
    for name, count in seen.items():
        old = known.get(name)
        change = f"{count / old - 1:+.1%}" if old else "-"
        print(f"{name:10} {count:12} {old or '-':>10} {change:>8}")
    problems = compare(seen, known)
    for problem in problems:
        print(f"FAILED: {problem}")
    if problems:
        print("If the change is worth it: make instructions-renew, and say why in the commit.")
    elif any(count < known[name] * (1 - TOLERANCE) for name, count in seen.items()):
        print("Some paths became shorter: make instructions-renew keeps it so.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
