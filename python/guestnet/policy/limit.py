"""Limits on what guests carry."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from guestnet.errors import PolicyError
from guestnet.model.frozen_record import FrozenRecord
from guestnet.policy.destination import _short, nearest

_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTES |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([a-z]*)")
RATE_MOST = 10**12
COUNT_MOST = 10**9
TOTAL_MOST = 1 << 60
_COUNTS = {"packets": "packets", "new-flows": "new_flows", "flows": "open_flows", "queries": "queries"}
"""Words of the text, and the fields that they set."""
_WORDS = (*_COUNTS, "total")
_EXAMPLE = "write one such as 10mbit/2mbit, or 10mbit,flows=100,new-flows=20,queries=50,total=10gb"


class Limit(FrozenRecord):
    """Limits of a guest, of a network, or of the flows that a rule admits. What is None has no limit.

    Example:
        >>> limit = Limit.from_text("10mbit/2mbit,flows=100")
        >>> limit.down, limit.up, limit.open_flows
        (10000000, 2000000, 100)
        >>> print(limit)
        10mbit/2mbit,flows=100
    """

    down: int | None = None
    """Bits a second to guests."""
    up: int | None = None
    """Bits a second from guests."""
    packets_down: int | None = None
    """Packets a second to guests."""
    packets_up: int | None = None
    """Packets a second from guests."""
    new_flows: int | None = None
    """Flows that are opened a second."""
    open_flows: int | None = None
    """Flows that are open at the same time."""
    queries: int | None = None
    """DNS queries a second."""
    total: int | None = None
    """Bytes both ways together, after which nothing passes any more."""

    def __post_init__(self) -> None:
        for name in ("down", "up"):
            _check(name, getattr(self, name), 8000, RATE_MOST)
        for name in ("packets_down", "packets_up", "new_flows", "open_flows", "queries"):
            _check(name, getattr(self, name), 1, COUNT_MOST)
        _check("total", self.total, 1, TOTAL_MOST)

    @classmethod
    def from_text(cls, text: str) -> Limit:
        """Reads a limit.

        Args:
            text: Rates to and from guests as `DOWN/UP`, or one for both ways: `10mbit/2mbit`, `500kbit`,
                `1gbit`. Words follow, or stand alone: `packets=1000` (a second, each way), `new-flows=20` (a
                second), `flows=100` (open at once), `queries=50` (of DNS, a second), `total=10gb`.

        Returns:
            The limit.

        Raises:
            PolicyError: It cannot be read.
        """
        if not isinstance(text, str):
            raise PolicyError(f"The limit {_short(text)} is not text: {_EXAMPLE}.")
        found: dict[str, int] = {}
        for part in text.strip().split(","):
            word, equals, value = part.strip().partition("=")
            if not equals:
                down, slash, up = word.partition("/")
                if "down" in found:
                    raise PolicyError(f"The limit {_short(text)} has two rates: {_EXAMPLE}.")
                found["down"] = _amount(text, down, _BITS)
                found["up"] = _amount(text, up if slash else down, _BITS)
            elif word in _COUNTS:
                names = ("packets_down", "packets_up") if word == "packets" else (_COUNTS[word],)
                found |= dict.fromkeys(names, _amount(text, value, {"": 1}))
            elif word == "total":
                found["total"] = _amount(text, value, _BYTES)
            else:
                raise PolicyError(
                    f"The limit {_short(text)} has no {word!r}: its words are {', '.join(_WORDS)}."
                    f"{nearest(word, _WORDS)}"
                )
        return cls(**found)

    @classmethod
    def of(cls, value: object) -> Limit | None:
        """A limit from what an argument may be.

        Args:
            value: A `Limit`, its text, a mapping with its fields, or None.

        Returns:
            The limit; None for None.

        Raises:
            PolicyError: It is none of these.
        """
        if value is None or isinstance(value, Limit):
            return value
        if isinstance(value, Mapping):
            unknown = [name for name in value if name not in cls._fields]
            if unknown:
                raise PolicyError(f"A limit has no {_short(unknown[0])}: {_EXAMPLE}.")
            return cls(**value)
        if isinstance(value, str):
            return cls.from_text(value)
        raise PolicyError(f"The limit {_short(value)} is not a limit: {_EXAMPLE}.")

    def __str__(self) -> str:
        parts = []
        if self.down is not None and self.up is not None:
            rates = [_shortest(self.down, _BITS), _shortest(self.up, _BITS)]
            parts.append(rates[0] if rates[0] == rates[1] else "/".join(rates))
        if self.packets_down is not None:
            parts.append(f"packets={self.packets_down}")
        parts += [
            f"{word}={getattr(self, name)}"
            for word, name in _COUNTS.items()
            if word != "packets" and getattr(self, name) is not None
        ]
        if self.total is not None:
            parts.append(f"total={_shortest(self.total, _BYTES)}")
        return ",".join(parts)

    def to_data(self) -> str | dict[str, int]:
        """The limit as plain data that `of` reads: its text, or a mapping where the text cannot say it.

        Returns:
            The data.
        """
        text = str(self)
        if text and Limit.from_text(text) == self:
            return text
        found: dict[str, Any] = {name: getattr(self, name) for name in Limit._fields}
        return {name: value for name, value in found.items() if value is not None}

    def for_data_plane(self) -> tuple[int | None, ...]:
        """The numbers that the data plane takes, with rates in bytes.

        Returns:
            Bytes from and to guests, packets from and to them, new flows, open flows, queries, the total.
        """
        up, down = (None if rate is None else math.ceil(rate / 8) for rate in (self.up, self.down))
        return (
            *(up, down, self.packets_up, self.packets_down),
            *(self.new_flows, self.open_flows, self.queries, self.total),
        )


def _amount(text: str, word: str, units: Mapping[str, int]) -> int:
    found = _AMOUNT.fullmatch(word.strip().lower())
    unit = units.get(found[2]) if found else None
    if found is None or unit is None:
        known = ", ".join(filter(None, units))
        what = f" with one of {known}" if known else ""
        raise PolicyError(f"The limit {_short(text)} has {word!r}, which is no number{what}: {_EXAMPLE}.")
    return round(float(found[1]) * unit)


def _shortest(number: int, units: Mapping[str, int]) -> str:
    best = max((size, unit) for unit, size in units.items() if number % size == 0)
    return f"{number // best[0]}{best[1]}"


def _check(name: str, value: object, lowest: int, highest: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise PolicyError(f"{name} {_short(value)} of a limit is not a whole number: {_EXAMPLE}.")
    if not lowest <= value <= highest:
        raise PolicyError(f"{name} {value} of a limit is not between {lowest} and {highest}: {_EXAMPLE}.")
