"""NatEngine from Python: buffers of all kinds, batches, results, time, published ports, wrong values."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from guestnet import (
    BusyError,
    ConfigError,
    NatDirection,
    NatEngine,
    NatEngineConfig,
    NatResult,
    PacketPool,
    PortInUse,
)
from guestnet.model.spec import Filtering
from unit.packets import check, destination, echo, source, tcp, udp

OUT, IN = NatDirection.OUTBOUND, NatDirection.INBOUND
GUEST, OUTSIDE = ("192.168.64.2", 50000), ("198.51.100.7", 80)


def config(**more: object) -> NatEngineConfig:
    return NatEngineConfig("203.0.113.1", secret=bytes(32), **more)  # type: ignore[arg-type]


def in_mmap(packet: bytearray) -> mmap.mmap:
    memory = mmap.mmap(-1, len(packet))
    memory[:] = bytes(packet)
    return memory


KINDS: dict[str, Callable[[bytearray], Any]] = {
    "bytearray": bytearray,
    "memoryview": lambda p: memoryview(bytearray(p)),
    "array": lambda p: array.array("B", bytes(p)),
    "array of signed bytes": lambda p: array.array("b", bytes(p)),
    "ctypes": lambda p: (ctypes.c_ubyte * len(p)).from_buffer_copy(p),
    "ctypes of signed bytes": lambda p: (ctypes.c_byte * len(p)).from_buffer_copy(p),
    "ctypes of characters": lambda p: (ctypes.c_char * len(p)).from_buffer_copy(p),
    "ctypes string buffer": lambda p: ctypes.create_string_buffer(bytes(p), len(p)),
    "mmap": in_mmap,
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_writable_buffer(kind: str) -> None:
    make = KINDS[kind]
    for way in ("one", "frame", "list", "spans"):
        engine = NatEngine(config())
        before = bytearray(14) + udp(GUEST, OUTSIDE) if way == "frame" else udp(GUEST, OUTSIDE)
        if way == "frame":
            before[12:14] = b"\x08\x00"
        packet = make(before)
        if way == "one":
            assert engine.translate(packet, OUT) is NatResult.TRANSLATED
        elif way == "frame":
            assert engine.translate_frame(packet, OUT) == (NatResult.TRANSLATED, len(before))
        elif way == "list":
            assert list(engine.translate_batch([packet], OUT)) == [NatResult.TRANSLATED]
        else:
            assert list(engine.translate_batch(packet, OUT, offsets=[0])) == [NatResult.TRANSLATED]
        after = bytes(memoryview(packet).cast("B"))
        check(after[14:] if way == "frame" else after)
        assert after != before


def test_what_is_counted_from_a_start_of_the_programs_own() -> None:
    """Seconds since 1970, since boot, or since zero; by `now` or by a clock."""
    for start in (0.0, 5.0, 1e5, time.time(), 2_100_000_000.0, 4e9):
        for by_clock in (False, True):
            times = [start]
            engine = NatEngine(config(), clock=lambda t=times: int(t[0] * 1e9))

            def at(now: float, times: list[float] = times, by_clock: bool = by_clock) -> dict[str, float]:
                times[0] = now
                return {} if by_clock else {"now": now}

            packet = udp(GUEST, OUTSIDE)
            engine.translate(packet, OUT, **at(start))
            timer = engine.next_timer
            assert timer is not None
            assert start <= timer <= start + 301
            assert engine.expire_connections(**at(start + 299)) == 0
            assert engine.translate(udp(OUTSIDE, source(packet)), IN, **at(start + 299)).send
            # To the very time that it names, and on: a timer that is due leads to work each time.
            ended = turns = 0
            while (timer := engine.next_timer) is not None:
                ended += engine.expire(**at(timer))
                turns += 1
                assert turns < 1000, (start, timer)
            assert ended == 1
            assert start + 599 <= times[0] <= start + 602
            assert engine.connection_count == 0


def test_an_explicit_time_is_not_held_against_the_clock() -> None:
    engine = NatEngine(config())  # its clock is the monotonic one
    engine.add_forward("tcp", ("203.0.113.1", 8080), ("192.168.64.2", 80))
    packet = udp(GUEST, OUTSIDE)
    engine.translate(packet, OUT, now=1.0)
    assert engine.translate(udp(OUTSIDE, source(packet)), IN, now=299.0).send
    assert engine.expire_connections(now=600.5) == 1


def test_a_fork_during_a_batch_leaves_an_engine_that_works() -> None:
    code = """
