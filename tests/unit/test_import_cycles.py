"""The check for circles of imports, on small trees."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with another root."""
    spec = importlib.util.spec_from_file_location("import_cycles", ROOT / "scripts" / "import_cycles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "import_cycles", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_circle_of_rust_files_is_found_through_groups_and_re_exports(
    check: ModuleType, tmp_path: Path
) -> None:
    write(
        tmp_path,
        {
            "src/lib.rs": "mod a;\nmod b;\nmod c;\npub use a::A;\n",
            "src/a.rs": "use crate::{b::{B, Other as O}, c};\npub struct A;\n",
            "src/b/mod.rs": "mod inner;\npub use inner::B;\npub struct Other;\n",
            "src/b/inner.rs": "use crate::A;\npub struct B;\n",
            "src/c.rs": "//! Text that names crate::a.\n#[cfg(test)]\nmod tests {\n    use crate::a::A;\n}\n",
        },
    )
    graph = check.Crate(tmp_path / "src").graph()
    assert graph["src/a.rs"] == {"src/b/inner.rs", "src/b/mod.rs", "src/c.rs"}
    assert check.circles(graph) == [["src/a.rs", "src/b/inner.rs"]]


def test_a_circle_of_python_files_is_found_also_inside_functions(check: ModuleType, tmp_path: Path) -> None:
    typing_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.a import A\n"
    write(
        tmp_path,
        {
            "pkg/__init__.py": "",
            "pkg/a.py": "from pkg import b\nfrom .sub import c\n",
            "pkg/b.py": "def f():\n    from . import a\n",
            "pkg/sub/__init__.py": "",
            "pkg/sub/c.py": typing_only,
        },
    )
    assert check.circles(check.python_graph(tmp_path / "pkg")) == [["pkg/a.py", "pkg/b.py"]]


def test_an_allowed_circle_has_two_files_and_is_there(check: ModuleType) -> None:
    graph = {"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"e"}, "e": {"c"}, "f": {"a"}}
    two, three = frozenset("ab"), frozenset("cde")
    assert check.problems([graph], {two: "why"}) == ["3 files import each other: c, d, e"]
    assert check.problems([graph], {two: "why", three: "why"}) == ["too large to be allowed: c, d, e"]
    assert check.problems([{"f": {"a"}}], {two: "why"}) == ["allowed, but not there any more: a, b"]


def test_the_tree_has_no_other_circles(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ROOT", ROOT)
    monkeypatch.setattr(sys, "argv", ["import_cycles.py"])
    assert check.main() == 0
