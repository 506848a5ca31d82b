"""Lines about what happens, for people and programs, and for readers that do not read."""

from __future__ import annotations

import json
import os
import threading
from argparse import Namespace
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

import pytest
from guestnet.cli.runner import event_log as teller_module
from guestnet.cli.runner.event_log import WAITING, Teller
from guestnet.model.events import AddressSeen, GuestUp, LeaseTaken


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """In place of stdout and stderr."""
    read, write = os.pipe()
    monkeypatch.setattr(teller_module, "STDOUT", write)
    monkeypatch.setattr(teller_module, "STDERR", write)
    yield read, write
    os.close(read)


MAC, ADDRESS = "02:00:00:00:00:01", IPv4Address("192.168.64.2")


def options(**values: bool) -> Namespace:
    return Namespace(**({"json": False, "quiet": False, "verbose": False} | values))


def lines(read: int, write: int) -> list[str]:
    os.close(write)
    with os.fdopen(os.dup(read), encoding="utf-8") as file:
        return file.read().splitlines()


def test_programs_get_json_and_people_sentences(pipe: tuple[int, int]) -> None:
    event = LeaseTaken(endpoint="vm1", mac=MAC, ip=ADDRESS)
    for values in ({"json": True}, {}, {"quiet": True}):
        teller = Teller(options(**values))
        teller.event(event)
        teller.event(AddressSeen(endpoint="vm1", ip=ADDRESS, mac=MAC))
        teller.say("sum")
        teller.close()
    said = lines(*pipe)
    assert [json.loads(line) for line in said[:2]] == [
        {"event": "lease", "endpoint": "vm1", "mac": MAC, "ip": "192.168.64.2", "hostname": None},
        {"event": "address_seen", "endpoint": "vm1", "ip": "192.168.64.2", "mac": MAC},
    ]
    assert said[2:] == ["sum", f"guestnet: vm1 has an address (mac {MAC}, ip 192.168.64.2)", "sum", "sum"]


def test_a_reader_that_does_not_read_blocks_no_writer(pipe: tuple[int, int]) -> None:
    read, write = pipe
    teller = Teller(options(json=True))
    count = WAITING * 4
    told: list[Any] = []

    def guests() -> None:
        for number in range(count):
            teller.event(LeaseTaken(endpoint="vm1", mac="x" * 200, ip=ADDRESS, hostname=str(number)))
        told.append(True)

    thread = threading.Thread(target=guests, daemon=True)
    thread.start()
    thread.join(10)
    assert told, "the thread that serves guests waits for a reader"
    numbers: list[int] = []
    lost = 0
    with os.fdopen(os.dup(read), encoding="utf-8") as file:
        while len(numbers) + lost < count:
            line = json.loads(file.readline())
            if line["event"] == "lines_lost":
                lost += line["count"]
            else:
                numbers.append(int(line["hostname"]))
    assert lost > 0
    assert numbers == sorted(set(numbers)), "in order, and none twice"
    teller.close()
    os.close(write)


def test_lines_of_one_guest_leave_room_for_those_of_another(pipe: tuple[int, int]) -> None:
    """Nobody reads: all that a guest causes by asking for its address again and again is not to cost the line
    that another came."""
    read, _write = pipe
    teller = Teller(options(json=True))
    for number in range(WAITING * 4):
        teller.event(LeaseTaken(endpoint="vm1", mac="x" * 200, ip=ADDRESS, hostname=str(number)))
    teller.event(GuestUp(endpoint="vm2", mac=MAC, ip=ADDRESS))
    teller.tell("ready", "ready")
    seen = []
    with os.fdopen(os.dup(read), encoding="utf-8") as file:
        while "lines_lost" not in (line := file.readline()):
            seen.append(json.loads(line))
    assert json.loads(line)["count"] == WAITING * 4 - len(seen) + 2
    assert [one["event"] for one in seen[-2:]] == ["guest_up", "ready"]
    assert len(seen) > WAITING // 2, "a guest alone has most of the room"
    teller.close()


def test_the_end_does_not_wait_for_a_reader_that_does_not_read(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teller_module, "_CLOSING_SECONDS", 3600.0)
    teller = Teller(options(json=True))
    for number in range(WAITING * 2):
        teller.tell("ready", "ready", number=number, more="x" * 200)
    teller.close()


def test_the_end_waits_for_a_reader_that_reads_slowly(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = pipe
    monkeypatch.setattr(teller_module, "_CLOSING_SECONDS", 60.0)
    monkeypatch.setattr(teller_module, "_STALLED_SECONDS", 20.0)
    teller = Teller(options(json=True))
    for number in range(WAITING // 2):
        teller.tell("ready", "ready", number=number, more="x" * 1000)
    seen: list[int] = []

    def reader() -> None:
        with os.fdopen(os.dup(read), encoding="utf-8") as file:
            seen.extend(json.loads(line)["number"] for line in file)

    thread = threading.Thread(target=reader)
    thread.start()
    teller.close()
    os.close(write)
    thread.join(20)
    assert seen == list(range(WAITING // 2))
