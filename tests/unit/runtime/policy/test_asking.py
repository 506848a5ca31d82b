"""Questions to the owner's function: who is asked, what no answer means, and what is withdrawn."""

import asyncio
import threading
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any

import pytest
from guestnet.errors import ConfigError
from guestnet.model.asking import FlowQuestion, Ruling
from guestnet.runtime.policy.asking import Asking


def question(port: int = 443, name: str | None = "pypi.org") -> FlowQuestion:
    guest, remote = (IPv4Address("192.168.64.2"), 40000), (IPv4Address("192.0.2.7"), port)
    return FlowQuestion(
        network="lab", endpoint="vm1", protocol="tcp", guest=guest, remote=remote, name=name, rule="rest"
    )


class World:
    """The control thread's side of a test."""

    def __init__(self) -> None:
        self.decided: dict[Any, bool] = {}
        self.ruled: list[Ruling] = []
        self.changed = asyncio.Event()
        self.asking = Asking(asyncio.get_running_loop(), self._decide, self._ruling)

    def _ruling(self, _question: FlowQuestion, ruling: Ruling, then: Callable[[], None]) -> None:
        assert self.decided == {}  # the flow waits until the ruling is in force
        self.ruled.append(ruling)
        then()

    def _decide(self, ticket: Any, allow: bool) -> None:
        self.decided[ticket] = allow
        self.changed.set()

    async def until(self, tickets: int) -> None:
        async with asyncio.timeout(20):
            while len(self.decided) < tickets:
                self.changed.clear()
                await self.changed.wait()


def in_world(test: Callable[[World], Any]) -> None:
    async def run() -> None:
        world = World()
        try:
            await test(world)
        finally:
            world.asking.close()

    asyncio.run(run())


def test_equal_questions_share_one_answer() -> None:
    async def test(world: World) -> None:
        go, calls = asyncio.Event(), []

        async def hook(question: FlowQuestion) -> str:
            calls.append(question)
            await go.wait()
            return "allow"

        world.asking.set_hook(hook, asyncio.get_running_loop())
        for ticket in range(3):
            world.asking.ask(ticket, question())
        world.asking.ask(3, question(port=22))
        assert len(world.asking.waiting) == 2
        go.set()
        await world.until(4)
        assert world.decided == dict.fromkeys(range(4), True)
        assert len(calls) == 2
        assert world.ruled == []
        assert world.asking.waiting == []

    in_world(test)


def test_a_plain_function_runs_in_a_thread_of_its_own() -> None:
    async def test(world: World) -> None:
        threads = []

        def hook(_question: FlowQuestion) -> Ruling:
            threads.append(threading.current_thread())
            return Ruling("deny", scope="guest", seconds=60)

        world.asking.set_hook(hook, None)
        world.asking.ask(1, question())
        await world.until(1)
        assert world.decided == {1: False}
        assert world.ruled == [Ruling("deny", scope="guest", seconds=60)]
        assert threads[0] is not threading.current_thread()

    in_world(test)


@pytest.mark.parametrize("answer", [None, 1, "perhaps", [], ValueError("no")])
def test_what_is_no_answer_is_a_denial(answer: object, caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async def hook(_question: FlowQuestion) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        world.asking.set_hook(hook, asyncio.get_running_loop())
        world.asking.ask(1, question())
        await world.until(1)
        assert world.decided == {1: False}

    in_world(test)
    assert "refused, because the function that decides failed" in caplog.text


def test_a_hook_that_hangs_is_a_denial_after_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        cancelled = asyncio.Event()

        async def hook(_question: FlowQuestion) -> str:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            return "allow"

        world.asking.set_hook(hook, asyncio.get_running_loop(), seconds=0.01)
        world.asking.ask(1, question())
        await world.until(1)
        assert world.decided == {1: False}
        await asyncio.wait_for(cancelled.wait(), 20)

    in_world(test)
    assert "did not answer within 0.01 s" in caplog.text


def test_a_question_that_is_withdrawn_cancels_the_call() -> None:
    async def test(world: World) -> None:
        cancelled, started = asyncio.Event(), asyncio.Event()

        async def hook(_question: FlowQuestion) -> str:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
            return "allow"

        world.asking.set_hook(hook, asyncio.get_running_loop())
        world.asking.ask(1, question())
        world.asking.ask(2, question())
        await asyncio.wait_for(started.wait(), 20)
        world.asking.withdraw(1)
        assert len(world.asking.waiting) == 1
        world.asking.withdraw(2)
        await asyncio.wait_for(cancelled.wait(), 20)
        assert world.decided == {}
        assert world.asking.waiting == []

    in_world(test)


def test_without_a_function_the_answer_is_no() -> None:
    async def test(world: World) -> None:
        world.asking.ask(1, question())
        assert world.decided == {1: False}

    in_world(test)


@pytest.mark.parametrize(
    "wrong",
    [
        ("maybe", {}),
        ("allow", {"scope": "all"}),
        ("allow", {"seconds": 5}),
        ("deny", {"scope": "guest", "seconds": 0}),
        ("deny", {"scope": "guest", "seconds": float("nan")}),
    ],
)
def test_wrong_rulings_are_config_errors(wrong: tuple[Any, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError):
        Ruling(wrong[0], **wrong[1])
