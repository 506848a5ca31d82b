"""Modules of the package do not depend on each other in circles, for type checkers neither."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "python"
PAIRS = {
    # The parser suggests what was meant, and the suggestions come from the parser.
    frozenset(("guestnet.cli", "guestnet.cli.hints")),
    # Each is a kind of guest of the demo, and one builds on the other's base.
    frozenset(("guestnet.cli.demo.guests", "guestnet.cli.demo.memory")),
}
"""Two modules that know each other, with the reason. A third is one too many."""


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """What a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known.keys() or {node.module}
    return found & known.keys() - {"guestnet"}


def circles(graph: dict[str, set[str]]) -> list[frozenset[str]]:
    """Groups of modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        left = [start]
        while left:
            for after in graph.get(left.pop(), set()) - seen:
                seen.add(after)
                left.append(after)
        reached[start] = seen
    return [
        group
        for group in {
            frozenset(other for other in reached[one] if one in reached.get(other, set())) for one in graph
        }
        if len(group) > 1
    ]


def test_no_circle_of_imports_has_more_than_two_modules() -> None:
    known = modules()
    assert len(known) > 80
    # The package itself only lists names, and imports nothing before they are used.
    graph = {name: imports(path, known) - {name} for name, path in known.items() if name != "guestnet"}
    assert set(circles(graph)) <= PAIRS


def test_a_circle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert set(circles(graph)) == {frozenset("abc"), frozenset("de")}
