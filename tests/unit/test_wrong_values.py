"""Whatever a program gives: a GuestnetError for a wrong value, a TypeError for a wrong type, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guestnet import (
    Datapath,
    DatapathPoller,
    GuestnetError,
    IpAllocator,
    NatConfig,
    NatDirection,
    NatEngine,
    NatEngineConfig,
    NatNetwork,
    PacketPool,
    Ring,
)

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 5, 1 << 16, 1 << 32, 1 << 64, 1 << 70, 1.5, 1e300, math.inf, -math.inf, math.nan,
    "", "x", "a b", "\0", "\ud800", "x" * 300, "1.2.3", "::1", b"", b"x", bytes(6),
    (), [], [1], (5, 1), (0, 70000), {}, {"x": 1}, [None], object(),
)  # fmt: skip
OUT = NatDirection.OUTBOUND
ENGINE = {"external": ("203.0.113.1",), "internal": "10.0.0.0/24"}


def misused(call: Callable[[Any], object]) -> None:
    """Calls with every strange value."""
    for value in STRANGE:
        try:
            call(value)
        except (GuestnetError, TypeError):
            continue
        except BaseException as error:
            raise AssertionError(f"{value!r} gave {error!r}") from error


def settings(of: type) -> list[str]:
    return list(of.__dataclass_fields__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [n for n in settings(NatEngineConfig) if n != "table_size"])
def test_settings_of_an_engine(name: str) -> None:
    misused(lambda value: NatEngineConfig(**{**ENGINE, name: value}))


@pytest.mark.parametrize("name", settings(NatConfig))
def test_settings_of_a_network(name: str) -> None:
    misused(lambda value: NatConfig(**{name: value}))


@pytest.fixture(scope="module")
def engine() -> NatEngine:
    return NatEngine(NatEngineConfig(**ENGINE))  # type: ignore[arg-type]


def test_calls_of_an_engine(engine: NatEngine) -> None:
    packet = bytearray(60)
    misused(lambda value: engine.translate(packet, OUT, now=value))
    misused(lambda value: engine.translate(packet, OUT, offset=value))
    misused(lambda value: engine.translate(packet, value))
    misused(lambda value: engine.translate(value, OUT))
    misused(lambda value: engine.translate_frame(value, OUT))
    misused(lambda value: engine.translate_batch(value, OUT))
    misused(lambda value: engine.translate_batch([value], OUT))
    misused(lambda value: engine.translate_batch(packet, OUT, offsets=value))
    misused(lambda value: engine.translate_batch(packet, OUT, offsets=[value]))
    misused(lambda value: engine.translate_batch(packet, OUT, offsets=[0], lengths=[value]))
    misused(lambda value: engine.translate_batch(PacketPool(8, 64), OUT, indices=[value]))
    misused(lambda value: engine.add_forward(value, ("203.0.113.1", 80), ("10.0.0.2", 80)))
    misused(lambda value: engine.add_forward("tcp", (value, 80), ("10.0.0.2", 80)))
    misused(lambda value: engine.add_forward("tcp", ("203.0.113.1", value), ("10.0.0.2", 80)))
    misused(lambda value: engine.add_forward("tcp", ("203.0.113.1", 80), value))
    misused(lambda value: engine.remove_forward("tcp", value))
    misused(lambda value: engine.expire(visits=value) if value is not True else None)


def test_time_of_an_engine() -> None:
    for call in (NatEngine.expire, NatEngine.expire_connections):
        misused(lambda value, call=call: call(NatEngine(NatEngineConfig(**ENGINE)), now=value))  # type: ignore


def test_a_packet_that_cannot_be_written_is_a_type_error(engine: NatEngine) -> None:
    for packet in (bytes(60), memoryview(bytes(60))):
        with pytest.raises(TypeError):
            engine.translate(packet, OUT)
        with pytest.raises(TypeError):
            engine.translate_batch([packet], OUT)


def test_pools_and_rings() -> None:
    misused(lambda value: PacketPool(value, 64) if value != 1 << 32 else None)
    misused(lambda value: PacketPool(8, value))
    pool = PacketPool(8, 64)
    for method in (pool.get, pool.free, pool.take):
        misused(method)
    misused(lambda value: pool.set(value, b"x"))
    misused(lambda value: pool.set(0, value))
    misused(pool.put)
    misused(lambda value: Ring(value) if value != 1 << 32 else None)
    ring = Ring(8)
    misused(ring.enqueue)
    misused(ring.enqueue_batch)
    misused(ring.dequeue_batch)


def test_datapaths_and_pollers() -> None:
    config = NatEngineConfig(**ENGINE)  # type: ignore[arg-type]
    misused(lambda value: Datapath(config, gateway_mac=value))
    path = Datapath(config)
    misused(lambda value: path.add_guest(value, "02:00:00:00:00:01"))
    misused(lambda value: path.add_guest("10.0.0.2", value))
    for name in ("batch_size", "strategy", "max_spins"):
        misused(lambda value, name=name: DatapathPoller(**{name: value}))  # type: ignore[misc]
    misused(DatapathPoller().poll_once)


def test_allocators() -> None:
    misused(lambda value: IpAllocator(value, "10.0.0.9"))
    misused(lambda value: IpAllocator("10.0.0.1", value))
    allocator = IpAllocator("10.0.0.1", "10.0.0.9")
    for method in (allocator.allocate_specific, allocator.release, allocator.is_allocated):
        misused(method)


@pytest.fixture(scope="module", params=["stopped", "running"])
def network(request: pytest.FixtureRequest) -> Iterator[NatNetwork]:
    made = NatNetwork(dhcp=False)
    if request.param == "stopped":
        yield made
    else:
        with made:
            yield made


def test_calls_of_a_network(network: NatNetwork, tmp_path: Any) -> None:
    for name in ("mac", "ip", "hostname"):

        def create(value: object, name: str = name) -> None:
            network.create_endpoint("strange", **{name: value})  # type: ignore[arg-type]
            network.remove_endpoint("strange")

        misused(create)
    misused(network.create_endpoint)
    misused(network.remove_endpoint)
    misused(network.get_endpoint)
    misused(lambda value: network[value])
    misused(lambda value: value in network)
    misused(lambda value: network.recall_guest(value, "vm1"))
    misused(lambda value: network.recall_guest("02:00:00:00:00:01", value))
    misused(network.publish)
    misused(network.unpublish)
    misused(network.on_event)
    misused(lambda value: network.attach(value, "memory"))
    misused(lambda value: network.attach("nobody", value))
    misused(lambda value: network.attach("nobody", "tap", fd=None if value in (0, True) else value))
    misused(lambda value: network.attach("nobody", "stream", sock=value))
    misused(lambda value: network.attach("nobody", "memory", on_frame=value))
    misused(lambda value: network.listen(value, tmp_path / "net.sock"))
    misused(lambda value: network.listen("stream", tmp_path / value if isinstance(value, str) else value))
    misused(
        lambda value: network.start_capture(
            f"{tmp_path}/no/{value}"
            if isinstance(value, str) and value
            else None  # descriptors that there may be
            if value in (0, 5)
            else value
        )
    )
    misused(lambda value: network.services.dns.add_record(value, "192.0.2.1"))
    misused(lambda value: network.services.dns.add_record("strange.example", value))
    misused(network.services.dns.remove_record)
