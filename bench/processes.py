"""The cost of a contender: processor time and memory of its processes, from /proc."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

AGENT = "load"
_TICKS = os.sysconf("SC_CLK_TCK")


def tree() -> dict[int, tuple[int, str]]:
    """Of every process its parent and its name."""
    found: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        # The name may hold spaces and brackets.
        name = text[text.index("(") + 1 : text.rindex(")")]
        found[int(path.parent.name)] = (int(text[text.rindex(")") + 2 :].split()[1]), name)
    return found


def family(tops: Iterable[int]) -> list[int]:
    """The processes `tops` and all below them, but for the load's own."""
    known = tree()
    below: dict[int, list[int]] = {}
    for pid, (parent, _) in known.items():
        below.setdefault(parent, []).append(pid)
    todo, members = [pid for pid in tops if pid in known], []
    while todo:
        pid = todo.pop()
        if known[pid][1] == AGENT:
            continue
        members.append(pid)
        todo += below.get(pid, [])
    return members


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time that they have used."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        fields = text[text.rindex(")") + 2 :].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def machine_seconds() -> float:
    """Processor time that the whole machine has spent not idle."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    user, nice, system, _idle, _wait, irq, soft, *_ = (int(word) for word in first.split()[1:])
    return (user + nice + system + irq + soft) / _TICKS


def memory_kilobytes(pids: Iterable[int]) -> float:
    """Resident memory, shared pages counted by their share; what the kernel keeps for them is not in it."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            continue
        if found := re.search(r"^Pss:\s+(\d+)", text, re.M):
            total += int(found[1])
    return float(total)
