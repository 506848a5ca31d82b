"""When the count of instructions is a failure, and when not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "instructions.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("instructions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_more_than_the_tolerance_is_told(script: ModuleType) -> None:
    assert script.compare({"nat": 1050, "switch": 900}, {"nat": 1000, "switch": 1000}) == []
    (problem,) = script.compare({"nat": 1051}, {"nat": 1000})
    assert "+5.1%" in problem


def test_paths_that_come_and_go_are_told(script: ModuleType) -> None:
    problems = script.compare({"new": 1}, {"old": 1})
    assert [p.split(":")[0] for p in problems] == ["new", "old"]


def test_the_committed_counts_are_of_the_examples_paths(script: ModuleType) -> None:
    source = (SCRIPT.parents[1] / "crates/guestnet-core/examples/hotpaths.rs").read_text()
    for name in script.json.loads(script.BASELINE.read_text()):
        assert f'("{name}", ' in source
