#!/usr/bin/env python3
"""Finds circles of imports between the files of each crate and of the Python package.

Files that import each other in a circle can only be understood together. A circle of two files is allowed
where ALLOWED gives its reason; larger ones never are. An import counts for the file that defines what is
imported, not for one that only re-exports it. Tests do not count, and neither do Python imports for type
checkers alone.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ALLOWED: dict[frozenset[str], str] = {
    frozenset(
        ("crates/guestnet-core/src/l3/gateway.rs", "crates/guestnet-core/src/l3/router.rs")
    ): "the gateway keeps the state of the IPv6 router, whose frames the gateway builds",
    frozenset(
        ("crates/guestnet-core/src/relay/tcp/mod.rs", "crates/guestnet-core/src/relay/tcp/recovery.rs")
    ): "the record of a connection holds the state of its loss recovery, which works on the record",
    frozenset(("python/guestnet/cli/__init__.py", "python/guestnet/cli/hints.py")): (
        "the entry point names the commands, and imports hints only for a command that is unknown"
    ),
    frozenset(("python/guestnet/cli/demo/guests.py", "python/guestnet/cli/demo/memory.py")): (
        "a guest in memory is one kind of guest, and is imported only when one is made"
    ),
}
"""Circles of two files that are allowed, by their paths below ROOT, each with its reason."""

Graph = dict[str, set[str]]


# --- Rust ---


def without_tests(text: str) -> str:
    """The source without comments, strings and inline test modules; lines do not matter any more."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r'"(?:\\.|[^"\\])*"', '""', text)
    found = re.search(r"#\[cfg\((?:all\()?test[^\]]*\]\s*(?:pub(?:\([a-z]+\))? )?mod \w+ \{", text)
    return text[: found.start()] if found else text


def test_modules(text: str) -> set[str]:
    """Modules in files of their own that only tests have."""
    text = re.sub(r"//[^\n]*", "", text)
    return set(
        re.findall(r"#\[cfg\(test\)\]\s*(?:#\[path[^\]]*\]\s*)?(?:pub(?:\([a-z]+\))? )?mod (\w+);", text)
    )


def leaves(tree: str, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The paths of a use tree, each with the name that it has here."""
    tree = tree.strip()
    if tree.endswith("}"):
        head, _, inner = tree.partition("{")
        path = prefix + tuple(p for p in head.strip().split("::") if p)
        depth, start = 0, 0
        inner = inner[:-1]
        for i, c in enumerate([*inner, ","]):
            depth += {"{": 1, "}": -1}.get(c, 0)
            if c == "," and depth == 0:
                if inner[start:i].strip():
                    yield from leaves(inner[start:i], path)
                start = i + 1
        return
    tree, _, alias = tree.partition(" as ")
    path = prefix + tuple(p for p in tree.strip().split("::") if p)
    if path and path[-1] == "self":
        path = path[:-1]
    if path:
        yield path, (alias or path[-1]).strip()


class Crate:
    """The modules of one crate."""

    def __init__(self, source: Path) -> None:
        self.files: dict[tuple[str, ...], Path] = {}
        self.text: dict[tuple[str, ...], str] = {}
        self.exports: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
        self.globs: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        tests: set[tuple[str, ...]] = set()
        for path in sorted(source.rglob("*.rs")):
            name = path.relative_to(source).with_suffix("").parts
            module = name[:-1] if name[-1] in ("mod", "lib", "main") else name
            text = path.read_text(encoding="utf-8")
            tests |= {(*module, t) for t in test_modules(text)}
            self.files[module] = path
            self.text[module] = without_tests(text)
        for module in [m for m in self.files if any(m[: len(t)] == t for t in tests)]:
            del self.files[module], self.text[module]
        for module, text in self.text.items():
            self.exports[module], self.globs[module] = {}, []
            for tree in re.findall(r"\bpub(?:\([a-z ]+\))? use ([^;]+);", text):
                for path, name in leaves(tree):
                    target = self.absolute(module, path)
                    if name == "*":
                        self.globs[module].append(target[:-1])
                    else:
                        self.exports[module][name] = target

    def absolute(self, module: tuple[str, ...], path: tuple[str, ...]) -> tuple[str, ...]:
        """A path from the root of the crate; what begins with another crate's name finds no module there."""
        if path[0] == "crate":
            return path[1:]
        base = module
        while path and path[0] in ("self", "super"):
            base = base[:-1] if path[0] == "super" else base
            path = path[1:]
            if not path or path[0] != "super":
                return base + path
        # A child module may be named without `self`.
        return base + path if base + path[:1] in self.files else ("", *path)

    def defining(self, path: tuple[str, ...], depth: int = 0) -> tuple[str, ...] | None:
        """The module of the file that defines what a path names."""
        for n in range(len(path), -1, -1):
            module = path[:n]
            if module not in self.files:
                continue
            rest = path[n:]
            if not rest or depth > 8:
                return module
            target = self.exports[module].get(rest[0])
            if target is not None:
                return self.defining(target + rest[1:], depth + 1)
            for glob in self.globs[module]:
                where = self.defining(glob, depth + 1)
                item = rf"\b(?:fn|struct|enum|trait|const|type|static) {rest[0]}\b"
                if where is not None and re.search(item, self.text[where]):
                    return where
            return module
        return None

    def graph(self) -> Graph:
        """Which file imports which."""
        out: Graph = {}
        for module, text in self.text.items():
            here = out.setdefault(self.name(module), set())
            code = re.sub(r"\buse [^;]+;", "", text)
            uses = [tuple(p.split("::")) for p in re.findall(r"\bcrate(?:::\w+)+", code)]
            for public, tree in re.findall(r"(\bpub(?:\([a-z ]+\))? )?\buse ([^;]+);", text):
                # What is only re-exported is not used here.
                uses += [
                    p
                    for p, name in leaves(tree)
                    if not public or (name != "*" and re.search(rf"\b{name}\b", code))
                ]
            for path in uses:
                where = self.defining(self.absolute(module, path)) if path else None
                if where and where != module:
                    here.add(self.name(where))
        return out

    def name(self, module: tuple[str, ...]) -> str:
        """The path of a module's file."""
        return str(self.files[module].relative_to(ROOT))


# --- Python ---


def python_graph(package: Path) -> Graph:
    """Which file of a package imports which."""
    files = {
        ".".join(p.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): p
        for p in sorted(package.rglob("*.py"))
    }
    out: Graph = {}
    for module, path in files.items():
        here = out.setdefault(str(path.relative_to(ROOT)), set())
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in runtime_nodes(tree):
            for target in imported(node, inside, files):
                if files[target] != path:
                    here.add(str(files[target].relative_to(ROOT)))
    return out


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def imported(node: ast.AST, inside: str, files: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names if a.name in files)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = inside.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            if f"{base}.{alias.name}" in files:
                yield f"{base}.{alias.name}"
            elif base in files:
                yield base


# --- circles ---


def circles(graph: Graph) -> list[list[str]]:
    """The sets of files that reach each other, each sorted (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(v: str) -> None:
        order[v] = low[v] = len(order)
        stack.append(v)
        for w in sorted(graph.get(v, ())):
            if w not in order:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], order[w])
        if low[v] == order[v]:
            at = stack.index(v)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for v in sorted(graph):
        if v not in order:
            visit(v)
    return found


def problems(graphs: list[Graph], allowed: dict[frozenset[str], str]) -> list[str]:
    """What is wrong, a line each."""
    seen = [frozenset(c) for g in graphs for c in circles(g)]
    out = [describe(c) for c in seen if c not in allowed]
    out += [f"allowed, but not there any more: {', '.join(sorted(c))}" for c in allowed if c not in seen]
    return out + [f"too large to be allowed: {', '.join(sorted(c))}" for c in allowed if len(c) > 2]


def describe(circle: Iterable[str]) -> str:
    """One line about a circle."""
    files = sorted(circle)
    return f"{len(files)} files import each other: {', '.join(files)}"


def main() -> int:
    """Reports; 1 when there is a circle that is not allowed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edges", action="store_true", help="list the imports inside each circle too")
    args = parser.parse_args()
    graphs = [Crate(c).graph() for c in sorted((ROOT / "crates").glob("*/src"))]
    graphs.append(python_graph(ROOT / "python" / "guestnet"))
    found = problems(graphs, ALLOWED)
    print("\n".join(found) or "no circles of imports but those that are allowed")
    if args.edges:
        for g in graphs:
            for c in circles(g):
                for f in c:
                    print(f, "->", ", ".join(sorted(g[f] & set(c))))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
