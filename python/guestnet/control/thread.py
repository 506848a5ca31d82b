"""The control thread: one asyncio loop, shared by all networks of a runtime.

Theory of operation:

- The loop drains events of data planes and runs the services' coroutines. It never runs code of the program
  that owns a network (`callbacks`), and nothing that blocks.
- Each task belongs to the party in whose context it was created (`Party`). The end of a network ends its
  tasks and no others.
- No exception ends the loop: what escapes a callback is logged, and the loop goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

_T = TypeVar("_T")

_log = logging.getLogger("guestnet")

_END_SECONDS = 1.0
"""How long the tasks of a party may take to end when they are cancelled."""


class Party:
    """The tasks of one network."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()
        self._context = contextvars.Context()
        self._context.run(_party.set, self)

    def run(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Calls `function` so that the tasks and handles it creates belong to this party."""
        return self._context.copy().run(function, *arguments)


_party: contextvars.ContextVar[Party | None] = contextvars.ContextVar("guestnet_party", default=None)


class ControlThread:
    """A thread with a running loop."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        # In Python's development mode asyncio reports steps over 0.1 s, which any step takes on a busy
        # machine.
        self.loop.slow_callback_duration = 1.0
        self.loop.set_task_factory(_create_task)
        self._ending = False
        # A daemon, so that a program that forgets to stop its networks can still end; they are ended at
        # exit, before the interpreter.
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in this thread."""
        return threading.current_thread() is self._thread

    def call(self, function: Callable[[], _T]) -> _T:
        """Calls `function` in the thread and waits for it. Not from the thread itself."""
        result: Future[_T] = Future()

        def work() -> None:
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)

        self.loop.call_soon_threadsafe(work, context=contextvars.Context())
        return result.result()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine that belongs to no party, and waits for it. Not from the thread itself."""
        return contextvars.Context().run(asyncio.run_coroutine_threadsafe, work, self.loop).result()

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._ending = True
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self.loop.call_soon_threadsafe(self.loop.stop)
        if not self.is_current:
            self._thread.join()

    def _main(self) -> None:
        loop = self.loop
        asyncio.set_event_loop(loop)
        try:
            while not self._ending:
                try:
                    loop.run_forever()
                except BaseException:  # SystemExit of one callback: it would end every network's control side
                    _log.exception("the control thread goes on after an error")
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()


async def end_tasks(party: Party) -> None:
    """Cancels the tasks of a party and waits for them, a second at most."""
    left = party.tasks - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_END_SECONDS)


def _create_task(
    loop: asyncio.AbstractEventLoop, work: Any, *, context: contextvars.Context | None = None, **more: Any
) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, context=context, **more)
    party = _party.get() if context is None else context.get(_party)
    if party is not None:
        party.tasks.add(task)
        task.add_done_callback(party.tasks.discard)
    return task
