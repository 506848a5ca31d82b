"""The race's rounds with contenders that fail, hang up and come late: a failure costs its own cell."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
NAMES = (
    *("race", "contenders", "machines", "report", "crowd"),
    *("guests", "results", "workloads", "processes", "plot"),
)


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """bench/race.py, whose neighbours are imported by name."""
    for path in ("tests", "bench"):
        monkeypatch.syspath_prepend(str(ROOT / path))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield __import__("race")
    for name in NAMES:
        sys.modules.pop(name, None)


class FakeGuest:
    stopped = 0
    worn = False

    def stop(self) -> None:
        self.stopped += 1


@dataclass
class FakeContender:
    name: str
    kind: str = "peer"
    machine: bool = False
    begin: Callable[[], None] = lambda: None
    started: list[FakeGuest] = field(default_factory=list)

    def start(self, _arena: object) -> FakeGuest:
        self.begin()
        self.started.append(FakeGuest())
        return self.started[-1]


@dataclass
class FakeArena:
    renewed: int = 0

    def renew_server(self) -> None:
        self.renewed += 1


@dataclass(frozen=True)
class FakeRow:
    id: str
    title: str = "a title"
    unit: str = "1/s"
    more: bool = True
    digits: int = 1


@dataclass(frozen=True)
class FakeWorkload:
    id: str
    do: Callable[[FakeGuest], float]
    once: bool = False

    @property
    def rows(self) -> list[FakeRow]:
        return [FakeRow(self.id)]

    def measure(self, _arena: object, guest: FakeGuest, _setting: object) -> dict[str, float]:
        return {self.id: self.do(guest)}


def run(
    race: ModuleType, racers: list[FakeContender], works: list[FakeWorkload], **more: Any
) -> tuple[Any, FakeArena]:
    results, arena = race.Results({}), FakeArena()
    results.want(racers, works)
    more = {"rounds": 2, "until": float("inf"), **more}
    race.Race(arena, results, race.Setting(0.1, False)).run(racers, works, **more)
    return results, arena


ERRORS = [BrokenPipeError("the pipe"), RuntimeError("odd"), KeyError("gbits"), ValueError("no JSON")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_a_failure_costs_its_own_cell_and_what_died_is_restarted(race: ModuleType, error: Exception) -> None:
    good, bad = FakeContender("good"), FakeContender("bad")

    def hang(guest: FakeGuest) -> float:
        if guest in bad.started:
            raise error
        return 1.0

    works = [
        FakeWorkload("first", lambda _: 1.0),
        FakeWorkload("hangs", hang),
        FakeWorkload("last", lambda _: 1),
    ]
    results, arena = run(race, [good, bad], works)
    assert results.values == {
        "good": {w.id: [1.0, 1.0] for w in works},
        "bad": {"first": [1, 1], "last": [1, 1]},
    }
    assert results.failed("bad", "hangs") == 2
    # A new guest for the next cell and a new server, and nothing of the other contender.
    assert (len(bad.started), len(good.started), arena.renewed) == (3, 1, 2)
    assert all(g.stopped == 1 for g in (*bad.started, *good.started))
    (missing,) = results.missing()
    assert missing.startswith("hangs of bad (")


def test_a_contender_that_does_not_start_is_tried_again(race: ModuleType) -> None:
    tries: list[int] = []

    def begin() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("not yet")

    results, _ = run(race, [FakeContender("late", begin=begin)], [FakeWorkload("w", lambda _: 2.0)])
    assert results.values == {"late": {"w": [2.0]}}
    assert results.failed("late", "w") == 1
    assert results.missing() == [], "one value is enough for a row"


def test_an_interrupt_is_no_failure_of_a_cell(race: ModuleType) -> None:
    def interrupt(_: FakeGuest) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(race, [FakeContender("a")], [FakeWorkload("w", interrupt)])


def test_the_least_rounds_are_run_whatever_the_time(race: ModuleType) -> None:
    works = [FakeWorkload("w", lambda _: 1.0), FakeWorkload("once", lambda _: 1.0, once=True)]
    results, _ = run(race, [FakeContender("a")], works, rounds=5, until=0.0, least=2)
    assert results.values == {"a": {"w": [1.0, 1.0], "once": [1.0]}}


def test_without_time_rows_are_missing_and_say_so(race: ModuleType) -> None:
    results, _ = run(race, [FakeContender("a")], [FakeWorkload("w", lambda _: 1.0)], until=0.0)
    assert results.missing() == ["w of a (no time)"]


def test_a_server_that_does_not_come_back_ends_no_round(race: ModuleType) -> None:
    class Broken(FakeArena):
        def renew_server(self) -> None:
            raise OSError("no port")

    def fail(_: FakeGuest) -> float:
        raise OSError("gone")

    results = race.Results({})
    contender, works = FakeContender("a"), [FakeWorkload("x", fail), FakeWorkload("y", lambda _: 3.0)]
    results.want([contender], works)
    race.Race(Broken(), results, race.Setting(0.1, False)).run([contender], works, 1, float("inf"))
    assert results.values == {"a": {"y": [3.0]}}


def test_a_guest_that_a_measurement_wore_out_is_replaced_and_keeps_its_values(race: ModuleType) -> None:
    def wear(guest: FakeGuest) -> float:
        guest.worn = True
        return 1.0

    contender = FakeContender("a")
    results, arena = run(race, [contender], [FakeWorkload("w", wear)])
    assert results.values == {"a": {"w": [1.0, 1.0]}}
    assert (len(contender.started), arena.renewed) == (2, 0)
    assert all(g.stopped == 1 for g in contender.started)


@dataclass
class IdleGuest:
    """Opens so many idle connections; `lets_go` is whether it answers afterwards."""

    opened: float
    failed: type[Exception]
    lets_go: bool = True
    worn: bool = False

    def own(self) -> list[int]:
        return [os.getpid()]

    def ask(self, words: list[str], _seconds: float = 30) -> dict[str, float]:
        if words[0] == "idle":
            return {"open": self.opened, "seconds": 3.0}
        if not self.lets_go:
            raise self.failed("no answer in 8 s")
        return {"open": 0.0}


class IdleArena:
    def outside(self, words: list[str]) -> dict[str, float]:
        assert words[0] == "forget"
        return {"open": 0.0}


@pytest.mark.parametrize(
    ("opened", "rows"),
    [
        (10_000, {"idle-count", "memory", "idle-each", "idle-memory", "idle-cpu", "idle-open"}),
        (9_950, {"idle-count", "memory", "idle-each", "idle-memory", "idle-cpu", "idle-open"}),
        (4_746, {"idle-count", "memory", "idle-each"}),
    ],
)
def test_a_contender_that_opens_fewer_idle_connections_is_measured_at_those(
    race: ModuleType, monkeypatch: pytest.MonkeyPatch, opened: float, rows: set[str]
) -> None:
    workloads = sys.modules["workloads"]
    monkeypatch.setattr(workloads, "IDLE_WATCH", 0.001)
    (idle,) = (w for w in workloads.all_workloads(False) if w.id == "idle")
    guest = IdleGuest(opened, race.Failed)
    values = idle.measure(IdleArena(), guest, race.Setting(0.1, False))
    assert set(values) == rows
    assert rows <= {row.id for row in idle.rows}
    assert values["idle-count"] == opened
    assert not guest.worn
    guest = IdleGuest(opened, race.Failed, lets_go=False)
    assert set(idle.measure(IdleArena(), guest, race.Setting(0.1, False))) == rows
    assert guest.worn


def test_a_failure_of_one_guest_of_many_says_which(race: ModuleType) -> None:
    crowd = sys.modules["crowd"]
    guest = IdleGuest(0, race.Failed, lets_go=False)
    with pytest.raises(race.Failed, match=r"^guest 17: no answer in 8 s$"):
        crowd._stream(guest, ["tcp", "up", "1", "500", "192.0.2.1:9"], 17)
