"""100 guests that join one after another: seconds for all of them, and the memory of all servers.

Each guest is a user and a network namespace that exists already, as that of a rootless container. One
`guestnet up --name` serves all guests of `guestnet join`; a peer starts a process for each. Then
`guestnet run -- true` and its peers are timed alone. Everything runs as an ordinary user, in namespaces whose
only neighbour is an outside of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

import processes  # noqa: E402
from contenders import GUESTNET, newer_pasta  # noqa: E402
from lab import Lab, Process  # noqa: E402
from lab.namespaces import OUT4  # noqa: E402
from lab.need import PATH  # noqa: E402

NAMESPACES = """
for i in $(seq {count}); do unshare --user --map-root-user --net sleep 3600 & echo "made $!"; done
echo all made; wait
"""
LOOP = """
import json, subprocess, sys, time
commands = json.load(sys.stdin)
start = time.monotonic()
for command in commands:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
print(time.monotonic() - start)
"""
PASTA = ["--config-net", "--no-map-gw", "--quiet", "-t", "none", "-u", "none", "-T", "none", "-U", "none"]


def loop(lab: Lab, commands: Sequence[Sequence[str]]) -> float:
    """Seconds that commands take one after another, as an ordinary user."""
    out = lab.run([sys.executable, "-c", LOOP], ordinary=True, stdin=json.dumps(commands), seconds=300)
    if out.returncode != 0:
        raise RuntimeError(out.stderr)
    return float(out.stdout)


class Guests:
    """Namespaces that wait for a network."""

    def __init__(self, lab: Lab, count: int) -> None:
        self._lab = lab
        self._shell: Process = lab.start(
            ["sh", "-c", NAMESPACES.format(count=count)], ordinary=True, ready="all made"
        )
        self.pids = [int(line.split()[1]) for line in self._shell.lines if line.startswith("made")]

    def check(self) -> None:
        """Raises if the first or the last guest does not reach the outside."""
        for pid in (self.pids[0], self.pids[-1]):
            enter = ["nsenter", f"--target={pid}", "--user", "--net", "--"]
            self._lab.check([*enter, "ping", "-c", "1", "-W", "10", OUT4])

    def close(self) -> None:
        """Ends them. They would outlive the shell that started them."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self._shell.stop()


def measure_guestnet(lab: Lab, count: int) -> tuple[float, float]:
    """Seconds and megabytes of guests that join one network."""
    network = lab.start([GUESTNET, "up", "--name", "bench", "-v"], ordinary=True, ready="is up")
    guests = Guests(lab, count)
    try:
        seconds = loop(lab, [[GUESTNET, "join", "bench", "--pid", str(pid)] for pid in guests.pids])
        guests.check()
        return seconds, processes.memory_kilobytes(processes.family([network.pid])) / 1024
    finally:
        guests.close()
        network.stop()


def measure_pasta(lab: Lab, count: int, program: str) -> tuple[float, float]:
    """The same of a pasta for each guest."""
    before = set(processes.tree())
    guests = Guests(lab, count)
    try:
        seconds = loop(lab, [[program, *PASTA, str(pid)] for pid in guests.pids])
        guests.check()
        servers = [
            pid
            for pid, (_, name) in processes.tree().items()
            if pid not in before and name.startswith(("pasta", "passt"))
        ]
        if len(servers) != count:
            raise RuntimeError(f"{len(servers)} processes of pasta serve {count} guests")
        return seconds, processes.memory_kilobytes(servers) / 1024
    finally:
        guests.close()


def main() -> None:
    """Prints a table; with --json, writes the values too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="guests, default 100")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which medians are taken, default 3")
    parser.add_argument("--pasta", type=Path, help="another build of pasta")
    parser.add_argument("--json", type=Path, help="write the values to this file")
    options = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {}

    def add(name: str, **values: float) -> None:
        for key, value in values.items():
            rows.setdefault(name, {}).setdefault(key, []).append(value)

    with tempfile.TemporaryDirectory() as directory, Lab() as lab:
        Path(directory).chmod(0o755)
        pastas = {"pasta": "pasta"} if shutil.which("pasta", path=PATH) else {}
        if options.pasta:
            pastas["new pasta"] = str(newer_pasta(options.pasta, Path(directory)) / "pasta")
        for number in range(options.rounds):
            print(f"round {number + 1}", file=sys.stderr)
            seconds, megabytes = measure_guestnet(lab, options.count)
            add("guestnet", join=seconds, memory=megabytes)
            for name, program in pastas.items():
                seconds, megabytes = measure_pasta(lab, options.count, program)
                add(name, join=seconds, memory=megabytes)
            add("guestnet", alone=loop(lab, [[GUESTNET, "run", "--", "true"]] * 10) * 100)
            for name, program in pastas.items():
                add(name, alone=loop(lab, [[program, *PASTA, "--", "true"]] * 10) * 100)
    print(f"| {options.count} guests, medians of {options.rounds} rounds | {' | '.join(rows)} |")
    print(f"|---|{'---|' * len(rows)}")
    for key, about, digits in (
        ("join", "join one after another, s", 2),
        ("memory", "memory of all servers, MB", 0),
        ("alone", "`run -- true` and the like alone, ms", 0),
    ):
        values = (f"{statistics.median(rows[name][key]):.{digits}f}" for name in rows)
        print(f"| {about} | {' | '.join(values)} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