import os, signal, threading
from guestnet import NatDirection, NatEngine
from unit.packets import udp
engine = NatEngine("203.0.113.1")
packets = [udp(("192.168.64.2", 7), ("198.51.100.7", 9)) for _ in range(20000)]
began, stop = threading.Event(), False
def translate():
    while not stop:
        engine.translate_batch(packets, NatDirection.OUTBOUND)
        engine.expire()
        began.set()
threads = [threading.Thread(target=translate) for _ in range(2)]
for thread in threads:
    thread.start()
began.wait()
codes = []
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        signal.alarm(15)  # ends a process that hangs
        engine.translate_batch(packets, NatDirection.OUTBOUND)
        engine.expire_connections()
        os._exit(engine.connection_count + 6)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop = True
for thread in threads:
    thread.join()
print(set(codes))
"""
    tests = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTHONPATH": tests},
    )
    assert (done.stdout, done.stderr) == ("{7}\n", "")


def test_the_usual_writable_buffers_are_changed_in_place() -> None:
    engine = NatEngine(config())
    for make in (bytearray, lambda p: memoryview(bytearray(p)), lambda p: array.array("B", bytes(p))):
        packet = make(udp(GUEST, OUTSIDE))
        assert engine.translate(packet, OUT) is NatResult.TRANSLATED
        check(bytes(packet))
        assert source(bytes(packet))[0] == "203.0.113.1"


def test_buffers_that_cannot_be_written() -> None:
    engine = NatEngine(config())
    with pytest.raises(TypeError, match="writable"):
        engine.translate(bytes(udp(GUEST, OUTSIDE)), OUT)
    with pytest.raises(TypeError, match="one piece"):
        engine.translate(memoryview(bytearray(200))[::2], OUT)
    with pytest.raises(TypeError):
        engine.translate("text", OUT)


def test_an_offset_past_the_end_is_an_empty_packet() -> None:
    engine = NatEngine(config())
    assert engine.translate(udp(GUEST, OUTSIDE), OUT, offset=10_000) == NatResult.dropped("truncated")
    assert engine.translate(bytearray(), OUT) == NatResult.dropped("truncated")


def test_untranslated_packets_keep_every_byte() -> None:
    engine = NatEngine(config())
    for packet in (udp(("10.0.0.1", 1), OUTSIDE), udp(GUEST, ("127.0.0.1", 5)), bytearray(b"\x45" * 30)):
        before = bytes(packet)
        assert not engine.translate(packet, OUT).send
        assert packet == before


@pytest.mark.parametrize("kind", ["list", "offsets", "lengths", "array", "pool"])
def test_batches_do_what_single_packets_do(kind: str) -> None:
    packets = [udp((GUEST[0], 50000 + i % 7), (OUTSIDE[0], 80 + i % 3), b"x" * (i % 50)) for i in range(200)]
    packets[13] = udp(GUEST, ("224.0.0.1", 5))
    packets[100] = echo(GUEST[0], OUTSIDE[0], 5)
    one, many = NatEngine(config()), NatEngine(config())
    expected = [bytearray(p) for p in packets]
    wanted = [one.translate(p, OUT, now=1) for p in expected]
    if kind == "list":
        results = many.translate_batch(packets, OUT, now=1)
        got = [bytes(p) for p in packets]
    elif kind == "pool":
        pool = PacketPool(256, 256)
        indices = [pool.put(bytes(p)) for p in packets]
        results = many.translate_batch(pool, OUT, indices=indices, now=1)
        got = [pool.get(i) for i in indices if i is not None]
    else:
        whole = bytearray(b"".join(packets))
        lengths = [len(p) for p in packets]
        offsets = [sum(lengths[:i]) for i in range(len(packets))]
        if kind == "array":
            results = many.translate_batch(
                whole, OUT, offsets=array.array("I", offsets), lengths=array.array("I", lengths), now=1
            )
        elif kind == "lengths":
            results = many.translate_batch(whole, OUT, offsets=offsets, lengths=lengths, now=1)
        else:
            results = many.translate_batch(whole, OUT, offsets=offsets, now=1)
        got = [bytes(whole[o : o + n]) for o, n in zip(offsets, lengths, strict=True)]
    assert list(results) == wanted
    assert got == [bytes(p) for p in expected]
    assert results[13].reason == "bad_destination"
    assert results.counts()[NatResult.TRANSLATED] == 199
    assert many.stats() == one.stats()


def test_a_list_of_any_writable_buffers() -> None:
    engine = NatEngine(config())
    plain = [bytearray(udp((GUEST[0], 50000 + i), OUTSIDE)) for i in range(100)]
    kinds = (bytearray, lambda p: memoryview(bytearray(p)), lambda p: array.array("B", bytes(p)))
    packets = [kinds[i % 3](p) for i, p in enumerate(plain)]
    assert engine.translate_batch(packets, OUT).codes == bytes(100)
    assert [source(bytearray(p)) for p in packets] == [("203.0.113.1", 50000 + i) for i in range(100)]
    # One that cannot be changed: nobody is, and none is held on to.
    with pytest.raises(TypeError, match="writable"):
        engine.translate_batch([*plain, b"constant"], OUT)
    assert all(source(p)[0] == GUEST[0] for p in plain)
    for packet in plain:
        packet.append(0)
    with pytest.raises(BufferError):
        engine.translate_batch([array.array("H", [0] * 20)], OUT)


def test_numbers_of_packets_come_in_any_array() -> None:
    whole, pool = (
        bytearray(b"".join(udp((GUEST[0], 50000 + i), OUTSIDE) for i in range(4))),
        PacketPool(8, 64),
    )
    for make in (
        list,
        tuple,
        lambda n: array.array("I", n),
        lambda n: array.array("q", n),
        lambda n: (ctypes.c_uint32 * len(n))(*n),
        lambda n: memoryview(array.array("I", n)),
    ):
        indices = [index for _ in range(4) if (index := pool.put(udp(GUEST, OUTSIDE))) is not None]
        engine, copy = NatEngine(config()), bytearray(whole)
        results = engine.translate_batch(copy, OUT, offsets=make([0, 32, 64, 96]), lengths=make([32] * 4))
        assert results.codes == bytes(4)
        assert engine.translate_batch(pool, OUT, indices=make(indices)).codes == bytes(4)
        for index in indices:
            pool.free(index)
    with pytest.raises(ConfigError, match="-1"):
        engine.translate_batch(copy, OUT, offsets=[-1])
    with pytest.raises(TypeError):
        engine.translate_batch(copy, OUT, offsets=["one"])


def test_spans_outside_the_buffer_are_empty_packets() -> None:
    engine = NatEngine(config())
    results = engine.translate_batch(
        bytearray(100), OUT, offsets=[0, 90, 4_000_000_000], lengths=[20, 20, 20]
    )
    assert [r.is_dropped for r in results] == [True] * 3
    with pytest.raises(ConfigError, match="as many lengths"):
        engine.translate_batch(bytearray(100), OUT, offsets=[0, 1], lengths=[5])
    assert len(engine.translate_batch(bytearray(), OUT, offsets=[])) == 0


def test_time_is_an_argument() -> None:
    engine = NatEngine(config(), clock=lambda: 0)
    packet = udp(GUEST, OUTSIDE)
    engine.translate(packet, OUT, now=0)
    ext = source(packet)
    assert engine.translate(udp(OUTSIDE, ext), IN, now=299).send
    assert engine.translate(udp(OUTSIDE, ext), IN, now=700).reason == "no_flow"
    assert engine.next_timer is None or engine.next_timer > 0


def test_a_batch_runs_without_the_interpreters_lock() -> None:
    engine = NatEngine(config())
    whole = bytearray(b"".join(udp((GUEST[0], 49152 + i % 5000), OUTSIDE) for i in range(50_000)))
    offsets = array.array("I", range(0, len(whole), 32))
    interval = sys.getswitchinterval()
    # From here on no thread loses the lock: another one runs only where the lock is given up.
    sys.setswitchinterval(1000)
    try:
        assert any(_runs_meanwhile(engine, whole, offsets) for _ in range(200)), "nobody else could run"
    finally:
        sys.setswitchinterval(interval)


def _runs_meanwhile(engine: NatEngine, whole: bytearray, offsets: array.array[int]) -> bool:
    """Whether another thread ran during a batch; a busy machine may not let it although it could."""
    order: list[str] = []
    gate = threading.Lock()
    gate.acquire()

    def other() -> None:
        with gate:
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    gate.release()
    engine.translate_batch(whole, OUT, offsets=offsets)
    order.append("batch")
    thread.join()
    return order[0] == "other"


def test_published_ports() -> None:
    engine = NatEngine(config())
    engine.add_forward("tcp", ("203.0.113.1", 8080), ("192.168.64.2", 80))
    with pytest.raises(PortInUse, match="8080"):
        engine.add_forward("tcp", ("203.0.113.1", 8080), ("192.168.64.3", 80))
    full = NatEngine(config(table_size=1))
    full.add_forward("tcp", ("203.0.113.1", 8080), ("192.168.64.2", 80))
    with pytest.raises(BusyError, match="table is full"):
        full.add_forward("tcp", ("203.0.113.1", 8081), ("192.168.64.2", 80))
    with pytest.raises(ConfigError, match="not inside"):
        engine.add_forward("tcp", ("203.0.113.1", 81), ("10.0.0.1", 80))
    packet = tcp(OUTSIDE, ("203.0.113.1", 8080))
    assert engine.translate(packet, IN).send
    assert destination(packet) == ("192.168.64.2", 80)
    assert engine.remove_forward("tcp", ("203.0.113.1", 8080))
    [connection] = engine.connections()
    assert (connection.state, connection.internal) == ("syn_in", (IPv4Address("192.168.64.2"), 80))


def test_output_has_errors_and_fragments() -> None:
    engine = NatEngine(config(mtu_outside=576))
    assert engine.translate(udp(GUEST, OUTSIDE, ttl=1), OUT).reason == "ttl_expired"
    assert engine.translate(udp(GUEST, OUTSIDE, b"x" * 1000), OUT) is NatResult.TOO_BIG
    assert engine.translate(udp(GUEST, OUTSIDE, b"x" * 1000, df=False), OUT) is NatResult.FRAGMENTED
    output = list(engine.output())
    assert [d for d, _ in output] == [IN, IN, OUT, OUT]
    assert [p[20:22] for _, p in output[:2]] == [bytes((11, 0)), bytes((3, 4))]


def test_filtering() -> None:
    for filtering, passes in ((Filtering.ENDPOINT_INDEPENDENT, True), (Filtering.ADDRESS_DEPENDENT, False)):
        engine = NatEngine(config().with_filtering(filtering))
        packet = udp(GUEST, OUTSIDE)
        engine.translate(packet, OUT)
        assert engine.translate(udp(("192.0.2.1", 9), source(packet)), IN).send == passes


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"port_range": (5, 4)}, "port range 5 to 4"),
        ({"external": "192.168.64.9"}, "inside the internal network"),
        ({"external": []}, "1 to 1024 external"),
        ({"external": "nonsense"}, "not an IPv4 address"),
        ({"internal": "1.2.3.4/99"}, "not an IPv4 network"),
        ({"timeouts": {"udp": 0}}, "timeout udp"),
        ({"timeouts": {"tea": 5}}, "tea"),
        ({"table_size": 0}, "table size 0"),
        ({"mtu_inside": 67}, "MTU of 67"),
        ({"mtu_inside": 70_000}, "out of range"),
        ({"secret": b"short"}, "32 bytes"),
        ({"refusal": "loud"}, "loud"),
    ],
)
def test_wrong_configuration_is_a_sentence(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        NatEngineConfig(**{"external": "203.0.113.1", **wrong})  # type: ignore[arg-type]


def test_results_are_words() -> None:
    assert NatResult.dropped("no_flow") is NatResult.dropped("no_flow")
    assert repr(NatResult.dropped("no_flow")) == "NatResult.dropped('no_flow')"
    assert repr(NatResult.TRANSLATED) == "NatResult.TRANSLATED"
    assert not NatResult.dropped("policy").send
