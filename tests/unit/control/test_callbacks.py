"""Callbacks in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from guestnet.control.callbacks import CallbackPool, CallbackQueue


@pytest.fixture
def pool() -> Iterator[CallbackPool]:
    made = CallbackPool(2)
    yield made
    made.close()
    assert made._threads == set()


def test_calls_of_a_queue_are_made_in_order(pool: CallbackPool) -> None:
    queue, seen = CallbackQueue(pool), []
    for n in range(1000):
        assert queue.put(lambda n=n: seen.append(n))
    assert queue.wait(30)
    assert seen == list(range(1000))


def test_a_full_queue_loses_calls_and_counts_them(pool: CallbackPool) -> None:
    queue, hold, seen = CallbackQueue(pool, 10), threading.Event(), []
    began = threading.Event()
    queue.put(lambda: (began.set(), hold.wait(60)))
    assert began.wait(30)
    taken = [queue.put(lambda n=n: seen.append(n)) for n in range(15)]
    assert taken == [True] * 10 + [False] * 5
    hold.set()
    assert queue.wait(30)
    assert (seen, queue.lost) == (list(range(10)), 5)


def test_queues_wait_for_a_thread_only_when_all_are_blocked(pool: CallbackPool) -> None:
    hold, done = threading.Event(), threading.Event()
    queues = [CallbackQueue(pool) for _ in range(3)]
    queues[0].put(lambda: hold.wait(60))
    queues[1].put(done.set)
    assert done.wait(30)
    assert queues[1].wait(30)
    queues[1].put(lambda: hold.wait(60))
    queues[2].put(lambda: None)
    assert not queues[2].wait(0.01)
    assert len(pool._threads) == 2
    hold.set()
    assert all(queue.wait(30) for queue in queues)


def test_a_busy_queue_lets_others_have_a_turn() -> None:
    pool = CallbackPool(1)
    busy, other, hold = CallbackQueue(pool), CallbackQueue(pool), threading.Event()
    seen: list[str] = []
    busy.put(lambda: hold.wait(60))
    for _ in range(2000):
        busy.put(lambda: seen.append("busy"))
    other.put(lambda: seen.append("other"))
    hold.set()
    assert busy.wait(30)
    assert other.wait(30)
    assert 0 < seen.index("other") < 300
    pool.close()


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_call_that_fails_does_not_end_the_thread(error: type[BaseException], pool: CallbackPool) -> None:
    def fail() -> None:
        raise error

    queue, seen = CallbackQueue(pool), []
    queue.put(fail)
    queue.put(lambda: seen.append(1))
    assert queue.wait(30)
    assert seen == [1]


def test_a_call_that_waits_for_its_own_queue_is_not_blocked(pool: CallbackPool) -> None:
    queue, seen = CallbackQueue(pool), []
    queue.put(lambda: seen.append(queue.wait(60)))
    assert queue.wait(30)
    assert seen == [False]


def test_a_closed_pool_starts_threads_again(pool: CallbackPool) -> None:
    queue, seen = CallbackQueue(pool), []
    for n in range(3):
        queue.put(lambda n=n: seen.append(n))
        assert queue.wait(30)
        pool.close()
        assert pool._threads == set()
    assert seen == [0, 1, 2]


def test_no_thread_to_be_had_is_tried_again(pool: CallbackPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    queue, seen = CallbackQueue(pool), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert queue.put(lambda: seen.append(1))
    assert queue.put(lambda: seen.append(2))
    assert queue.wait(30)
    assert seen == [1, 2]


def test_closing_does_not_wait_for_callbacks_that_block_one_after_another() -> None:
    pool, hold = CallbackPool(8), threading.Event()
    queues = [CallbackQueue(pool) for _ in range(8)]
    began = threading.Semaphore(0)
    for queue in queues:
        queue.put(lambda: (began.release(), hold.wait(60)))
    assert all(began.acquire(timeout=30) for _ in queues)
    pool.close(0.01)
    assert len(pool._threads) == 8
    hold.set()
    pool.close(30)
    assert pool._threads == set()
