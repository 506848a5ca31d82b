"""`guestnet run --ask`: a person at the terminal decides about the flows of the command."""

from __future__ import annotations

import pytest
from guestnet import Policy
from lab.namespaces import OUT4
from lab.runner import GuestRunner
from lab.terminal import Terminal

PAGE = "a page from outside"
CURL = f"curl -sS -m 60 http://{OUT4}/"
PROMPT = "allow (o)nce"


class Asked(Terminal):
    """A command of the guest with `--ask`, at a terminal."""

    def __init__(self, guest: GuestRunner, script: str, *options: str) -> None:
        inner = guest.command(["sh", "-c", script], ["--ask", *options])
        words = guest.lab.command(inner, ordinary=True)
        super().__init__(*words, env=guest.lab.environment(ordinary=True))

    def asked(self, times: int = 1) -> None:
        self.until(lambda text: text.count(PROMPT) >= times)


@pytest.fixture
def guest(guest: GuestRunner) -> GuestRunner:
    if guest.peer != "guestnet":
        pytest.skip("policies are guestnet's own")
    return guest


def test_what_is_allowed_once_passes_once(guest: GuestRunner) -> None:
    terminal = Asked(guest, f"{CURL}; {CURL}; echo status $?")
    terminal.asked()
    assert f"vm1 wants tcp to {OUT4}:80" in terminal.text
    terminal.type("what\n")  # no answer: it asks again
    terminal.asked(2)
    terminal.type("o\n")
    terminal.asked(3)
    terminal.type("d\n")
    terminal.until(lambda text: "status 7" in text)
    assert terminal.text.count(PAGE) == 1
    assert terminal.status() == 0


def test_what_is_always_allowed_is_asked_once(guest: GuestRunner) -> None:
    terminal = Asked(guest, f"{CURL}; {CURL}; echo status $?")
    terminal.asked()
    terminal.type("a\n")
    terminal.until(lambda text: "status 0" in text)
    assert terminal.text.count(PAGE) == 2
    assert terminal.text.count(PROMPT) == 1
    assert terminal.status() == 0


def test_rules_decide_without_a_question(guest: GuestRunner) -> None:
    terminal = Asked(guest, f"{CURL}; echo status $?", "--allow", OUT4)
    terminal.until(lambda text: "status 0" in text)
    assert PROMPT not in terminal.text
    assert terminal.status() == 0


def test_the_answer_is_not_the_commands(guest: GuestRunner) -> None:
    """It reads its terminal while the question is open, and gets what is typed afterwards."""
    terminal = Asked(guest, f"{CURL} & read -r line; echo got $line; wait $!; echo status $?")
    terminal.asked()
    terminal.type("o\n")
    terminal.until(lambda text: PAGE in text)
    terminal.type("mine\n")
    terminal.until(lambda text: "got mine" in text and "status 0" in text)
    assert terminal.status() == 0


def test_ctrl_c_at_a_question_ends_the_command(guest: GuestRunner) -> None:
    terminal = Asked(guest, f"exec {CURL}")
    terminal.asked()
    terminal.type("\x03")
    terminal.until(lambda text: "does not wait any more" in text)
    assert terminal.status() == 130


def test_a_saved_answer_needs_no_question(guest: GuestRunner) -> None:
    policy = guest.lab.dir / "asked" / "policy.toml"
    policy.parent.mkdir(mode=0o777)
    policy.parent.chmod(0o777)
    url = "http://www.example.test/"
    terminal = Asked(guest, f"curl -sS -m 60 {url}; echo status $?", "--policy", str(policy))
    terminal.asked()
    assert "vm1 wants tcp to www.example.test:80" in terminal.text
    terminal.type("s\n")
    terminal.until(lambda text: "status 0" in text)
    assert terminal.status() == 0
    policy.chmod(0o644)
    assert [str(rule) for rule in Policy.load(policy).rules] == ["allow www.example.test:80/tcp"]
    assert PAGE in guest.check(["curl", "-sS", url], "--policy", str(policy))


def test_without_a_terminal_it_does_not_start(guest: GuestRunner) -> None:
    inner = guest.command(["true"], ["--ask"])
    done = guest.lab.run(["setsid", "-w", *inner], ordinary=True)
    assert done.returncode == 2
    assert "--ask asks at a terminal" in done.stderr
