"""NatEngine from Python: buffers of all kinds, batches, results, time, published ports, wrong values."""

from __future__ import annotations

import array
import sys
import threading
from ipaddress import IPv4Address

import pytest
from guestnet import (
    ConfigError,
    NatDirection,
    NatEngine,
    NatEngineConfig,
    NatResult,
    PacketPool,
    PortInUse,
)
from guestnet.config import Filtering
from unit.packets import check, destination, echo, source, tcp, udp

OUT, IN = NatDirection.OUTBOUND, NatDirection.INBOUND
GUEST, OUTSIDE = ("192.168.64.2", 50000), ("198.51.100.7", 80)


def config(**more: object) -> NatEngineConfig:
    return NatEngineConfig("203.0.113.1", secret=bytes(32), **more)  # type: ignore[arg-type]


def test_any_writable_buffer() -> None:
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
        ({"port_range": (5, 4)}, "port range 5-4"),
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
