"""What `scripts/unused_dependencies.py` takes for a use."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "unused_dependencies", ROOT / "scripts" / "unused_dependencies.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_unused_dependencies_are_found(script: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path / "Cargo.toml",
        '[workspace]\nmembers = ["one"]\n[workspace.dependencies]\nlibc = "0.2"\nnobodys = "1"\n',
    )
    write(
        tmp_path / "one" / "Cargo.toml",
        '[dependencies]\nlibc.workspace = true\nused-twice = "1"\nonly-in-a-comment = "1"\n'
        "[target.'cfg(loom)'.dependencies]\nloom = \"1\"\n",
    )
    write(
        tmp_path / "one" / "src" / "lib.rs",
        "use used_twice::Thing;\nfn f() { libc::getpid(); } // only_in_a_comment::nothing\n",
    )
    write(tmp_path / "pyproject.toml", '[project]\ndependencies = ["rich>=14", "dnspython>=2", "absent"]\n')
    write(tmp_path / "python" / "one.py", "import rich\n\n\ndef f():\n    from dns import name\n")
    assert script.problems(tmp_path) == [
        "one/Cargo.toml: loom",
        "one/Cargo.toml: only-in-a-comment",
        "Cargo.toml: nobodys",
        "pyproject.toml: absent",
    ]


def test_the_repository_has_none(script: ModuleType) -> None:
    assert script.problems(ROOT) == []
