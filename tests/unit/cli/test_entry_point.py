"""The console script: the exit status, the output and the exit handlers of a process that leaves early."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import atexit, sys, threading
import guestnet.cli

def main():
    atexit.register(lambda: print("exit handler"))
    sys.stdout.write("written")
    {work}
    return {status}

guestnet.cli.main = main
guestnet.cli.entry_point()
"""


def _run(status: str, work: str = "pass", **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(status=status, work=work)],
        stderr=subprocess.PIPE,
        stdout=options.get("stdout", subprocess.PIPE),  # type: ignore[call-overload]
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("status", [0, 2, 125, 255])
def test_status_output_and_exit_handlers_survive(status: int) -> None:
    done = _run(str(status))
    assert (done.returncode, done.stdout, done.stderr) == (status, "writtenexit handler\n", "")


def test_a_thread_is_waited_for() -> None:
    done = _run(
        "3", "threading.Thread(target=lambda: (threading.main_thread().join(), print('thread'))).start()"
    )
    assert done.returncode == 3
    assert "thread\n" in done.stdout
    assert "exit handler\n" in done.stdout


def test_output_that_cannot_be_written_is_a_failure() -> None:
    with open("/dev/full", "w", encoding="ascii") as full:
        done = _run("0", stdout=full)
    assert done.returncode == 125


def test_the_garbage_collector_waits_until_the_command_has_started() -> None:
    usual = "gc.get_threshold() == guestnet.cli._USUAL_THRESHOLDS"
    work = (
        "import gc; print(gc.get_threshold()[0] > 10_000, gc.get_freeze_count()); guestnet.cli.settled(); "
        f"print({usual}, gc.get_freeze_count() > 1000, end='')"
    )
    assert _run("0", work).stdout == "writtenTrue 0\nTrue Trueexit handler\n"


def test_settling_leaves_the_garbage_collector_of_another_program_alone() -> None:
    program = (
        "import gc, guestnet.cli; gc.set_threshold(5000, 5, 5); guestnet.cli.settled(); "
        "assert gc.get_threshold() == (5000, 5, 5) and gc.get_freeze_count() == 0"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
