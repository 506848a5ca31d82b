"""Blocking work for asyncio programs, taken back when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable


async def in_thread(work: Callable[[], object], undo: Callable[[], object]) -> None:
    """Does `work` in a thread. A thread cannot be cancelled, so where the waiting is, `undo` follows the work
    as soon as that is done, also when the loop has ended meanwhile; one that failed is not undone."""
    lock = threading.Lock()
    done = given_up = False

    def both() -> None:
        nonlocal done
        work()
        with lock:
            done, too_late = True, given_up
        if too_late:
            undo()

    running = asyncio.get_running_loop().run_in_executor(None, both)
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        with lock:
            given_up, was_done = True, done
        if was_done:
            await asyncio.to_thread(undo)
        with contextlib.suppress(Exception):  # what was given up may fail as it likes
            await asyncio.shield(running)
        raise
