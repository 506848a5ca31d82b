"""The API reference of the Python package builds, and what pdoc warns of is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import guestnet
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def build(target: Path, *modules: str) -> subprocess.CompletedProcess[str]:
    """Builds a reference in a process of its own: pdoc keeps what it has read."""
    chosen = f"build_docs.MODULES = {modules!r}; " if modules else ""
    code = (
        f"import sys, pathlib; sys.path[:0] = [{str(SCRIPTS)!r}, {str(target.parent)!r}]; import build_docs; "
        f"{chosen}sys.argv = ['build_docs.py', {str(target)!r}, 'python']; sys.exit(build_docs.main())"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_python_reference_has_every_public_name(tmp_path: Path) -> None:
    done = build(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "python" / "guestnet.html").read_text()
    assert not [name for name in guestnet.__all__ if f'id="{name}"' not in page]


@pytest.mark.parametrize(
    ("source", "status"),
    [("value: Missing\n", 1), ("class A:\n    _value: Missing\n", 0), ("value: int = 1\n", 0)],
)
def test_a_warning_is_an_error_unless_it_is_about_a_private_attribute(
    source: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "annotated.py").write_text(f"from __future__ import annotations\n{source}")
    done = build(tmp_path / "out", "annotated")
    assert done.returncode == status, done.stderr
    assert ("Missing" in done.stderr) == bool(status)
