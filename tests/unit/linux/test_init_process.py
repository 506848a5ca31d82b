"""How the first process of a namespace notices that the host replaced files for name resolution."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest
from guestnet._linux import init_process, libc


class Names:
    """Name files that are `restored`; `end` closes the pipe by which guestnet says that it lives."""

    def __init__(self, calls: int, end: Callable[[], None]) -> None:
        self.restored = 0
        self._calls, self._end = calls, end

    def directories(self) -> set[str]:
        return {"/etc"}

    def restore(self) -> None:
        self.restored += 1
        if self.restored == self._calls:
            self._end()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """The lifeline; looks follow one another without a pause."""
    monkeypatch.setattr(init_process, "_LOOK_MILLISECONDS", 0)
    monkeypatch.setattr(init_process, "_UNWATCHED_MILLISECONDS", 0)
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)


def test_a_short_command_costs_no_inotify_descriptor(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes 10 to 20 ms to close one."""
    monkeypatch.setattr(libc, "open_inotify", lambda: pytest.fail("it was opened"))
    names = Names(init_process._LOOKS, lambda: os.close(pipe[1]))
    monkeypatch.setattr(init_process, "_LOOKS", init_process._LOOKS + 1)
    init_process._wait(pipe[0], names)  # type: ignore[arg-type]
    assert names.restored == init_process._LOOKS - 1


def test_what_was_replaced_before_the_watch_is_restored(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def note_watch(_fd: int, _path: str) -> None:
        opened.append(names.restored)

    monkeypatch.setattr(libc, "watch_directory", note_watch)
    names = Names(init_process._LOOKS + 1, lambda: os.close(pipe[1]))
    init_process._wait(pipe[0], names)  # type: ignore[arg-type]
    assert opened[0] == init_process._LOOKS
    assert names.restored == init_process._LOOKS + 1


@pytest.mark.parametrize("refused", ["open_inotify", "watch_directory"])
def test_without_inotify_files_are_restored_all_the_same(
    refused: str, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(libc, refused, refuse)
    before = set(os.listdir("/proc/self/fd"))
    names = Names(init_process._LOOKS + 5, lambda: os.close(pipe[1]))
    init_process._wait(pipe[0], names)  # type: ignore[arg-type]
    assert names.restored == init_process._LOOKS + 5
    assert len(os.listdir("/proc/self/fd")) == len(before) - 1, (
        "the pipe's end is closed, and nothing is open"
    )


def test_without_name_files_only_the_end_of_guestnet_counts(pipe: tuple[int, int]) -> None:
    os.close(pipe[1])
    init_process._wait(pipe[0], None)
