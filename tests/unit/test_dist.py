"""What is shown and shipped outside the repository: the README, the metadata, the source distribution."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check_dist() -> ModuleType:
    spec = spec_from_file_location("check_dist", ROOT / "scripts" / "check_dist.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("markdown", "links"),
    [
        ("see [guide](docs/guide.md)", ["docs/guide.md"]),
        ("![picture](race.svg)", ["race.svg"]),
        ('<img src="race.svg">', ["race.svg"]),
        ("[guide]: docs/guide.md", ["docs/guide.md"]),
        ("[a](https://example.org/) and [b](#there) and `[c](d)`", []),
        ("```\n[a](b)\n```\n", []),
    ],
)
def test_links_that_only_the_repository_has_are_found(
    check_dist: ModuleType, markdown: str, links: list[str]
) -> None:
    assert check_dist.relative_links(markdown) == links


def test_the_readme_is_right_outside_the_repository(check_dist: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert check_dist.relative_links(text) == []
    introduction = text.partition("\n## ")[0]
    assert "pip install" in introduction, "the introduction tells how to install it"


def test_the_documents_that_the_readme_names_are_there() -> None:
    import re

    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`([\w./-]+\.md)`", text))
    assert "docs/tutorial.md" in named
    assert all((ROOT / name).exists() for name in named)


def test_the_source_distribution_has_what_it_takes(check_dist: ModuleType, tmp_path: Path) -> None:
    maturin = Path(sys.prefix) / "bin" / "maturin"
    if not maturin.exists():
        pytest.skip("no maturin in this environment")
    done = subprocess.run(
        [maturin, "sdist", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    metadata = check_dist.sdist_metadata(sdist)
    assert metadata["Name"] == "guestnet"
    assert metadata["Version"] in sdist.name


def test_metadata_that_lacks_something_is_refused(check_dist: ModuleType) -> None:
    whole = (
        "Name: guestnet\nVersion: 1\nSummary: x\nRequires-Python: >=3.11\nLicense-Expression: MIT\n"
        "Description-Content-Type: text/markdown\nLicense-File: L\nClassifier: C\nKeywords: k\n"
        "Requires-Dist: rich\n\n# guestnet\n"
    )
    assert check_dist.check_metadata(whole, "x")["Version"] == "1"
    for line in whole.splitlines()[:-2]:
        with pytest.raises(check_dist.Wrong, match=line.partition(":")[0]):
            check_dist.check_metadata(whole.replace(f"{line}\n", ""), "x")
    with pytest.raises(check_dist.Wrong, match=r"docs/a\.md"):
        check_dist.check_metadata(f"{whole}[a](docs/a.md)\n", "x")
