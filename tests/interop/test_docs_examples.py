"""The console examples of the documentation run in the lab and print what the page says they print."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from lab.namespaces import Lab
from lab.runner import GUESTNET, GuestRunner

DOCS = Path(__file__).resolve().parents[2] / "docs"
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if CONSOLE.search(page.read_text())]
OUTSIDE = (("https://example.org/", "http://www.example.test/"), ("example.org", "www.example.test"))
"""Names of the internet, and what the lab has in their place."""
MARK = "@@ command"


def examples(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a page, each with the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for block in CONSOLE.findall(text):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def as_pattern(line: str) -> str:
    """A pattern for a line of output: runs of spaces are alike, and `...` stands for anything."""
    words = " ".join(line.split())
    return ".*".join(re.escape(part) for part in words.split("..."))


def in_the_lab(command: str) -> str:
    for internet, ours in OUTSIDE:
        command = command.replace(internet, ours)
    return command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_console_examples(page: Path, lab: Lab, guest: GuestRunner) -> None:
    commands = examples(page.read_text())
    script = [f"cd {lab.dir}", f"export PATH={Path(GUESTNET).parent}:$PATH"]
    for command, _ in commands:
        script += [f"echo {MARK}", in_the_lab(command)]
    script += ["kill $(jobs -p) 2>/dev/null; wait"]
    done = lab.run(["bash", "-c", "\n".join(script)], ordinary=True, seconds=100)
    outputs = done.stdout.split(f"{MARK}\n")[1:]
    assert len(outputs) == len(commands), done.stdout + done.stderr
    for (command, wanted), output in zip(commands, outputs, strict=True):
        lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
        pattern = "\n".join(map(as_pattern, wanted))
        assert re.fullmatch(pattern, "\n".join(lines)), f"{command}\n{output}\n{done.stderr}"


def test_there_are_console_examples() -> None:
    assert DOCS / "tutorial.md" in PAGES
    assert os.access(GUESTNET, os.X_OK)
