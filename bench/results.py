"""Medians, ranges and ratios of the measurements, and whether the goals are reached."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


class RowLike(Protocol):
    """What is needed of a row; workloads.Row."""

    @property
    def id(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def more(self) -> bool: ...
    @property
    def digits(self) -> int: ...


class ContenderLike(Protocol):
    """What is needed of a contender; contenders.Contender."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def machine(self) -> bool: ...


class WorkloadLike(Protocol):
    """What is needed of a workload; workloads.Workload."""

    @property
    def rows(self) -> Sequence[RowLike]: ...


@dataclass(frozen=True)
class Spread:
    """The median of some values, and their ends."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class KnownRow:
    """A row of an earlier run."""

    id: str
    title: str
    unit: str
    more: bool
    digits: int


@dataclass(frozen=True)
class KnownContender:
    """A contender of an earlier run."""

    name: str
    kind: str
    machine: bool


@dataclass
class Results:
    """Values by contender and row, in the order in which they came."""

    about: dict[str, str]
    contenders: dict[str, ContenderLike] = field(default_factory=dict)
    rows: dict[str, RowLike] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    wanted: list[tuple[str, list[str]]] = field(default_factory=list)
    """Contender and rows of a workload."""

    def know(self, contenders: Iterable[ContenderLike], workloads: Iterable[WorkloadLike]) -> None:
        """Who runs, and what, for the order of the table."""
        for contender in contenders:
            self.contenders.setdefault(contender.name, contender)
        for workload in workloads:
            for row in workload.rows:
                self.rows.setdefault(row.id, row)

    def want(self, contenders: Iterable[ContenderLike], workloads: Iterable[WorkloadLike]) -> None:
        """As `know`, and each of these is to have a value of each of those."""
        contenders, workloads = list(contenders), list(workloads)
        self.know(contenders, workloads)
        self.wanted += [(c.name, [row.id for row in w.rows]) for w in workloads for c in contenders]

    def missing(self) -> list[str]:
        """What was wanted and has no value: the row, the contender, and why."""
        return [
            f"{rows[0]} of {name} ({(self.failures.get(name, {}).get(rows[0]) or ['no time'])[-1]})"
            for name, rows in self.wanted
            if not any(self.values.get(name, {}).get(row) for row in rows)
        ]

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Results:
        """What an earlier run wrote as JSON."""
        rows = {
            name: KnownRow(name, r["title"], r["unit"], r["more_is_better"], r["digits"])
            for name, r in plain["rows"].items()
        }
        racers = {
            name: KnownContender(name, c["kind"], c["machine"]) for name, c in plain["contenders"].items()
        }
        return cls(
            dict(plain["about"]),
            dict(racers),
            dict(rows),
            {name: dict(values) for name, values in plain["values"].items()},
            {name: dict(failures) for name, failures in plain["failures"].items()},
        )

    def forget(self, names: Iterable[str], workloads: Iterable[WorkloadLike]) -> None:
        """These contenders are measured anew."""
        rows = [row.id for workload in workloads for row in workload.rows]
        for name in names:
            for row in rows:
                self.values.get(name, {}).pop(row, None)
                self.failures.get(name, {}).pop(row, None)

    def add(self, contender: str, row: str, value: float) -> None:
        self.values.setdefault(contender, {}).setdefault(row, []).append(value)

    def fail(self, contender: str, workload: WorkloadLike, why: str) -> None:
        """It could not; told under the first row of the workload, by the last line of the reason."""
        why = (why.strip().splitlines() or ["no reason"])[-1]
        self.failures.setdefault(contender, {}).setdefault(workload.rows[0].id, []).append(why)

    def spread(self, contender: str, row: str) -> Spread | None:
        values = self.values.get(contender, {}).get(row)
        return Spread.of(values) if values else None

    def failed(self, contender: str, row: str) -> int:
        return len(self.failures.get(contender, {}).get(row, []))

    def names(self, *, machine: bool, kind: str | None = None) -> list[str]:
        """Contenders in the table's order; `kind` may be "peer": neither the kernel nor guestnet."""
        return [
            c.name
            for c in self.contenders.values()
            if c.machine == machine
            and (kind is None or c.kind == kind or (kind == "peer" and c.kind not in ("kernel", "guestnet")))
        ]

    def best_peer(self, row: str, *, machine: bool) -> str | None:
        """The peer with the best median, at whatever MTU; None where no peer has a value."""
        return self.best(self.names(machine=machine, kind="peer"), row)

    def best(self, names: Iterable[str], row: str) -> str | None:
        """The one with the best median; None where none has a value."""
        known = [(s.median, n) for n in names if (s := self.spread(n, row))]
        if not known:
            return None
        return (max if self.rows[row].more else min)(known)[1]

    def ratio(self, own: str, other: str | None, row: str) -> float | None:
        """The median of `own` to that of `other`; None where one is missing or it cannot be said."""
        a, b = self.spread(own, row), self.spread(other, row) if other else None
        return a.median / b.median if a and b and b.median else None

    def plain(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {
            "about": self.about,
            "contenders": {
                c.name: {"kind": c.kind, "machine": c.machine} for c in self.contenders.values()
            },
            "rows": {
                r.id: {"title": r.title, "unit": r.unit, "more_is_better": r.more, "digits": r.digits}
                for r in self.rows.values()
            },
            "values": self.values,
            "failures": self.failures,
            "goals": [
                {"title": g.goal.title, "row": g.goal.row, "own": g.own, "against": g.against,
                 "ratio": g.ratio, "wanted": g.wanted, "reached": g.reached}
                for g in judge(self)
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What guestnet wants to be: `peer` and `limit` are ratios of its median to the best peer's and to the
    kernel's; at least these where more is better, at most where less is. `own` is a contender, or with a star
    at the end whichever of those is best, as it is with the peers."""

    title: str
    row: str
    own: str
    peer: float | None = None
    limit: float | None = None
    machine: bool = False


@dataclass(frozen=True)
class Judgement:
    """A goal and what became of it; `reached` is None where it was not measured."""

    goal: Goal
    own: str
    against: str
    wanted: float
    ratio: float | None
    reached: bool | None


NS = "guestnet 1500"
GOALS: Sequence[Goal] = (
    Goal("namespace, TCP up, 1 stream", "tcp-up-1", NS, 1.5, 0.8),
    Goal("namespace, TCP down, 1 stream", "tcp-down-1", NS, 1.2, 0.95),
    Goal("namespace, TCP up, 4 streams", "tcp-up-4", NS, 1.0, 0.6),
    Goal("namespace, TCP down, 4 streams", "tcp-down-4", NS, 1.3, 0.6),
    Goal("UDP 1400 B up, received", "udp-up-1400-200k", NS, 2.0, 0.8),
    Goal("UDP 1400 B down, received", "udp-down-1400-200k", NS, 2.0, 0.8),
    Goal("UDP 1400 B up, least loss", "lost-udp-up-1400-200k", NS, 1.0),
    Goal("UDP 1400 B down, least loss", "lost-udp-down-1400-200k", NS, 1.0),
    Goal("connections a second", "connections", NS, 2.0, 0.7),
    Goal("keep-alive requests a second", "keep-alive", NS, 1.6, 0.75),
    Goal("TCP round trip, median", "rr-tcp", NS, 0.7, 1.6),
    Goal("UDP round trip, median", "rr-udp", NS, 0.7, 1.6),
    *(
        Goal(
            f"machine on {way}, {title}",
            row,
            f"guestnet {way} *",
            # A latency that is 1.2 times better is 1/1.2 of the other.
            1.2 if row.startswith("tcp") else round(1 / 1.2, 3),
            0.9 if row.startswith("tcp") else round(1 / 0.9, 3),
            machine=True,
        )
        for way in ("stream", "vhost-user")
        for row, title in (
            ("tcp-up-1", "TCP up, 1 stream"),
            ("tcp-down-1", "TCP down, 1 stream"),
            ("tcp-up-4", "TCP up, 4 streams"),
            ("tcp-down-4", "TCP down, 4 streams"),
            ("rr-tcp", "TCP round trip"),
            ("rr-udp", "UDP round trip"),
        )
    ),
    Goal("memory at 10,000 idle connections", "idle-memory", NS, 0.7),
    Goal("CPU for each GB, TCP up", "cpu-tcp-up-1", NS, 0.7),
    Goal("CPU for each GB, TCP down", "cpu-tcp-down-1", NS, 0.7),
    Goal("published port, TCP into the guest, 1 stream", "published-in", NS, 1.3, 0.8),
    Goal("published port, TCP out of the guest, 1 stream", "published-out", NS, 1.3, 0.8),
)


def _own(results: Results, goal: Goal) -> str:
    """The contender whose goal it is."""
    if not goal.own.endswith("*"):
        return goal.own
    names = results.names(machine=goal.machine, kind="guestnet")
    return results.best([n for n in names if n.startswith(goal.own[:-1])], goal.row) or goal.own


def _one(results: Results, goal: Goal, other: str | None, wanted: float, against: str) -> Judgement:
    mine = _own(results, goal)
    ratio = results.ratio(mine, other, goal.row)
    reached = None
    if ratio is not None:
        # As much as the table shows: 0.798 is 0.80.
        shown = round(ratio, 2)
        reached = shown >= wanted if results.rows[goal.row].more else shown <= round(wanted, 2)
    elif other and (own := results.spread(mine, goal.row)) and results.spread(other, goal.row):
        # The other's median is nothing at all, so no ratio can be made: a loss of 0 %.
        reached = own.median <= 0 and not results.rows[goal.row].more
    return Judgement(goal, mine, against, wanted, ratio, reached)


def judge(results: Results) -> list[Judgement]:
    """Each goal against the best peer and against the limit, where a target is set."""
    found = []
    for goal in GOALS:
        if goal.row not in results.rows:
            continue
        if goal.peer is not None:
            best = results.best_peer(goal.row, machine=goal.machine)
            found.append(_one(results, goal, best, goal.peer, best or "the best peer"))
        if goal.limit is not None:
            limits = results.names(machine=goal.machine, kind="kernel")
            limit = limits[0] if limits else None
            found.append(_one(results, goal, limit, goal.limit, limit or "the kernel"))
    return found


def machine_description(options: Mapping[str, object]) -> dict[str, str]:
    """The machine that it ran on, without its name."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": f"{pages / 2**30:.0f} GiB",
        "kernel": f"Linux {platform.release().partition('-')[0]} {platform.machine()}",
        **{name: str(value) for name, value in options.items()},
    }
