"""The race's arithmetic and its tables, on numbers that are known."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

BENCH = str(Path(__file__).resolve().parents[3] / "bench")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """bench/'s modules, which are no package and import each other by name."""
    names = ("results", "plot", "report", "processes")
    monkeypatch.syspath_prepend(BENCH)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: __import__(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


@dataclass(frozen=True)
class Row:
    id: str
    title: str = "a title"
    unit: str = "1/s"
    more: bool = True
    digits: int = 1


@dataclass(frozen=True)
class Racer:
    name: str
    kind: str
    machine: bool = False


@dataclass(frozen=True)
class Work:
    rows: list[Row] = field(default_factory=list)


RACERS = [
    Racer("kernel", "kernel"),
    Racer("guestnet 1500", "guestnet"),
    Racer("pasta 1500", "pasta"),
    Racer("pasta 65520", "pasta"),
    Racer("QEMU tap", "kernel", machine=True),
]
ROWS = [
    Row("tcp-up-1", "TCP up"),
    Row("rr-tcp", "round <trip>", "us", more=False),
    Row("lost-udp-up-1400-200k", "lost", "%", more=False),
]


@pytest.fixture
def results(bench: dict[str, ModuleType]) -> Any:
    made = bench["results"].Results({"processor": "one"})
    made.know(RACERS, [Work(ROWS)])
    for name, values in (
        ("kernel", (20.0, 10.0, 30.0)),
        ("guestnet 1500", (16.0, 18.0, 14.0)),
        ("pasta 1500", (1.0, 2.0)),
        ("pasta 65520", (8.0,)),
    ):
        for value in values:
            made.add(name, "tcp-up-1", value)
    for name, value in (
        ("kernel", 10.0),
        ("guestnet 1500", 18.0),
        ("pasta 1500", 30.0),
        ("pasta 65520", 20.0),
    ):
        made.add(name, "rr-tcp", value)
    return made


def test_medians_and_their_ends(results: Any) -> None:
    spread = results.spread("guestnet 1500", "tcp-up-1")
    assert (spread.median, spread.least, spread.most, spread.count) == (16.0, 14.0, 18.0, 3)
    assert results.spread("pasta 1500", "tcp-up-1").median == 1.5
    assert results.spread("pasta 1500", "no such row") is None


def test_the_best_peer_is_the_fastest_or_the_quickest_and_no_machine(results: Any) -> None:
    results.add("QEMU tap", "tcp-up-1", 99.0)
    assert results.best_peer("tcp-up-1", machine=False) == "pasta 65520"
    assert results.best_peer("rr-tcp", machine=False) == "pasta 65520"
    assert results.best_peer("tcp-up-1", machine=True) is None


def test_goals_are_judged_by_more_and_by_less(bench: dict[str, ModuleType], results: Any) -> None:
    judged = {(j.goal.row, j.against): j for j in bench["results"].judge(results)}
    up, limit = judged["tcp-up-1", "pasta 65520"], judged["tcp-up-1", "kernel"]
    assert (up.ratio, up.wanted, up.reached) == (2.0, 1.5, True)
    assert (limit.ratio, limit.wanted, limit.reached) == (0.8, 0.8, True)
    trip, far = judged["rr-tcp", "pasta 65520"], judged["rr-tcp", "kernel"]
    assert (trip.ratio, trip.reached) == (0.9, False), "at most 0.7 was wanted"
    assert (far.ratio, far.reached) == (1.8, False), "at most 1.6 was wanted"


def test_a_machine_is_judged_at_its_best_mtu_as_its_peers_are(
    bench: dict[str, ModuleType], results: Any
) -> None:
    machines = [Racer(f"guestnet stream {mtu}", "guestnet", machine=True) for mtu in (1500, 65520)]
    results.know([*machines, Racer("passt stream 65520", "passt", machine=True)], [])
    for name, rate, trip in (
        ("guestnet stream 1500", 1.0, 200.0),
        ("guestnet stream 65520", 3.0, 300.0),
        ("passt stream 65520", 2.0, 250.0),
    ):
        results.add(name, "tcp-up-1", rate)
        results.add(name, "rr-tcp", trip)
    judged = {(j.goal.title, j.against): j for j in bench["results"].judge(results)}
    up = judged["machine on stream, TCP up, 1 stream", "passt stream 65520"]
    assert (up.own, up.ratio, up.reached) == ("guestnet stream 65520", 1.5, True)
    trip = judged["machine on stream, TCP round trip", "passt stream 65520"]
    assert (trip.own, trip.ratio, trip.reached) == ("guestnet stream 1500", 0.8, True)
    assert judged["machine on vhost-user, TCP up, 1 stream", "passt stream 65520"].reached is None


def test_a_goal_without_numbers_is_not_measured(bench: dict[str, ModuleType], results: Any) -> None:
    lost = [j for j in bench["results"].judge(results) if j.goal.row.startswith("lost-")]
    assert [j.reached for j in lost] == [None]


def test_loss_of_nothing_is_no_division(bench: dict[str, ModuleType], results: Any) -> None:
    row = "lost-udp-up-1400-200k"
    results.add("pasta 1500", row, 0.0)
    results.add("guestnet 1500", row, 0.0)
    assert [j.reached for j in bench["results"].judge(results) if j.goal.row == row] == [True]
    results.values["guestnet 1500"][row] = [0.5]
    assert [j.reached for j in bench["results"].judge(results) if j.goal.row == row] == [False]


def test_the_table_tells_failures_and_ratios(bench: dict[str, ModuleType], results: Any) -> None:
    results.fail("pasta 1500", Work(ROWS[1:]), "no answer")
    lines = bench["report"].table(results, machine=False).splitlines()
    width = {line.count("|") for line in lines}
    assert len(width) == 1, "every line has the same number of cells"
    assert "16.0 [14.0 18.0]" in lines[2]
    assert lines[2].endswith("| 2.00 (pasta 65520) | 0.80 |")
    assert "30.0 failed 1x" in lines[3]
    assert bench["report"].table(results, machine=True) == ""


def test_the_report_is_whole(bench: dict[str, ModuleType], results: Any, tmp_path: Path) -> None:
    written = bench["report"].write(results, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "**not reached**" in text
    assert "not measured" in text
    for path in written:
        assert path.exists()
        if path.suffix == ".svg":
            assert f"({path.name})" in text
            ElementTree.parse(path)
    assert json.loads(json.dumps(results.plain()))["values"]["kernel"]["rr-tcp"] == [10.0]


def test_publishing_writes_between_the_marks_alone(
    bench: dict[str, ModuleType], results: Any, tmp_path: Path
) -> None:
    begin, end = bench["report"].MARKS
    (tmp_path / "README.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    bench["report"].publish(results, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"before\n{begin}\n| namespace")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "8.0 (pasta 65520)" in text


def test_pictures_escape_what_they_show(bench: dict[str, ModuleType], results: Any) -> None:
    svg = dict(bench["plot"].pictures(results))["race"]
    assert "round &lt;trip&gt;" in svg
    assert svg.count("<rect") == 8
    assert svg.count('class="whisker"') == 3, "only where there are several values"


def test_a_family_leaves_the_load_out(bench: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    known = {1: (0, "init"), 5: (1, "sh"), 6: (5, "pasta"), 7: (6, "load"), 8: (7, "sh"), 9: (1, "other")}
    monkeypatch.setattr(bench["processes"], "tree", lambda: known)
    assert sorted(bench["processes"].family([5])) == [5, 6]
    assert bench["processes"].family([4]) == []
