"""The examples of the documentation run, and what it lists is what exists."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import guestnet
import pytest
from guestnet import NatConfig
from guestnet.cli import COMMANDS, arguments
from guestnet.model import events, spec

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
TOP = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(*languages: str) -> Iterator[tuple[Path, int, str]]:
    """The code blocks of all pages in these languages, each with its page and its number there."""
    for page in PAGES:
        for number, (language, code) in enumerate(BLOCK.findall(page.read_text()), 1):
            if language in languages:
                yield page, number, code


def command_lines() -> Iterator[tuple[str, str]]:
    """Every `guestnet ...` command line of the pages, each with the page that has it."""
    for page, _, code in blocks("", "sh", "console"):
        for line in code.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ )?(?:sudo )?(guestnet \S.*)", line.strip())
            if found and not re.search(r"\[|\.\.\.$", found[1]):
                yield name_of(page), found[1]


def words_of(line: str) -> list[str]:
    """The words of a command line, without what the shell takes for itself."""
    words = []
    for word in shlex.split(line, comments=True):
        if re.fullmatch(r"\|\|?|&&?|[0-9]?>.*|;", word):
            break
        words.append(word)
    return words


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=f"{name_of(page)}-{number}") for page, number, code in blocks("python")]
)
def test_python_example(code: str, tmp_path: Path) -> None:
    # The example's port of the host may be in use: any free one does.
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


@pytest.mark.parametrize(("page", "line"), [pytest.param(*one, id=" ".join(one)) for one in command_lines()])
def test_command_line_is_accepted(page: str, line: str) -> None:
    _, command, *words = words_of(line)
    if command in ("help", "doctor", "--version"):
        words = [] if command == "help" else words
        command = "doctor"
    parser = import_module(f"guestnet.cli.commands.{command}").parser()
    if command in ("run", "vm"):
        arguments.parse_with_command(parser, words, "CMD")
    else:
        parser.parse_args(words)


def test_command_lines_are_found() -> None:
    commands = {line.split()[1] for _, line in command_lines()}
    assert {"run", "vm", "up", "nat", "doctor"} <= commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_reference(command: str) -> None:
    parser = import_module(f"guestnet.cli.commands.{command}").parser()
    page = (REFERENCE / "command-line.md").read_text()
    sections = [part for part in re.split(r"^## ", page, flags=re.MULTILINE) if names(part, command)]
    listed = set(
        re.findall(r"`(?:\w+ )?(--?[a-z][a-z-]*)", "".join(rows(part, command) for part in sections))
    )
    assert listed >= set(parser.option_names()) - {"-h", "--help"}


@pytest.mark.parametrize(
    "option", re.findall(r"^\| .*?(--[a-z-]+)", (REFERENCE / "command-line.md").read_text(), re.M)
)
def test_every_option_of_the_reference_exists(option: str) -> None:
    known = {
        name
        for command in COMMANDS
        for name in import_module(f"guestnet.cli.commands.{command}").parser().option_names()
    }
    assert option in known | {"--help"}


def names(section: str, command: str) -> bool:
    return f"`{command}`" in section.splitlines()[0]


def rows(section: str, command: str) -> str:
    """The rows of a section; of rows that name a command, those of this one."""
    others = tuple(f"| `{other} -" for other in COMMANDS if other != command)
    return "\n".join(row for row in section.splitlines() if not row.startswith(others))


def test_every_setting_is_in_the_reference() -> None:
    section = (REFERENCE / "python.md").read_text().partition("## Settings")[2]
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
    assert sorted(listed) == sorted(NatConfig.__dataclass_fields__)


def test_every_public_name_is_in_the_reference() -> None:
    listed = set(re.findall(r"`(\w+)`", (REFERENCE / "python.md").read_text()))
    assert not set(guestnet.__all__) - listed


@pytest.mark.parametrize(("heading", "known"), [("Limits", spec.LIMITS), ("Timeouts", spec.TIMEOUTS)])
def test_every_limit_is_in_the_reference(heading: str, known: tuple[str, ...]) -> None:
    section = (REFERENCE / "limits.md").read_text().partition(f"## {heading}")[2].partition("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    assert set(listed) == set(known)
    source = (ROOT / "crates/guestnet-core/src/interface/config.rs").read_text()
    for name, value in listed.items():
        default = re.search(rf"\b{name}: ([\d_]+(?: << \d+)?),", source)
        if value.isdigit():
            assert default, f"{name} has no default in the source"
            number, _, shift = default[1].replace("_", "").partition(" << ")
            assert int(value) == int(number) << int(shift or 0), name


def test_every_event_is_in_the_reference() -> None:
    listed = set(re.findall(r"`(\w+)`", "".join(first_cells("## Events"))))
    classes = {
        one for one in vars(events).values() if isinstance(one, type) and one.__module__ == events.__name__
    }
    emitted = {one.__name__ for one in classes} - {"NetworkEvent", "FlowEvent"}
    for file in (ROOT / "python/guestnet").rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args:
                first = call.args[0]
                named = isinstance(first, ast.Constant) and isinstance(first.value, str)
                if named and call.func.attr == "tell":
                    emitted.add(first.value)
    assert emitted
    assert emitted | {"lines_lost"} == listed


def first_cells(heading: str) -> list[str]:
    """The first cells of the tables of a section of events.md."""
    section = (REFERENCE / "events.md").read_text().partition(heading)[2].partition("\n## ")[0]
    return re.findall(r"^\| (.*?) \|", section, re.MULTILINE)


def test_every_reason_of_a_drop_is_in_the_reference() -> None:
    from guestnet import NatNetwork

    with NatNetwork() as network:
        reasons = set(network.stats().drops)
    assert set(re.findall(r"`(\w+)`", "".join(first_cells("## Drop reasons")))) == reasons


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), f"links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
            assert anchor in anchors, f"links to {target}#{anchor}"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    assert not [
        page.name
        for page in DOCS.rglob("*.md")
        if page.parent.name in ("how-to", "reference") and page.name not in index
    ]


SOURCES = [
    path
    for folder in ("crates", "python", "tests", "bench", "benches", "scripts", "fuzz")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".rs", ".py", ".pyi", ".sh") and "target" not in path.parts
]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    known = [f"/{path.relative_to(ROOT).as_posix()}" for path in SOURCES]
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([\w/]+\.(?:rs|pyi?|sh))`", text)) - {"build.sh", "vm-network.sh"}
    assert not [name for name in named if not any(path.endswith(f"/{name}") for path in known)]


def test_tests_that_the_security_page_names_exist() -> None:
    page = (DOCS / "security.md").read_text().partition("## Attacks")[2]
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", page, re.MULTILINE)]
    cells = [row[3] for row in rows[1:] if len(row) > 3]
    assert cells
    attacks = [row[1] for row in rows[1:]]
    assert sorted(set(attacks)) == sorted(attacks), "an attack has two rows"
    text = "\n".join(path.read_text() for path in SOURCES)
    functions = set(re.findall(r"\b(?:fn|def) (\w+)\(", text))
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    files = {path.stem for path in SOURCES} | {path.parent.name for path in SOURCES}
    assert not {name for name in names if name not in functions | files} - {"guestnet_core", "guestnet_io"}
