"""The channel to a data plane that a test plays."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from types import SimpleNamespace
from typing import Any

import pytest
from guestnet.control.channel import Control
from guestnet.control.runtime import Runtime
from guestnet.errors import AttachError, BusyError, DataPlaneError, EndpointNotFound, NotRunning
from unit.runtime.conftest import until


class Plane:
    """What `Control` uses of a data plane."""

    def __init__(self) -> None:
        self.event_fd, self._write = os.pipe()
        self.events: list[Any] = []
        self.is_healthy = True
        self.number = 0
        self.busy = 0
        self.answers = True
        self.stopped = False

    def tell(self, event: Any) -> None:
        self.events.append(event)
        os.write(self._write, b"x")

    def drain(self, _max: int) -> list[Any]:
        os.read(self.event_fd, 1)
        return [self.events.pop(0)]

    def command(self, error: Exception | None = None) -> int:
        if self.busy or not self.is_healthy:
            self.busy -= 1
            raise BusyError("full")
        self.number += 1
        if self.answers:
            self.tell(SimpleNamespace(sequence=self.number, error=error, value=self.number))
        return self.number

    def stop(self) -> None:
        self.stopped = True


class Odd:
    """An event that its handler does not like."""


@pytest.fixture
def plane() -> Iterator[Plane]:
    made = Plane()
    yield made
    assert made.stopped
    os.close(made.event_fd)
    os.close(made._write)


def refuse(_event: Odd) -> None:
    raise ValueError("odd")


@pytest.fixture
def control(plane: Plane) -> Iterator[Control]:
    made = Control(lambda: plane, lambda: {Odd: refuse}, Runtime())  # type: ignore[arg-type,return-value]
    made.start()
    yield made
    made.stop()


def test_commands_and_their_answers(control: Control, plane: Plane) -> None:
    assert control.wait(control.do(plane.command)) == 1
    plane.busy = 3
    assert control.wait(control.do(plane.command)) == 2
    with pytest.raises(AttachError, match="no"):
        control.wait(control.do(plane.command, AttachError("no")))
    assert control.post(plane.command)
    plane.busy = 1
    assert not control.post(plane.command)


def test_what_must_not_get_lost_waits_in_order(control: Control, plane: Plane) -> None:
    """A queue that is full loses no change of state, and nothing overtakes it."""
    given: list[str] = []

    def change(name: str) -> int:
        number = plane.command()
        given.append(name)
        return number

    def begin() -> None:
        plane.busy = 3
        for name in ("unbind", "bind", "retarget"):
            control.ensure(change, name)

    control.loop.call_soon_threadsafe(begin)
    control.wait(control.do(change, "later"))
    assert given == ["unbind", "bind", "retarget", "later"]


def test_a_refused_command_that_nobody_waits_for_is_reported(
    control: Control, plane: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[Exception] = []

    def begin() -> None:
        control.ensure(plane.command, AttachError("first"), refused=refused.append)
        control.ensure(plane.command, AttachError("second"))
        control.ensure(plane.command, EndpointNotFound("third"))  # gone already: nothing is lost

    with caplog.at_level(logging.WARNING, logger="guestnet"):
        control.loop.call_soon_threadsafe(begin)
        control.wait(control.do(plane.command))
    assert [str(error) for error in refused] == ["first"]
    assert [record.getMessage() for record in caplog.records] == ["a command was refused: second"]


def test_a_worker_that_has_ended_is_given_nothing_more(control: Control, plane: Plane) -> None:
    plane.is_healthy = False
    control.loop.call_soon_threadsafe(control.ensure, plane.command)
    with pytest.raises(DataPlaneError):
        control.wait(control.do(plane.command))
    assert plane.number == 0


def test_one_bad_event_stops_nothing(
    control: Control, plane: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="guestnet"):
        plane.tell(Odd())
        assert control.wait(control.do(plane.command)) == 1
    assert "not handled" in caplog.text


def test_a_failed_worker_is_said_to_everyone(control: Control, plane: Plane) -> None:
    plane.answers = False
    waiting = control.submit(control.do(plane.command))
    until(lambda: plane.number == 1, "the command to be given")
    control.loop.call_soon_threadsafe(control.fail, "it broke")
    with pytest.raises(DataPlaneError, match="it broke"):
        waiting.result(10)
    for healthy in (True, False):
        plane.is_healthy = healthy
        with pytest.raises(DataPlaneError, match="it broke"):
            control.wait(control.do(plane.command))


def test_failing_tasks_are_logged(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("a task")

    with caplog.at_level(logging.ERROR, logger="guestnet"):
        control.loop.call_soon_threadsafe(control.spawn, fail())
        until(lambda: "a task of the network failed" in caplog.text, "the failure to be logged")


def test_who_comes_at_the_very_end_does_not_wait_for_ever(control: Control, plane: Plane) -> None:
    """Work that is handed in while the loop is being taken down gets an answer too."""
    given: list[Future[object]] = []

    async def work() -> None:
        await asyncio.sleep(600)

    end = plane.stop

    def stop() -> None:
        given.append(control.submit(work()))
        given.append(control.submit(control.do(plane.command)))
        plane.is_healthy = False
        end()

    plane.stop = stop  # type: ignore[method-assign]
    control.stop()
    for future in given:
        with pytest.raises((CancelledError, DataPlaneError)):
            future.result(5)


def test_after_the_end(control: Control, plane: Plane) -> None:
    control.stop()
    with pytest.raises(NotRunning):
        control.wait(control.do(plane.command))


def test_what_cannot_start_says_why() -> None:
    def make() -> Any:
        raise DataPlaneError("no epoll")

    with pytest.raises(DataPlaneError, match="no epoll"):
        Control(make, dict, Runtime()).start()
