"""A path that delays and loses frames, between a guest's TAP and whatever serves it: what netem does where the
kernel has it. Each frame takes `delay` seconds, and each is lost with the same probability, by itself; the
seed decides which."""

from __future__ import annotations

import contextlib
import os
import random
import select
import time
from collections import deque
from dataclasses import dataclass, field

FRAME_MAX = 65536
BURST = 64
"""Frames that are read at once before others are sent on."""


@dataclass
class Way:
    """One direction: from one descriptor to the other, each read and write one frame."""

    source: int
    target: int
    loss: float
    delay: float
    random: random.Random
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    passed: int = 0
    lost: int = 0
    refused: int = 0
    """Frames for which the target had no room; none are to be, or it is not the path that is measured."""

    def take(self, now: float) -> None:
        for _ in range(BURST):
            try:
                frame = os.read(self.source, FRAME_MAX)
            except (BlockingIOError, OSError):
                return
            if not frame:
                return
            if self.random.random() < self.loss:
                self.lost += 1
            else:
                self.waiting.append((now + self.delay, frame))

    def give(self, now: float) -> None:
        while self.waiting and self.waiting[0][0] <= now:
            _, frame = self.waiting.popleft()
            try:
                os.write(self.target, frame)
                self.passed += 1
            except OSError:
                self.refused += 1


def forward(a: int, b: int, *, loss: float, delay: float, seed: int, stop: int) -> tuple[Way, Way]:
    """Carries frames between two descriptors until `stop` is readable; returns what either way saw.
    `delay` is one way, in seconds; `loss` from 0 to 1."""
    chance = random.Random(seed)
    ways = Way(a, b, loss, delay, chance), Way(b, a, loss, delay, chance)
    for fd in (a, b):
        os.set_blocking(fd, False)
    while True:
        now = time.monotonic()
        due = [way.waiting[0][0] for way in ways if way.waiting]
        timeout = max(0.0, min(due) - now) if due else None
        ready: list[int] = []
        with contextlib.suppress(InterruptedError):
            ready, _, _ = select.select([a, b, stop], [], [], timeout)
        if stop in ready:
            return ways
        now = time.monotonic()
        for way in ways:
            if way.source in ready:
                way.take(now)
            way.give(now)
