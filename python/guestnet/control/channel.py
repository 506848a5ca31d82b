"""The channel between one network's control side and its data plane: commands down, events up.

Theory of operation:

- The worker writes an eventfd when the control thread sleeps, and the control thread drains events in
  batches. No packet thread calls Python.
- A command has a number. The `Done` event with that number completes a future.
- Everything of a running network happens in the control thread, so only the entry from other threads needs a
  lock.
- The channel owns its tasks and its data plane. Its end ends these; the thread serves other networks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from guestnet.control.portal import drive, outcome
from guestnet.control.thread import Party, end_tasks
from guestnet.errors import BusyError, DataPlaneError, GuestnetError, NotRunning

if TYPE_CHECKING:
    from guestnet._native import DataPlane
    from guestnet.control.runtime import Runtime
    from guestnet.control.thread import ControlThread

_T = TypeVar("_T")
Handlers = Mapping[type, Callable[[Any], object]]

_log = logging.getLogger("guestnet")

_BATCH = 512
"""Events per turn of the loop, so that services have theirs under any load."""
_RETRY_SECONDS = 0.002


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a task of the network failed", exc_info=error)


def _log_refusal(error: GuestnetError) -> None:
    # What is gone already needs no removal.
    level = logging.DEBUG if isinstance(error, LookupError) else logging.WARNING
    _log.log(level, "a command was refused: %s", error)


class Control:
    """The control side of one running network: its data plane, and its part of the control thread."""

    def __init__(
        self, make: Callable[[], DataPlane], handlers: Callable[[], Handlers], runtime: Runtime
    ) -> None:
        self._make = make
        self._make_handlers = handlers
        self._handlers: Handlers = {}
        self._runtime = runtime
        self._party = Party()
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._backlog: deque[tuple[Callable[[], int], Callable[[GuestnetError], None]]] = deque()
        # Of commands that nobody waits for: what is done when the worker refuses one.
        self._refused: dict[int, Callable[[GuestnetError], None]] = {}
        self._gate = threading.Lock()
        self._stopped = self._ended = False
        self._handed_in: set[Future[Any]] = set()
        self._failure: str | None = None
        self._thread: ControlThread | None = None
        self.loop: asyncio.AbstractEventLoop
        self.plane: DataPlane

    # --- from any thread ---

    def start(self) -> None:
        """Starts the worker and hears its events; raises what kept it from starting."""
        thread = self._runtime.acquire()
        try:
            self.loop = thread.loop
            self.plane = self._make()
            try:
                self._handlers = self._make_handlers()
                thread.call(partial(self._party.run, self.loop.add_reader, self.plane.event_fd, self._drain))
            except BaseException:
                self.plane.stop()
                raise
        except BaseException:
            self._runtime.release()
            raise
        self._thread = thread

    def stop(self) -> None:
        """Ends the worker and all tasks, and waits for them. What still waited for an answer is cancelled."""
        thread = self._thread
        if thread is None or self._stopped:
            return
        self._stopped = True
        try:
            thread.call(partial(self.loop.remove_reader, self.plane.event_fd))
            self.plane.stop()
            thread.run(self._end())
        finally:
            self._runtime.release()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is the control thread, which cannot wait for itself."""
        return self._thread is not None and self._thread.is_current

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Runs a coroutine in the control thread."""
        try:
            with self._gate:
                if self._ended:
                    raise NotRunning("The network was stopped: start it again.")
                future = self._party.run(asyncio.run_coroutine_threadsafe, work, self.loop)
                self._handed_in.add(future)
            future.add_done_callback(self._handed_in.discard)
            return future
        except BaseException:
            with contextlib.suppress(ValueError):  # it runs already
                work.close()  # a KeyboardInterrupt on the way
            raise

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine in the control thread and waits for it."""
        return drive(outcome(self.submit(work)))

    # --- in the control thread ---

    async def do(self, command: Callable[..., int], *arguments: Any, **keywords: Any) -> Any:
        """Gives the worker a command and waits until it is done; returns what it brought."""
        while True:
            if not self._backlog:
                try:
                    sequence = command(*arguments, **keywords)
                    break
                except BusyError:
                    pass
            self._check()
            await asyncio.sleep(_RETRY_SECONDS)  # the worker is behind: its queue is bounded
        if self._failure is not None:
            self._check()  # nobody will answer any more
        future: asyncio.Future[Any] = self.loop.create_future()
        self._pending[sequence] = future
        try:
            return await future
        finally:
            self._pending.pop(sequence, None)

    def post(self, command: Callable[..., int], *arguments: Any, **keywords: Any) -> bool:
        """Gives the worker a command that nobody waits for and that may be lost, as an answer to a guest may.
        False when it was not taken."""
        try:
            command(*arguments, **keywords)
        except GuestnetError as error:
            _log.debug("a command was not taken: %s", error)
            return False
        return True

    def ensure(
        self,
        command: Callable[..., int],
        *arguments: Any,
        refused: Callable[[GuestnetError], None] = _log_refusal,
        **keywords: Any,
    ) -> None:
        """Gives the worker a command that nobody waits for, and that changes what later ones build on: when
        the queue is full it is given later, before all others.

        Args:
            refused: Called with the error, in the control thread, when the command is not done. It is logged
                unless that is given.
        """
        self._backlog.append((partial(command, *arguments, **keywords), refused))
        if len(self._backlog) == 1:
            self._catch_up()

    def _catch_up(self) -> None:
        while self._backlog:
            command, refused = self._backlog[0]
            try:
                self._refused[command()] = refused
            except BusyError:
                if self._failure is None and self.plane.is_healthy:
                    self.loop.call_later(_RETRY_SECONDS, self._catch_up)
                else:
                    self._backlog.clear()
                return
            except GuestnetError as error:
                refused(error)
            self._backlog.popleft()

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Runs a task that is kept alive, and whose failure is logged."""
        task = self._party.run(self.loop.create_task, work)
        task.add_done_callback(_log_failure)

    def _check(self) -> None:
        if self._failure is not None or not self.plane.is_healthy:
            why = self._failure or "it has ended"
            raise DataPlaneError(
                f"The packet thread has failed ({why}): stop the network and start it again."
            )

    def fail(self, message: str) -> None:
        """The worker has failed: everyone who waits hears of it."""
        self._failure = message
        for future in self._pending.values():
            if not future.done():
                future.set_exception(
                    DataPlaneError(f"The packet thread has failed ({message}): start the network again.")
                )

    async def _end(self) -> None:
        with self._gate:
            self._ended = True
        await asyncio.sleep(0)  # what was handed in until now begins, and ends at once
        await end_tasks(self._party)
        for future in list(self._handed_in):
            future.cancel()  # of a task that does not end: nobody is to wait for it
        # They lead to the session, and that leads here: the end of one is to be the end of all.
        self._handlers, self._make_handlers = {}, dict

    def _drain(self) -> None:
        try:
            events = self.plane.drain(_BATCH)
        except Exception as error:
            # It would be called again at once, and the other networks of this thread never.
            self.loop.remove_reader(self.plane.event_fd)
            _log.exception("the events of a network cannot be read")
            self.fail(f"its events cannot be read: {error}")
            return
        for event in events:
            handler = self._handlers.get(type(event))
            if handler is None:
                self._acknowledge(event)
                continue
            try:
                handler(event)
            except Exception:
                # One guest's event must not keep the others from being served.
                _log.exception("an event of the network was not handled")

    def _acknowledge(self, event: Any) -> None:
        future, error = self._pending.get(event.sequence), event.error
        refused = self._refused.pop(event.sequence, None)
        if future is None:
            if error is None:
                return
            if refused is None:
                _log.debug("a command failed: %s", error)
            else:
                refused(error)
        elif not future.done():
            if error is None:
                future.set_result(event.value)
            else:
                future.set_exception(error)
