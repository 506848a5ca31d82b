"""The counters of a network as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any


def stats_rows(stats: Any) -> list[tuple[str, str]]:
    """The name and value of every counter that is not zero. Those of a group carry its name."""
    return [(name, f"{value:,}") for name, value in _flat("", _mapping(stats)) if value]


def stats_lines(stats: Any) -> list[str]:
    """The same as lines, for `--stats`."""
    rows = stats_rows(stats)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {value:>16}" for name, value in rows]


def _mapping(stats: Any) -> Mapping[str, Any]:
    if isinstance(stats, Mapping):
        return stats
    if is_dataclass(stats) and not isinstance(stats, type):
        return asdict(stats)
    return dict(stats.as_dict())


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    for key, value in values.items():
        name = f"{prefix} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            found += _flat(name, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append((name, value))
    return found
