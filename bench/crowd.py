"""Many guests at once: their total throughput, how evenly it is shared, and what they cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import processes
from contenders import Contender
from guests import OUTSIDE, Arena, Failed, Guest
from lab.process import Timeout
from results import Results
from workloads import Row, Setting


def _stop(guest: Guest) -> None:
    """Ends a guest; one that does not end costs nobody else anything."""
    with contextlib.suppress(Timeout, OSError):
        guest.stop()


def _stream(guest: Guest, words: Sequence[str], number: int) -> float:
    """Gbit/s of one guest; a failure says whose it is."""
    try:
        return guest.ask(words, 60)["gbits"]
    except Failed as error:
        raise Failed(f"guest {number}: {error}") from error


@dataclass(frozen=True)
class Crowd:
    """`count` guests of one contender, each with a stream of its own at the same time."""

    id: str
    count: int
    rows: Sequence[Row]

    def run(
        self,
        arena: Arena,
        contender: Contender,
        setting: Setting,
        results: Results,
        say: Callable[[str], None],
    ) -> None:
        """Starts them, measures, and ends them; a failure is told and kept in the results."""
        guests: list[Guest] = []
        try:
            values = self._measure(arena, contender, setting, guests)
        except (Failed, Timeout, OSError, RuntimeError, AssertionError) as error:
            results.fail(contender.name, self, str(error)[-300:])
            say(f"  {self.id}, {contender.name}: FAILED: {str(error)[-300:]}")
            with contextlib.suppress(Timeout, OSError):
                arena.renew_server()
            return
        finally:
            # One after another, a hundred that do not hear a SIGTERM would take minutes.
            with ThreadPoolExecutor(self.count) as pool:
                list(pool.map(_stop, guests))
        for name, value in values.items():
            results.add(contender.name, name, value)
        shown = ", ".join(f"{values[r.id]:.{r.digits}f} {r.unit}" for r in self.rows if r.id in values)
        say(f"  {self.id}, {contender.name}: {shown}")

    def _measure(
        self, arena: Arena, contender: Contender, setting: Setting, guests: list[Guest]
    ) -> dict[str, float]:
        start = time.monotonic()
        guests += contender.group(arena, self.count)
        values = {f"{self.id}-start": time.monotonic() - start}
        # Longer than one stream takes: the last thread may begin late.
        ms = str(int(setting.seconds * 1000 + 10 * self.count))
        with ThreadPoolExecutor(self.count) as pool:
            for way in ("up", "down"):
                words = ["tcp", way, "1", ms, OUTSIDE]
                rates = list(pool.map(_stream, guests, repeat(words), range(1, self.count + 1)))
                values[f"{self.id}-{way}"] = sum(rates)
                values[f"{self.id}-{way}-share"] = min(rates) / max(rates) if max(rates) else 0.0
        own = sorted({pid for guest in guests for pid in guest.own()})
        if own:
            values[f"{self.id}-memory"] = processes.memory_kilobytes(own) / 1024
        return values


def crowds(full: bool) -> list[Crowd]:
    """16 guests; the full run 100 too."""
    return [_crowd(count) for count in ((16, 100) if full else (16,))]


def _crowd(count: int) -> Crowd:
    name = f"guests-{count}"
    rows = [
        Row(f"{name}-up", f"{count} guests at once, TCP up, together", "Gbit/s"),
        Row(f"{name}-up-share", f"{count} guests at once, TCP up: slowest of fastest", "share"),
        Row(f"{name}-down", f"{count} guests at once, TCP down, together", "Gbit/s"),
        Row(f"{name}-down-share", f"{count} guests at once, TCP down: slowest of fastest", "share"),
        Row(f"{name}-memory", f"{count} guests at once: memory", "MB", more=False, digits=0),
        Row(f"{name}-start", f"{count} guests: start of all, one after another", "s", more=False),
    ]
    return Crowd(name, count, rows)
