"""The examples of the documentation run, and what it lists is what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/guide.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(code, id=f"{page}-{number}")
    for page in PAGES
    for number, code in enumerate(BLOCK.findall((ROOT / page).read_text()), 1)
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, tmp_path: Path) -> None:
    # The ports that it publishes are of the machine: any free one does.
    code = re.sub(r'publish\("8080:', 'publish("127.0.0.1:0:', code)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr


def test_links_lead_somewhere() -> None:
    pages = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "docs/security.md")
    for page in (*PAGES, *pages):
        path = ROOT / page
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{page} links to {target}"


def test_every_reason_of_a_drop_is_explained() -> None:
    from guestnet import NatNetwork

    with NatNetwork() as network:
        reasons = set(network.stats().drops)
    told = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/guide.md").read_text(), re.MULTILINE))
    assert told == reasons
