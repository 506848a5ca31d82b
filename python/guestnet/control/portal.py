"""The portal: one asynchronous implementation serves programs with and without an event loop.

Theory of operation:

- A public method that waits is written once, as a coroutine. `blocking` makes its synchronous counterpart.
- The counterpart drives the coroutine in the calling thread, without an event loop. So what the coroutine
  does itself (opening sockets, checking arguments) happens in the caller's thread in both cases.
- Such a coroutine waits for nothing but `outcome` (a result from another thread) and `in_thread` (blocking
  work). Both find out who drives them: an event loop, which stays free meanwhile, or the portal, which
  blocks.

>>> class Reader:
...     async def aread(self, count: int) -> bytes:
...         \"\"\"Reads `count` bytes.\"\"\"
...         return bytes(count)
...
...     read = blocking(aread)
>>> Reader().read(3)
b'\\x00\\x00\\x00'
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from guestnet.errors import NotRunning

_S = TypeVar("_S")
_P = ParamSpec("_P")
_T = TypeVar("_T")

_STOPPED = "The network was stopped meanwhile: start it again."


class _Thread(threading.local):
    drives = False
    """The portal is running a step of a coroutine in this thread."""


_thread = _Thread()


class _Result:
    """Waits for a future of another thread, in whichever way the driver can."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, Any, Any]:
        if _thread.drives:
            return (yield self)
        return (yield from asyncio.wrap_future(self._future).__await__())

    def wait(self) -> Any:
        """The result. Cancels the work when the waiting is interrupted (Ctrl-C)."""
        try:
            return self._future.result()
        except concurrent.futures.CancelledError:
            raise NotRunning(_STOPPED) from None
        except BaseException:
            self._future.cancel()  # nothing happens when it is the work's own error
            raise


def is_blocking() -> bool:
    """Whether the calling coroutine is driven by its synchronous counterpart."""
    return _thread.drives


async def outcome(future: concurrent.futures.Future[_T]) -> _T:
    """Waits for the result of a future that another thread completes.

    Raises:
        NotRunning: The future was cancelled by its own side.
    """
    try:
        return cast("_T", await _Result(future))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise NotRunning(_STOPPED) from None


async def in_thread(work: Callable[[], object], undo: Callable[[], object] = lambda: None) -> None:
    """Does blocking work: here, when the portal drives, else in a thread.

    A thread cannot be cancelled. When the waiting is, `undo` follows the work as soon as that is done, also
    when the loop has ended meanwhile. Work that failed is not undone.
    """
    if _thread.drives:
        work()
        return
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
        with contextlib.suppress(Exception):  # nobody waits for its error any more
            await asyncio.shield(running)
        raise


def drive(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine to its end in the calling thread."""
    step: Callable[[], Any] = functools.partial(work.send, None)
    while True:
        before, _thread.drives = _thread.drives, True
        try:
            request = step()
        except StopIteration as end:
            return cast("_T", end.value)
        finally:
            _thread.drives = before
        if not isinstance(request, _Result):
            work.close()
            raise RuntimeError(f"{work!r} waits for {request!r}, which needs an event loop")
        try:
            step = functools.partial(work.send, request.wait())
        except BaseException as error:
            step = functools.partial(work.throw, error)


def blocking(
    method: Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[_S, _P], _T]:
    """The synchronous counterpart of an asynchronous method, with its signature and documentation.

    Its name is that of the method without the `a` in front.
    """

    @functools.wraps(method)
    def call(self: _S, /, *arguments: _P.args, **keywords: _P.kwargs) -> _T:
        return drive(method(self, *arguments, **keywords))

    call.__name__ = method.__name__.removeprefix("a")
    call.__qualname__ = ".".join([*method.__qualname__.split(".")[:-1], call.__name__])
    return call
