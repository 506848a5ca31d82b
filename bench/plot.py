"""Bars as SVG: one panel for each row, a bar for each contender, a whisker from lowest to highest.

Colours stay readable on light and on dark pages; text says all that colour says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from results import Results, RowLike

LABEL, BARS, VALUE, BAR, PANEL_GAP, HEAD = 150, 250, 120, 18, 22, 26
WIDTH = LABEL + BARS + VALUE
COLOURS = {"kernel": "#8a8f98", "guestnet": "#2f7ed8"}
PEER = "#c9a36a"
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #3c4048 }
.title { font-weight: 600; font-size: 13px }
.own { font-weight: 600 }
.whisker { stroke: #3c4048; stroke-width: 1 }
@media (prefers-color-scheme: dark) {
  text { fill: #d4d7dd } .whisker { stroke: #d4d7dd }
}
</style>"""
PICTURES: Sequence[tuple[str, bool, Sequence[str]]] = (
    (
        "race",
        False,
        ("tcp-up-1", "tcp-down-1", "udp-up-1400-200k", "connections", "keep-alive", "rr-tcp"),
    ),
    ("namespaces-tcp", False, ("tcp-up-1", "tcp-down-1", "tcp-up-4", "tcp-down-4")),
    (
        "namespaces-udp",
        False,
        tuple(
            f"udp-{way}-{kind}"
            for kind in ("64-200k", "1400-200k", "8000-50k")
            for way in ("up", "down")
        ),
    ),
    (
        "namespaces-latency",
        False,
        ("rr-tcp", "rr-udp", "p99-rr-tcp", "p99-rr-udp", "rr-tcp-busy", "rr-udp-busy"),
    ),
    ("namespaces-rates", False, ("connections", "keep-alive", "dns", "published-connections")),
    ("namespaces-published", False, ("published-in", "published-out")),
    ("namespaces-cost", False, ("cpu-tcp-up-1", "cpu-tcp-down-1", "memory", "idle-memory")),
    ("machines-tcp", True, ("tcp-up-1", "tcp-down-1", "tcp-up-4", "tcp-down-4")),
    ("machines-rates", True, ("rr-tcp", "rr-udp", "connections", "keep-alive")),
)  # fmt: skip


def number(value: float) -> str:
    """Three digits that count, as people write them."""
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


def _panel(results: Results, row: RowLike, names: Sequence[str], x: int, y: int) -> tuple[str, int]:
    """A panel with its top left corner there, and its height."""
    parts = [
        f'<text class="title" x="{x}" y="{y + 14}">{escape(row.title)}, {escape(row.unit)}'
        f"{'' if row.more else ' (less is better)'}</text>"
    ]
    spreads = {name: results.spread(name, row.id) for name in names}
    top = max((s.most for s in spreads.values() if s), default=0.0) or 1.0
    line = y + HEAD
    for name, spread in spreads.items():
        kind = results.contenders[name].kind
        own = ' class="own"' if kind == "guestnet" else ""
        middle = line + BAR // 2 + 4
        parts.append(f'<text{own} x="{x + LABEL - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>')
        if spread is None:
            word = "failed" if results.failed(name, row.id) else "not measured"
            parts.append(f'<text x="{x + LABEL}" y="{middle}">{word}</text>')
        else:
            wide = max(spread.median / top * BARS, 1.0)
            low, high = (x + LABEL + v / top * BARS for v in (spread.least, spread.most))
            colour = COLOURS.get(kind, PEER)
            box = f'x="{x + LABEL}" y="{line + 2}" width="{wide:.1f}" height="{BAR - 4}"'
            parts.append(f'<rect {box} rx="2" fill="{colour}"/>')
            if spread.count > 1:
                across = line + BAR // 2
                ends = f'x1="{low:.1f}" x2="{high:.1f}" y1="{across}" y2="{across}"'
                parts.append(f'<line class="whisker" {ends}/>')
            after = max(x + LABEL + wide, high) + 6
            parts.append(f'<text{own} x="{after:.1f}" y="{middle}">{number(spread.median)}</text>')
        line += BAR
    return "\n".join(parts), line - y


def picture(results: Results, rows: Sequence[RowLike], names: Sequence[str]) -> str:
    """One SVG: panels in two columns where there are several."""
    columns = 1 if len(rows) == 1 else 2
    y, parts = 8, []
    for at in range(0, len(rows), columns):
        heights = []
        for column, row in enumerate(rows[at : at + columns]):
            text, height = _panel(results, row, names, 8 + column * (WIDTH + 24), y)
            parts.append(text)
            heights.append(height)
        y += max(heights) + PANEL_GAP
    width = 16 + columns * WIDTH + (columns - 1) * 24
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}">'
    return "\n".join([head, STYLE, *parts, "</svg>"]) + "\n"


def pictures(results: Results) -> Iterator[tuple[str, str]]:
    """Name and SVG of every picture for which there are values."""
    for name, machine, ids in PICTURES:
        names = results.names(machine=machine)
        rows = [results.rows[i] for i in ids if i in results.rows]
        rows = [r for r in rows if any(results.spread(n, r.id) for n in names)]
        if rows:
            yield name, picture(results, rows, names)
