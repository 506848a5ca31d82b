#!/usr/bin/env python3
"""Builds the fuzz targets and runs each for a short time.

It needs cargo and a C++ compiler, but no cargo-fuzz and no nightly: coverage comes from LLVM's own pass,
which a stable compiler has too. (`cargo +nightly fuzz run TARGET` works on the same crate, with
AddressSanitizer.) New corpus entries are kept in .build/fuzz/. A crash leaves its input there and fails the
run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COVERAGE = (
    "--cfg=fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
    " -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
    " -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
)


def host_triple() -> str:
    out = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout
    return next(line.split()[1] for line in out.splitlines() if line.startswith("host:"))


def build(targets: list[str]) -> dict[str, Path]:
    """Builds all targets; `--target` keeps the flags away from build scripts and macros."""
    triple = host_triple()
    out = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "fuzz"
    env = {**os.environ, "RUSTFLAGS": COVERAGE, "CARGO_TARGET_DIR": str(out)}
    wanted = [arg for t in targets for arg in ("--bin", t)]
    command = ["cargo", "build", "--release", "--locked", "--quiet", "--target", triple, *wanted]
    subprocess.run(command, cwd=ROOT / "fuzz", env=env, check=True)
    return {t: out / triple / "release" / t for t in targets}


def run(target: str, program: Path, seconds: int, seed: int) -> bool:
    """One target from its committed seeds; True when it found nothing."""
    work = ROOT / ".build" / "fuzz" / target
    seeds = ROOT / "fuzz" / "corpus" / target
    artifacts = work / "artifacts"
    grown = work / "corpus"
    for d in (grown, artifacts):
        d.mkdir(parents=True, exist_ok=True)
    command = [
        str(program), str(grown), *([str(seeds)] if seeds.is_dir() else []), f"-max_total_time={seconds}",
        f"-seed={seed}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=8192", "-print_final_stats=1",
        "-verbosity=0", f"-artifact_prefix={artifacts}/",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=seconds + 120, check=False
    )
    stats = dict(
        line.removeprefix("stat::").split(":", 1)
        for line in done.stderr.splitlines()
        if line.startswith("stat::")
    )
    if done.returncode == 0:
        runs = stats.get("number_of_executed_units", "?").strip()
        print(f"{target}: nothing found in {runs} runs, {seconds} s")
        return True
    print(done.stderr[-6000:])
    print(f"{target}: FAILED (exit status {done.returncode}); the input is in {artifacts.relative_to(ROOT)}")
    return False


def main() -> int:
    with (ROOT / "fuzz" / "Cargo.toml").open("rb") as f:
        known = [b["name"] for b in tomllib.load(f)["bin"]]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="*", help=f"which ones; all of {', '.join(known)} when none is named")
    parser.add_argument("--seconds", type=int, default=20, help="how long each runs (20)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same inputs in the same order each time; 0, the default: new ones",
    )
    args = parser.parse_args()
    targets = args.target or known
    if unknown := set(targets) - set(known):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    missing = [p for p in ("cargo", "rustc", "c++") if not shutil.which(p)]
    if missing:
        print(
            f"fuzzing needs {', '.join(missing)}: install it (Debian: apt-get install g++)", file=sys.stderr
        )
        return 1
    try:
        programs = build(targets)
    except subprocess.CalledProcessError:
        return 1
    clean = [run(t, programs[t], args.seconds, args.seed) for t in targets]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
