"""A network whose rules ask: the owner's function decides, for one flow or for later ones too."""

from __future__ import annotations

import asyncio
import threading

import pytest
from guestnet import ConfigError, FlowQuestion, NatConfig, NatNetwork, NotRunning, Policy, Rule, Ruling

from ..conftest import add_memory_guest, until
from .test_policy_in_force import LOOPBACK, refused

ASK = NatConfig(
    dhcp=False, dns=False, host_loopback=True, policy=Policy("deny", [Rule("ask", "host_loopback")])
)


def test_a_plain_function_decides_for_each_flow(echo: int) -> None:
    questions: list[FlowQuestion] = []

    def hook(question: FlowQuestion) -> bool:
        questions.append(question)
        return len(questions) == 1

    with NatNetwork(ASK, name="lab") as network:
        guest = add_memory_guest(network, "vm1")
        assert refused(guest, LOOPBACK, echo), "nobody decides"
        network.decide(hook)
        connection = guest.connect(LOOPBACK, echo)
        connection.send(b"hello")
        assert connection.recv(5) == b"hello"
        assert refused(guest, LOOPBACK, echo)
    first = questions[0]
    assert (first.network, first.endpoint, first.protocol, first.rule) == (
        "lab",
        "vm1",
        "tcp",
        "ask host_loopback",
    )
    assert (str(first.remote[0]), first.remote[1]) == (LOOPBACK, echo)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_ruling_holds_for_the_guest_or_for_all(workers: int, echo: int) -> None:
    asked: list[str] = []

    def hook(question: FlowQuestion) -> Ruling:
        asked.append(question.endpoint)
        return Ruling("allow", scope="guest" if question.endpoint == "vm1" else "network")

    with NatNetwork(ASK.replace(workers=workers)) as network:
        guests = {name: add_memory_guest(network, name) for name in ("vm1", "vm2", "vm3")}
        network.decide(hook)
        for name in ("vm1", "vm2"):
            guests[name].connect(LOOPBACK, echo).close()
            until(lambda: network.policy != ASK.policy, "the rule of the answer")
        until(lambda: len(network.policy.rules) == 3, "both rules")
        for guest in guests.values():
            guest.connect(LOOPBACK, echo).close()
    assert asked == ["vm1", "vm2"]


def test_an_asynchronous_function_runs_in_the_programs_loop(echo: int) -> None:
    async def run() -> None:
        threads: list[threading.Thread] = []

        async def hook(_question: FlowQuestion) -> str:
            threads.append(threading.current_thread())
            return "allow"

        async with NatNetwork(ASK) as network:
            guest = add_memory_guest(network, "vm1")
            await network.adecide(hook)
            connection = await asyncio.to_thread(guest.connect, LOOPBACK, echo)
            connection.close()
            assert threads == [threading.current_thread()]

    asyncio.run(run())


def test_a_function_that_is_too_slow_refuses_one_flow_alone(echo: int) -> None:
    waits = threading.Event()

    def hook(question: FlowQuestion) -> str:
        if question.endpoint == "vm1":
            waits.wait(20)
        return "allow"

    with NatNetwork(ASK) as network:
        slow, quick = (add_memory_guest(network, name) for name in ("vm1", "vm2"))
        network.decide(hook, seconds=0.3)
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(refused(slow, LOOPBACK, echo)))
        thread.start()
        assert not refused(quick, LOOPBACK, echo)
        thread.join()
        waits.set()
        assert results == [True]


def test_wrong_arguments() -> None:
    with pytest.raises(NotRunning):
        NatNetwork(ASK).decide(None)
    with NatNetwork(ASK) as network:
        with pytest.raises(TypeError, match="is not a function"):
            network.decide("allow")  # type: ignore[arg-type]
        for seconds in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ConfigError):
                network.decide(None, seconds=seconds)
