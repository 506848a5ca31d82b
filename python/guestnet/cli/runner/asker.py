"""`--ask`: the person at the terminal decides about new flows.

Theory of operation:

- The terminal is opened as /dev/tty before anything starts, so stdin and stdout may be anything. A command
  has a terminal of its own (`terminal_relay`): it cannot read an answer.
- One question is open at a time; others wait. A question that is withdrawn (the guest gave up) says so and
  makes room for the next.
- What was typed before the question is discarded, so a key that was meant for the command answers nothing.
- An answer is a whole line. Everything that is not one of the answers is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import termios
from typing import TYPE_CHECKING

from guestnet.cli import UsageError
from guestnet.errors import PolicyError
from guestnet.model.asking import FlowQuestion, Ruling

if TYPE_CHECKING:
    from guestnet.cli.runner.terminal_relay import TerminalRelay
    from guestnet.policy.policy import Policy

_LINE_BYTES = 4096


class TerminalAsker:
    """Asks at a terminal. It is the function that `NatNetwork.decide` gets.

    Args:
        path: The policy file that answers are saved to; None: they cannot be saved.

    Raises:
        UsageError: There is no terminal.
    """

    def __init__(self, path: str | None) -> None:
        try:
            self._fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:
            raise UsageError(
                "--ask asks at a terminal, and there is none: start guestnet at one, or decide by --allow, "
                "--deny and --policy."
            ) from None
        self._path = path
        self._turn = asyncio.Lock()
        self.relay: TerminalRelay | None = None

    def lend(self) -> TerminalRelay:
        """Makes a terminal for the command.

        Returns:
            The terminal. It is closed with the asker.
        """
        from guestnet.cli.runner.terminal_relay import TerminalRelay

        self.relay = TerminalRelay(self._fd)
        return self.relay

    def close(self) -> None:
        """Ends. The network has stopped: no question is open."""
        if self.relay is not None:
            self.relay.close()
        os.close(self._fd)

    async def __call__(self, question: FlowQuestion) -> Ruling:
        """Asks the person.

        Args:
            question: The flow.

        Returns:
            The answer. A guestnet in the background of its terminal denies the flow: it would be stopped.
        """
        async with self._turn:
            with contextlib.suppress(OSError):
                if os.tcgetpgrp(self._fd) != os.getpgrp():
                    return Ruling("deny")
            with self.relay.paused() if self.relay is not None else contextlib.nullcontext():
                with contextlib.suppress(termios.error):
                    termios.tcflush(self._fd, termios.TCIFLUSH)
                return await self._ask(question)

    async def _ask(self, question: FlowQuestion) -> Ruling:
        answers = {
            **{"o": Ruling("allow"), "a": Ruling("allow", scope="guest")},
            **{"d": Ruling("deny"), "n": Ruling("deny", scope="guest")},
        }
        saved = "" if self._path is None else f", (s)ave to {self._path}"
        self._write(f"guestnet: {printable(str(question))}\n")
        try:
            while True:
                self._write(f"  allow (o)nce, (a)lways{saved}; (d)eny, (n)ever? ")
                word = (await self._line()).strip().lower()
                if word == "s" and self._path is not None:
                    self._save(question, self._path)
                    return answers["a"]
                if word in answers:
                    return answers[word]
        except asyncio.CancelledError:
            self._write("\nguestnet: the guest does not wait any more\n")
            raise

    async def _line(self) -> str:
        """A line that the person types; "d" when the terminal is gone."""
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def read() -> None:
            if ready.done():
                return
            try:
                ready.set_result(os.read(self._fd, _LINE_BYTES))
            except BlockingIOError:
                pass
            except OSError:
                ready.set_result(b"")

        loop.add_reader(self._fd, read)
        try:
            data: bytes = await ready
        finally:
            loop.remove_reader(self._fd)
        return data.decode(errors="replace") if data else "d"

    def _save(self, question: FlowQuestion, path: str) -> None:
        try:
            save(question, path)
        except PolicyError as error:
            self._write(f"guestnet: not saved: {printable(str(error))}\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._fd, text.encode())


def save(question: FlowQuestion, path: str) -> Policy:
    """Puts a rule for what was asked about in front of a policy file, which is made when there is none.

    Args:
        question: The flow.
        path: The file.

    Returns:
        The policy in the file.

    Raises:
        PolicyError: The file cannot be read or written.
    """
    from guestnet.policy.policy import Policy
    from guestnet.runtime.policy.asking import rule_for

    policy = Policy.load(path) if os.path.exists(path) else Policy("ask")
    rule = rule_for(question, "allow")
    if rule not in policy.rules:
        policy = policy.with_rules_first([rule])
        policy.save(path)
    return policy


def printable(text: str) -> str:
    """The text without characters that a terminal obeys: the guest chose the names in it."""
    return "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in text)
