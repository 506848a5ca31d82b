"""Runtime: what the networks of one process share.

Theory of operation:

- A runtime has packet threads (`guestnet._native.Runtime`), one control thread (`thread`) and the threads for
  callbacks (`callbacks`). They run while a network uses the runtime.
- Networks that are given no runtime share one implicit runtime of the process, with a packet thread for each
  processor. Its threads end with the last of its networks.
- A fork has the object and not its threads: its first network starts new ones.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from guestnet.control.callbacks import CallbackPool
from guestnet.control.thread import ControlThread
from guestnet.errors import NotRunning
from guestnet.model.spec import WORKERS_MOST
from guestnet.model.values import whole_number

if TYPE_CHECKING:
    from guestnet import _native

_RENEW_SECONDS = 5.0
"""How long threads for callbacks may take to end, so that new ones take their place."""


class Runtime:
    """Threads that several networks share.

    By default all networks of a process share one runtime. A runtime of your own keeps networks apart, for
    example from networks whose guests send much.

    The networks of a runtime share packet threads, the control thread, which answers DHCP and DNS and
    executes calls, and up to 16 threads for callbacks. Each network has its turn in a packet thread. A
    callback that blocks delays later callbacks of its own network only, unless 16 of them block at once. A
    network that fails does not affect the others.

    Args:
        workers: Packet threads at most, 1 to 64; by default one for each processor. A network has as many of
            them as its `NatConfig.workers` says.

    Raises:
        ConfigError: `workers` is not a number from 1 to 64.

    Example:
        >>> from guestnet import NatNetwork, Runtime
        >>> with Runtime(workers=1) as runtime:
        ...     with NatNetwork(runtime=runtime) as one, NatNetwork(runtime=runtime) as other:
        ...         runtime.networks, runtime.threads
        (2, 1)
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = None if workers is None else whole_number("workers", workers, 1, WORKERS_MOST)
        self._planes: _native.Runtime | None = None
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

    @property
    def workers(self) -> int:
        """How many packet threads it has at most."""
        return self.planes().workers

    @property
    def threads(self) -> int:
        """How many packet threads run now."""
        return self.planes().threads

    def planes(self) -> _native.Runtime:
        """The packet threads. Called by networks.

        Returns:
            What a data plane is placed on.
        """
        self._leave_parent()
        with self._lock:
            if self._planes is None:
                from guestnet._native import Runtime as PacketThreads

                own = self is not _implicit
                self._planes = PacketThreads(workers=self._workers) if own else PacketThreads.of_process()
            return self._planes

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
        self.callbacks.close(_RENEW_SECONDS)

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
            self._thread, self._planes, self._networks, self._held = None, None, 0, False
            self._process = os.getpid()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Runtime {state}, {self.networks} networks>"


_implicit = Runtime()


def implicit_runtime() -> Runtime:
    """The runtime of all networks that are given none."""
    return _implicit
