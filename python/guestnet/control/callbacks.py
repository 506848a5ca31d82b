"""Callbacks of the program that owns a network, in threads of their own.

Theory of operation:

- The control thread serves all networks of a runtime, so it calls nothing that it does not know: it puts the
  call in a `CallbackQueue` and goes on.
- The calls of one queue are made one at a time and in order. Queues share the threads of a `CallbackPool`,
  which starts one when all are busy, up to a limit. So a callback that blocks delays its own queue, and
  others only when as many callbacks block at once as there may be threads.
- A queue is bounded. A call that finds no room is dropped and counted.
- A program without callbacks has no such thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

_log = logging.getLogger("guestnet")

THREADS_MOST = 16
WAITING_MOST = 4096
"""Calls that wait in one queue at most."""
_TURN = 256
"""Calls of one queue in a row while another queue waits for a thread."""
_CLOSE_SECONDS = 1.0
_WAIT_SECONDS = 5.0


class CallbackPool:
    """Threads for callbacks, started when they are needed."""

    def __init__(self, most: int = THREADS_MOST) -> None:
        self._most = most
        self._ready: deque[CallbackQueue] = deque()
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._generation = 0

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Ends the threads once their queues are empty, and waits for them.

        Threads are started again when there is more to call.

        Args:
            seconds: How long to wait, for all of them together. A thread whose callback blocks ends later.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            self._generation += 1
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def schedule(self, queue: CallbackQueue) -> bool:
        """A queue has something to call. False when the system has no thread for it."""
        with self._changed:
            self._ready.append(queue)
            if self._idle >= len(self._ready):
                self._changed.notify()
                return True
            if len(self._threads) >= self._most:
                return True  # the next thread that is done takes it
            # A daemon: a callback that never returns does not keep the program from ending.
            thread = threading.Thread(
                target=self._main, args=(self._generation,), name="guestnet-callbacks", daemon=True
            )
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError as error:
                self._threads.discard(thread)
                if not self._threads:
                    self._ready.remove(queue)
                    _log.error("no thread can be started for callbacks: %s", error)
                    return False
            return True

    def _main(self, generation: int) -> None:
        while (queue := self._next(generation)) is not None:
            queue.run(_TURN)

    def _next(self, generation: int) -> CallbackQueue | None:
        with self._changed:
            while not self._ready:
                if generation != self._generation:
                    # In the same step as the decision: `schedule` counts on the threads that are in the set.
                    self._threads.discard(threading.current_thread())
                    return None
                self._idle += 1
                try:
                    self._changed.wait()
                finally:
                    self._idle -= 1
            return self._ready.popleft()


class CallbackQueue:
    """Calls that are made in order, one at a time."""

    def __init__(self, pool: CallbackPool, most: int = WAITING_MOST) -> None:
        self._pool = pool
        self._most = most
        self._calls: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._runner: threading.Thread | None = None
        self.lost = 0
        """Calls that found no room."""

    def put(self, call: Callable[[], object]) -> bool:
        """Makes a call soon. False when there is no room for it."""
        with self._changed:
            if len(self._calls) >= self._most:
                self.lost += 1
                return False
            self._calls.append(call)
            if self._busy:
                return True
            self._busy = True
        self._begin()
        return True

    def wait(self, seconds: float = _WAIT_SECONDS) -> bool:
        """Waits until all calls were made, but not in one of them. False when that takes too long."""
        with self._changed:
            if self._runner is threading.current_thread():
                return False
            return self._changed.wait_for(lambda: not self._busy, seconds)

    def run(self, turn: int) -> None:
        """Makes the calls that wait, up to `turn` of them; called by the pool."""
        self._runner = threading.current_thread()
        try:
            for _ in range(turn):
                with self._changed:
                    if not self._calls:
                        self._busy = False
                        self._changed.notify_all()
                        return
                    call = self._calls.popleft()
                try:
                    call()
                except BaseException:  # sys.exit() too: it is for the program's own threads
                    _log.exception("a callback for events failed")
                del call
        finally:
            self._runner = None
        self._begin()

    def _begin(self) -> None:
        if not self._pool.schedule(self):
            with self._changed:
                self._busy = False  # the next call tries again
                self._changed.notify_all()
