"""Runtime: what the networks of one process share.

Theory of operation:

- A runtime has one control thread (`thread`) and the threads for callbacks (`callbacks`). They run while a
  network uses the runtime.
- Networks that are given no runtime share one implicit runtime of the process. Its threads end with the last
  of its networks.
- A fork has the object and not its threads: its first network starts new ones.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from guestnet.control.callbacks import CallbackPool
from guestnet.control.thread import ControlThread
from guestnet.errors import NotRunning


class Runtime:
    """Threads that several networks share.

    By default all networks of a process share one runtime. A runtime of your own keeps networks apart, for
    example from networks whose programs create and remove many endpoints.

    The networks of a runtime share the control thread, which answers DHCP and DNS and executes calls, and up
    to 16 threads for callbacks. A callback that blocks delays later callbacks of its own network only, unless
    16 of them block at once. A network that fails does not affect the others.

    Example:
        >>> from guestnet import NatNetwork, Runtime
        >>> with Runtime() as runtime, NatNetwork(runtime=runtime) as network:
        ...     network.runtime is runtime, runtime.networks
        (True, 1)
    """

    def __init__(self) -> None:
        self.callbacks = CallbackPool()
        """Threads for callbacks; used by networks."""
        self._lock = threading.Lock()
        self._thread: ControlThread | None = None
        self._networks = 0
        self._held = False
        self._closed = False
        self._process = os.getpid()

    @property
    def networks(self) -> int:
        """How many networks run on it."""
        return self._networks if self._process == os.getpid() else 0

    def acquire(self) -> ControlThread:
        """Gives the control thread to one more network, and starts it if it does not run. Called by networks.

        Returns:
            The control thread.

        Raises:
            NotRunning: The runtime was closed.
        """
        self._leave_parent()
        with self._lock:
            if self._closed:
                raise NotRunning("The runtime was closed: make another one.")
            if self._thread is None:
                self._thread = ControlThread("guestnet-control")
            self._networks += 1
            return self._thread

    def release(self) -> None:
        """Notes that a network has ended. Called by networks."""
        with self._lock:
            self._networks -= 1
        self._end_unused()

    def start(self) -> None:
        """Keeps the threads also while no network runs, until `close`.

        Raises:
            NotRunning: The runtime was closed.
        """
        self.acquire()
        with self._lock:
            self._held = True
            self._networks -= 1

    def close(self) -> None:
        """Accepts no more networks. The threads end with the last network that runs, or now."""
        self._leave_parent()
        with self._lock:
            self._closed, self._held = True, False
        self._end_unused()

    def call_in_threads(self, function: Callable[[], object]) -> None:
        """Calls a function in the control thread, and lets the threads for callbacks start anew.

        New threads inherit from the control thread what belongs to a thread, such as capabilities.

        Args:
            function: What to call.
        """
        thread = self._thread
        if thread is not None and self._process == os.getpid():
            thread.call(function)
        self.callbacks.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_unused(self) -> None:
        with self._lock:
            if self._networks or self._held or self._thread is None:
                return
            thread, self._thread = self._thread, None
        thread.close()
        self.callbacks.close()

    def _leave_parent(self) -> None:
        """In a process that was forked: the threads are not here, and another thread may have held a lock."""
        if self._process != os.getpid():
            self.callbacks = CallbackPool()
            self._lock = threading.Lock()
            self._thread, self._networks, self._held = None, 0, False
            self._process = os.getpid()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Runtime {state}, {self.networks} networks>"


_implicit = Runtime()


def implicit_runtime() -> Runtime:
    """The runtime of all networks that are given none."""
    return _implicit
