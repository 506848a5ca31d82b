"""The results as Markdown: the complete table, a short one for README.md, and the goals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import plot
from results import NS, Results, RowLike, Spread, judge

MARKS = ("<!-- race: begin -->", "<!-- race: end -->")
SHORT = ("tcp-up-1", "tcp-down-1", "udp-up-1400-200k", "connections", "keep-alive", "rr-tcp", "idle-memory")


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def cell(spread: Spread | None, digits: int, failed: int) -> str:
    """Median, and the ends in brackets where there are several values; how often it failed."""
    text = ""
    if spread is not None:
        text = number(spread.median, digits)
        if spread.count > 1:
            text += f" [{number(spread.least, digits)} {number(spread.most, digits)}]"
    if failed:
        text += f" failed {failed}x" if text else f"failed {failed}x"
    return text or "-"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    made = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(made + ["| " + " | ".join(line) + " |" for line in lines])


def _line(results: Results, row: RowLike, names: Sequence[str], own: str, *, machine: bool) -> list[str]:
    cells = [cell(results.spread(n, row.id), row.digits, results.failed(n, row.id)) for n in names]
    best = results.best_peer(row.id, machine=machine)
    limits = results.names(machine=machine, kind="kernel")
    against = ratio(results.ratio(own, best, row.id))
    return [
        row.title,
        f"{row.unit}{'' if row.more else ' (less is better)'}",
        *cells,
        f"{against} ({best})" if best and against != "-" else against,
        ratio(results.ratio(own, limits[0] if limits else None, row.id)),
    ]


def table(results: Results, *, machine: bool) -> str:
    """All rows of namespaces or of machines; empty when there are none."""
    names = results.names(machine=machine)
    rows = [
        row
        for row in results.rows.values()
        if any(results.spread(n, row.id) or results.failed(n, row.id) for n in names)
    ]
    owns = results.names(machine=machine, kind="guestnet")
    own = NS if NS in owns else (owns[0] if owns else "")
    if not rows:
        return ""
    head = ["", "unit", *names, f"{own} : best peer", f"{own} : limit"]
    return grid(head, [_line(results, row, names, own, machine=machine) for row in rows])


def goals(results: Results) -> str:
    """Each goal, what was wanted, what was seen."""
    lines = []
    for found in judge(results):
        goal = found.goal
        less = not results.rows[goal.row].more
        word = {True: "reached", False: "**not reached**", None: "not measured"}[found.reached]
        wanted = f"{'at most' if less else 'at least'} {found.wanted:.2f}"
        lines.append([goal.title, found.own, found.against, wanted, ratio(found.ratio), word])
    head = ["goal", "whose median", "against that of", "ratio wanted", "seen", ""]
    return grid(head, lines) if lines else ""


def failures(results: Results) -> str:
    """What each contender could not do, with what it said last."""
    lines = [
        f"- {name}, {results.rows[row].title}: {len(texts)} times; last: {' '.join(texts[-1].split())[:200]}"
        for name, rows in results.failures.items()
        for row, texts in rows.items()
    ]
    return "\n".join(lines)


def short(results: Results) -> str:
    """The few rows of README.md: the kernel, guestnet, and the best that a peer does."""
    kernel = results.names(machine=False, kind="kernel")
    lines = []
    for name in SHORT:
        row = results.rows.get(name)
        own = results.spread(NS, name)
        if row is None or own is None:
            continue
        best = results.best_peer(name, machine=False)
        limit = results.spread(kernel[0], name) if kernel else None
        peer = results.spread(best, name) if best else None
        lines.append(
            [
                f"{row.title}, {row.unit}{'' if row.more else ' (less is better)'}",
                number(limit.median, row.digits) if limit else "-",
                number(own.median, row.digits),
                f"{number(peer.median, row.digits)} ({best})" if peer else "-",
            ]
        )
    return grid(["namespace, MTU 1500, medians", "kernel (limit)", "guestnet", "best peer"], lines)


def about(results: Results) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in results.about.items())


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [
        "# Benchmark results",
        about(results),
        "A cell is the median of the rounds with [lowest highest]. The last columns are ratios of medians: of"
        " guestnet to the best peer at its best MTU, and to the limit, which is the kernel's own NAT (for"
        " machines: QEMU's TAP device and the kernel's NAT).",
    ]
    for title, machine in (("Namespaces", False), ("Virtual machines", True)):
        if text := table(results, machine=machine):
            parts += [f"## {title}", text]
    for title, text in (("Goals", goals(results)), ("Failures", failures(results))):
        if text:
            parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def write(results: Results, directory: Path, more: str = "") -> list[Path]:
    """The report and its pictures into `directory`; gives what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    pictures = []
    for name, svg in plot.pictures(results):
        path = directory / f"{name}.svg"
        path.write_text(svg, encoding="utf-8")
        written.append(path)
        pictures.append(f"![{name}]({path.name})")
    text = markdown(results)
    if pictures:
        text += "\n## Pictures\n\n" + "\n\n".join(pictures) + "\n"
    path = directory / "README.md"
    path.write_text(text + more, encoding="utf-8")
    return [*written, path]


def publish(results: Results, root: Path) -> list[Path]:
    """Writes docs/performance, and the part of README.md between its marks."""
    directory = root / "docs" / "performance"
    notes = "\n## Why\n\n[notes.md](notes.md): what was tried, and what stands in the way of goals.\n"
    written = write(results, directory, notes)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    begin, end = MARKS
    if begin in text and end in text:
        block = f"{begin}\n{short(results)}\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: block, text, flags=re.S)
        readme.write_text(text, encoding="utf-8")
        written.append(readme)
    return written
