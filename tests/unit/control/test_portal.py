"""One asynchronous implementation, and the synchronous door that is made from it."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import pydoc
import threading
from concurrent.futures import Future

import pytest
from guestnet import Endpoint, Forward, Listener, NatConfig, NatNetwork, NotRunning
from guestnet.control.portal import blocking, drive, in_thread, is_blocking, outcome

PUBLIC = (NatNetwork, Endpoint, Forward, Listener)
PAIRS = [
    (owner, name)
    for owner in PUBLIC
    for name, member in inspect.getmembers(owner)
    if not name.startswith("_") and inspect.iscoroutinefunction(member)
]


def test_every_asynchronous_method_is_found() -> None:
    names = {name for owner, name in PAIRS if owner is NatNetwork}
    assert names >= {
        "astart", "astop", "aclose", "acreate_endpoint", "aremove_endpoint", "aattach", "alisten", "apublish",
        "aunpublish", "aendpoint_stats", "aflows", "amaintenance", "astart_capture", "astop_capture",
    }  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), PAIRS, ids=[f"{o.__name__}.{n}" for o, n in PAIRS])
def test_both_doors_have_one_signature_and_one_documentation(owner: type, name: str) -> None:
    asynchronous, synchronous = getattr(owner, name), getattr(owner, name.removeprefix("a"))
    assert name.startswith("a")
    assert not inspect.iscoroutinefunction(synchronous)
    assert inspect.signature(synchronous) == inspect.signature(asynchronous)
    assert synchronous.__doc__ == asynchronous.__doc__
    assert synchronous.__doc__
    assert not synchronous.__doc__.startswith("As `")


def test_help_shows_real_signatures() -> None:
    text = pydoc.plain(pydoc.render_doc(NatNetwork))
    assert "create_endpoint(self, id: 'str', *, mac: 'str | bytes | None' = None," in text
    assert "async acreate_endpoint(self, id: 'str', *, mac: 'str | bytes | None' = None," in text
    assert NatNetwork.create_endpoint.__qualname__.endswith(".create_endpoint")


class Worker:
    """Waits for results of other threads."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.drove: list[bool] = []

    async def await_result(self, future: Future[int]) -> int:
        self.thread = threading.current_thread()
        self.drove.append(is_blocking())
        return await outcome(future) + 1

    wait_result = blocking(await_result)

    async def awork(self) -> None:
        await in_thread(self._work, lambda: None)

    work = blocking(awork)

    def _work(self) -> None:
        self.thread = threading.current_thread()

    async def asleep(self) -> None:
        await asyncio.sleep(1)

    sleep = blocking(asleep)


def later(future: Future[int], value: int | BaseException) -> None:
    def finish() -> None:
        if isinstance(value, BaseException):
            future.set_exception(value)
        else:
            future.set_result(value)

    threading.Timer(0.01, finish).start()


def test_a_result_is_waited_for_in_the_calling_thread() -> None:
    worker, future = Worker(), Future[int]()
    later(future, 3)
    assert worker.wait_result(future) == 4
    assert worker.thread is threading.current_thread()
    assert worker.drove == [True]
    assert not is_blocking()


async def test_a_result_is_awaited_where_a_loop_drives() -> None:
    worker, future = Worker(), Future[int]()
    later(future, 3)
    assert await worker.await_result(future) == 4
    assert worker.drove == [False]
    # Also from a program with a loop, which the synchronous door blocks.
    future = Future()
    later(future, 5)
    assert worker.wait_result(future) == 6


def test_errors_and_cancellations_come_through() -> None:
    worker, future = Worker(), Future[int]()
    later(future, ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        worker.wait_result(future)
    cancelled = Future[int]()
    cancelled.cancel()
    with pytest.raises(NotRunning):
        worker.wait_result(cancelled)
    with pytest.raises(NotRunning):
        asyncio.run(worker.await_result(cancelled))


def test_an_interruption_cancels_what_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    future = Future[int]()

    def interrupted(_timeout: float | None = None) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Worker().wait_result(future)
    assert future.cancelled()


def test_blocking_work_is_done_here_or_in_a_thread() -> None:
    worker = Worker()
    worker.work()
    assert worker.thread is threading.current_thread()
    asyncio.run(worker.awork())
    assert worker.thread is not threading.current_thread()


def test_what_needs_an_event_loop_is_refused() -> None:
    with pytest.raises(RuntimeError, match="event loop"):
        Worker().sleep()


def test_doors_can_be_used_within_each_other() -> None:
    async def outer() -> int:
        inner = Future[int]()
        later(inner, 1)
        first = Worker().wait_result(inner)
        again = Future[int]()
        later(again, 2)
        return first + await outcome(again)

    assert drive(outer()) == 4


def test_context_variables_are_those_of_the_caller() -> None:
    variable = contextvars.ContextVar[int]("variable", default=0)

    async def read() -> int:
        return variable.get()

    variable.set(7)
    assert drive(read()) == 7


async def test_a_network_from_a_loop_and_from_a_thread() -> None:
    async with NatNetwork(NatConfig(dhcp=False, dns=False)) as network:
        endpoint = await network.acreate_endpoint("vm1")
        forward = await endpoint.apublish("127.0.0.1:0:80")
        assert network.forwards == [forward]
        forward.close()
        await asyncio.to_thread(network.remove_endpoint, "vm1")
        assert len(network) == 0
