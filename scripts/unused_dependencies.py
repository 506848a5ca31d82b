#!/usr/bin/env python3
"""Finds dependencies that nothing uses.

A Rust crate uses a dependency where one of its sources names it; the workspace uses one where a member
inherits it. The Python package uses one where a module imports it. Names are searched in the text, without
comments, so a dependency that only a macro of another crate needs has to be named here in EXCEPT.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXCEPT: frozenset[str] = frozenset()
COMMENT = re.compile(r"//[^\n]*")
KINDS = ("dependencies", "dev-dependencies", "build-dependencies")
IMPORTED_AS = {"dnspython": "dns"}
"""Where a Python distribution and its package have different names."""


def tables(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tables of a manifest that list dependencies, those of one platform included."""
    for part in [manifest, *manifest.get("target", {}).values()]:
        for kind in KINDS:
            yield part.get(kind, {})


def unused_of_crate(manifest: Path) -> list[str]:
    """Dependencies of a crate that none of its sources names."""
    sources = (path for path in manifest.parent.rglob("*.rs") if "target" not in path.parts)
    text = "\n".join(COMMENT.sub("", path.read_text()) for path in sources)
    declared = {name for table in tables(tomllib.loads(manifest.read_text())) for name in table}
    return sorted(
        name for name in declared - EXCEPT if not re.search(rf"\b{name.replace('-', '_')}\b(::|;| as )", text)
    )


def unused_of_workspace(root: Path) -> list[str]:
    """Dependencies of the workspace that no member inherits."""
    workspace = tomllib.loads((root / "Cargo.toml").read_text())["workspace"]
    inherited = {
        name
        for member in workspace["members"]
        for table in tables(tomllib.loads((root / member / "Cargo.toml").read_text()))
        for name, value in table.items()
        if isinstance(value, dict) and value.get("workspace")
    }
    return sorted(set(workspace.get("dependencies", {})) - inherited)


def unused_of_package(root: Path) -> list[str]:
    """Dependencies of the Python package that no module imports."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    text = "\n".join(path.read_text() for path in (root / "python").rglob("*.py"))
    names = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in project["dependencies"]]
    return sorted(
        name
        for name in names
        if not re.search(rf"^\s*(from|import) {IMPORTED_AS.get(name, name)}\b", text, re.MULTILINE)
    )


def manifests(root: Path) -> list[Path]:
    """The manifests of all crates, those outside the workspace included."""
    members = tomllib.loads((root / "Cargo.toml").read_text())["workspace"]["members"]
    crates = [*members, "fuzz", "benches/engine"]
    return [root / crate / "Cargo.toml" for crate in crates if (root / crate / "Cargo.toml").exists()]


def problems(root: Path) -> list[str]:
    """What is declared and not used, a line each."""
    found = [
        f"{manifest.relative_to(root)}: {name}"
        for manifest in manifests(root)
        for name in unused_of_crate(manifest)
    ]
    found += [f"Cargo.toml: {name}" for name in unused_of_workspace(root)]
    return found + [f"pyproject.toml: {name}" for name in unused_of_package(root)]


def main() -> int:
    """Prints what is not used; 1 when there is something."""
    found = problems(ROOT)
    for line in found:
        print(f"{line} is not used: remove it")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
