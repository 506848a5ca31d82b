"""Asks the owner's program about flows whose rule says "ask".

Theory of operation:

- The data plane holds the first packet of such a flow and sends a question with a ticket. `Asking` passes it
  to the owner's function and sends the answer back.
- The function is called in an event loop: that of the program, when `NatNetwork.decide` was called in one,
  else one in a thread that starts with the first question. A plain function runs in a thread, so it may wait
  for a person.
- Equal questions (guest, protocol, name or address, port, rule) that come while one is open share its answer.
- No answer is a denial: when there is no function, when it raises or returns something else, and when it has
  not answered within the deadline. That is logged; other flows do not wait for it.
- A question that the data plane withdraws (the guest gave up, or is gone) cancels the call.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from guestnet.model.asking import FlowQuestion, Ruling

if TYPE_CHECKING:
    from guestnet.policy.rule import Rule

Hook = Callable[[FlowQuestion], Ruling | str | bool | Awaitable[Ruling | str | bool]]

_log = logging.getLogger("guestnet")

ANSWER_SECONDS = 30.0
"""The default deadline. A Linux guest repeats a SYN for over two minutes."""


class _Open:
    """A question that was asked, and the tickets that wait for its answer."""

    def __init__(self, question: FlowQuestion) -> None:
        self.question = question
        self.tickets: set[Any] = set()
        self.call: Future[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None


class Asking:
    """The questions of one network. Its methods run in the control thread, but for `set_hook`.

    Args:
        loop: That of the control thread.
        decide: Sends the answer for a ticket to the data plane.
        ruled: Called with a question, a ruling that holds for later flows too, and what it has to call once
            the ruling is in force.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        decide: Callable[[Any, bool], object],
        ruled: Callable[[FlowQuestion, Ruling, Callable[[], None]], object],
    ) -> None:
        self._loop, self._decide, self._ruled = loop, decide, ruled
        self._open: dict[tuple[object, ...], _Open] = {}
        self._hook: Hook | None = None
        self._hook_loop: asyncio.AbstractEventLoop | None = None
        self._seconds = ANSWER_SECONDS
        self._own: _LoopThread | None = None

    def set_hook(
        self, hook: Hook | None, loop: asyncio.AbstractEventLoop | None, seconds: float = ANSWER_SECONDS
    ) -> None:
        """Names the function that decides.

        Args:
            hook: The function; None: nobody decides.
            loop: Where to call it; None: in a thread of the network.
            seconds: The deadline.
        """
        self._hook, self._hook_loop, self._seconds = hook, loop, seconds

    def ask(self, ticket: Any, question: FlowQuestion) -> None:
        """Asks about a flow.

        Args:
            ticket: Names the flow in the answer.
            question: The flow.
        """
        if self._hook is None:
            self._decide(ticket, False)
            return
        key = _key(question)
        found = self._open.get(key)
        if found is not None:
            found.tickets.add(ticket)
            return
        asked = self._open[key] = _Open(question)
        asked.tickets.add(ticket)
        asked.timer = self._loop.call_later(self._seconds, self._too_late, key, asked)
        work = _call(self._hook, question)
        try:
            asked.call = asyncio.run_coroutine_threadsafe(work, self._caller())
        except RuntimeError as error:  # the program's loop has ended
            work.close()
            self._failed(key, asked, f"cannot be called ({error})")
            return
        asked.call.add_done_callback(
            lambda call: self._loop.call_soon_threadsafe(self._answered, key, asked, call)
        )

    def withdraw(self, ticket: Any) -> None:
        """The flow does not wait any more.

        Args:
            ticket: As in `ask`.
        """
        for key, asked in list(self._open.items()):
            asked.tickets.discard(ticket)
            if not asked.tickets:
                self._end(key, asked)

    @property
    def waiting(self) -> list[FlowQuestion]:
        """The open questions, oldest first."""
        return [asked.question for asked in self._open.values()]

    def close(self) -> None:
        """Ends all questions without an answer: the network ends."""
        for key, asked in list(self._open.items()):
            self._end(key, asked)
        own, self._own = self._own, None
        if own is not None:
            own.stop()

    def _caller(self) -> asyncio.AbstractEventLoop:
        if self._hook_loop is not None:
            return self._hook_loop
        if self._own is None:
            self._own = _LoopThread()
        return self._own.loop

    def _answered(self, key: tuple[object, ...], asked: _Open, call: Future[Any]) -> None:
        if self._open.get(key) is not asked or call.cancelled():
            return
        try:
            ruling = Ruling.of(call.result())
        except Exception as error:
            self._failed(key, asked, f"failed ({error or type(error).__name__})")
            return
        if asked.timer is not None:
            asked.timer.cancel()
        allowed = ruling.action == "allow"
        if ruling.scope == "once":
            self._settle(key, asked, allowed)
        else:
            # First the rule, so that the flow is opened by it and equal ones that come meanwhile wait too.
            self._ruled(asked.question, ruling, lambda: self._settle(key, asked, allowed))

    def _settle(self, key: tuple[object, ...], asked: _Open, allowed: bool) -> None:
        if self._open.get(key) is not asked:
            return
        tickets = set(asked.tickets)
        self._end(key, asked)
        for ticket in tickets:
            self._decide(ticket, allowed)

    def _too_late(self, key: tuple[object, ...], asked: _Open) -> None:
        self._failed(key, asked, f"did not answer within {self._seconds:g} s")

    def _failed(self, key: tuple[object, ...], asked: _Open, why: str) -> None:
        if self._open.get(key) is not asked:
            return
        _log.warning("%s: refused, because the function that decides %s", asked.question, why)
        self._settle(key, asked, False)

    def _end(self, key: tuple[object, ...], asked: _Open) -> None:
        self._open.pop(key, None)
        if asked.timer is not None:
            asked.timer.cancel()
        if asked.call is not None:
            asked.call.cancel()


_WEB = (("tcp", 80), ("tcp", 443), ("udp", 443))


def rule_for(question: FlowQuestion, action: str, **settings: Any) -> Rule:
    """The rule that decides about flows like one that was asked about.

    Args:
        question: The flow.
        action: "allow" or "deny".
        **settings: Other settings of the rule.

    Returns:
        A rule for the name when there is one, else for the address, with the port and protocol. At ports
        other than those of the web it matches by address: the protocol may not show the name.
    """
    from guestnet.policy.rule import Rule

    protocol = question.protocol if question.protocol in ("tcp", "udp", "icmp") else None
    address, port = question.remote
    shows_name = question.name is None or (question.protocol, port) in _WEB
    return Rule(
        action,
        question.name or str(address),
        ports=None if protocol == "icmp" else port or None,
        protocol=protocol,
        match="conversation" if shows_name else "address",
        **settings,
    )


def _key(question: FlowQuestion) -> tuple[object, ...]:
    place = question.name or question.remote[0]
    return (question.endpoint, question.protocol, place, question.remote[1], question.rule)


async def _call(hook: Hook, question: FlowQuestion) -> Any:
    if inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(type(hook).__call__):
        answer: Any = hook(question)
    else:
        answer = await asyncio.to_thread(hook, question)
    return await answer if inspect.isawaitable(answer) else answer


class _LoopThread:
    """An event loop in a thread, for functions of programs that have none."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="guestnet-decide", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the loop, after calls that were cancelled.

        A function that waits for a person in its thread does not keep the network.
        """
        with contextlib.suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._end_calls(), self.loop)
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self.loop.close()

    async def _end_calls(self) -> None:
        calls = asyncio.all_tasks(self.loop) - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.wait(calls, timeout=0.5) if calls else None
        self.loop.stop()
