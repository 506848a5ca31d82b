"""Typed events: who gets which, in which order, and what is lost."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

import guestnet
import pytest
from guestnet import (
    EventsLost,
    FlowClosed,
    FlowEvent,
    FlowOpened,
    GuestDown,
    GuestUp,
    LeaseTaken,
    LogMessage,
    NatConfig,
    NatNetwork,
    NetworkEvent,
)
from guestnet.control.callbacks import CallbackPool
from guestnet.control.event_hub import EventHub

from .conftest import AddGuest, Events, add_memory_guest, until

PLAIN = NatConfig(dhcp=False, dns=False)
MAC, ADDRESS = "02:00:00:00:00:01", IPv4Address("192.168.64.2")
CLASSES = [
    one
    for name in guestnet.__all__
    if isinstance(one := getattr(guestnet, name), type) and issubclass(one, NetworkEvent)
]


def test_every_kind_has_a_name_of_its_own_and_a_documentation() -> None:
    assert len({one.kind for one in CLASSES}) == len(CLASSES) >= 15
    assert all(one.__doc__ for one in CLASSES)


def test_fields_are_typed_and_details_are_plain() -> None:
    up = GuestUp(endpoint="vm1", mac=MAC, ip=ADDRESS, attachment="tap")
    assert up.details() == {"mac": MAC, "ip": "192.168.64.2", "hostname": None, "attachment": "tap"}
    opened = FlowOpened(
        network="n", time=1.5, sequence=3, endpoint="vm1", flow="flow-1", protocol=6, guest=(ADDRESS, 1),
        remote=(ADDRESS, 2), inbound=False,
    )  # fmt: skip
    assert json.loads(json.dumps(opened.as_dict())) == {
        "kind": "flow_opened", "network": "n", "time": 1.5, "sequence": 3,
        "endpoint": "vm1", "flow": "flow-1", "protocol": 6, "guest": ["192.168.64.2", 1],
        "remote": ["192.168.64.2", 2], "inbound": False,
    }  # fmt: skip
    with pytest.raises(AttributeError):
        up.mac = "other"  # type: ignore[misc]


def test_events_name_their_network_and_are_numbered_across_its_runs() -> None:
    network = NatNetwork(PLAIN, name="lab")
    events = Events(network)
    for _ in range(2):
        with network:
            network.create_endpoint(f"vm{len(network)}")
            network.attach(f"vm{len(network) - 1}", "memory")
    seen = [events.next(GuestUp) for _ in range(2)]
    assert [(event.network, event.sequence) for event in seen] == [("lab", 1), ("lab", 2)]
    assert 0 < seen[0].time <= seen[1].time
    assert NatNetwork().name != NatNetwork().name


def test_a_callback_gets_the_classes_that_it_asks_for(
    network: NatNetwork, add_guest: AddGuest, echo: int
) -> None:
    seen: dict[str, list[NetworkEvent]] = {"ups": [], "flows": [], "all": [], "default": []}
    network.on_event(seen["ups"].append, GuestUp, GuestDown)
    end = network.on_event(seen["flows"].append, FlowEvent)
    network.on_event(seen["all"].append, NetworkEvent)
    network.on_event(seen["default"].append)
    connection = add_guest("vm1").connect("192.168.64.254", echo)
    connection.send(b"x")
    connection.recv(1)
    connection.close()
    until(lambda: any(isinstance(event, FlowClosed) for event in seen["all"]), "the end of the flow")
    assert [type(event) for event in seen["ups"]] == [type(event) for event in seen["default"]] == [GuestUp]
    assert {type(event) for event in seen["flows"]} == {FlowOpened, FlowClosed}
    assert len({event.flow for event in seen["flows"] if isinstance(event, FlowOpened | FlowClosed)}) == 1
    assert sorted(event.sequence for event in seen["all"]) == [event.sequence for event in seen["all"]]
    assert network._live().emit.wants_flows
    end()
    end()
    with pytest.raises(TypeError, match="not a class of events"):
        network.on_event(print, "guest_up")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="not a class of events"):
        network.events(int)  # type: ignore[type-var]


async def test_an_iterator_ends_with_the_network() -> None:
    network = NatNetwork(PLAIN)
    events = network.events()

    async def collect() -> list[str]:
        return [event.kind async for event in events]

    task = asyncio.create_task(collect())
    async with network:
        for n in range(3):
            await network.acreate_endpoint(f"vm{n}")
            await network.aattach(f"vm{n}", "memory")
    assert await asyncio.wait_for(task, 30) == ["guest_up"] * 3
    assert [event async for event in events] == []


async def test_an_iterator_can_be_left_and_cancelled() -> None:
    async with NatNetwork(PLAIN) as network:
        with network.events(GuestUp, most=10) as events:
            waiting = asyncio.create_task(anext(events))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await network.acreate_endpoint("vm1")
            await network.aattach("vm1", "memory")
            assert (await anext(events)).endpoint == "vm1"
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        assert network._events._receivers == ()


@pytest.fixture
def pool() -> Iterator[CallbackPool]:
    made = CallbackPool()
    yield made
    made.close()


def emit(hub: EventHub, count: int, endpoint: str = "vm1") -> None:
    for _ in range(count):
        hub.emit(LeaseTaken, endpoint, mac=MAC, ip=ADDRESS)


async def test_what_is_lost_is_counted_and_reported() -> None:
    hub = EventHub("lab")
    stream, leases = hub.add_stream((), 10), hub.add_stream((LeaseTaken,), 10)
    emit(hub, 30)
    lost = stream.lost
    assert lost == 30 - len(stream._events) >= 20
    first = [await anext(stream) for _ in range(len(stream._events))]
    assert all(isinstance(event, LeaseTaken) for event in first)
    while leases._events:
        await anext(leases)
    emit(hub, 1)
    report = await anext(stream)
    assert isinstance(report, EventsLost)
    assert report.count == lost
    assert isinstance(await anext(stream), LeaseTaken)
    # Who asks for a class gets nothing else, and has the counter.
    assert isinstance(await anext(leases), LeaseTaken)
    assert (leases.lost, hub.lost) == (lost, 2 * lost)


def test_events_of_one_guest_leave_room_for_those_of_another() -> None:
    hub = EventHub("lab")
    stream = hub.add_stream((), 100)
    emit(hub, 1000)
    emit(hub, 3, "vm2")
    hub.emit(LogMessage, level="warning", message="for the owner")
    assert [event.endpoint for event in stream._events].count("vm2") == 3
    assert isinstance(stream._events[-1], LogMessage)


def test_a_callback_that_blocks_loses_events_and_hears_of_it() -> None:
    pool, hub = CallbackPool(), EventHub("lab")
    hold, began, seen = threading.Event(), threading.Event(), []

    def callback(event: NetworkEvent) -> None:
        seen.append(event)
        began.set()
        hold.wait(60)

    hub.open(pool)
    hub.add_callback(callback, ())
    emit(hub, 1)
    assert began.wait(30)
    emit(hub, 10_000)
    assert hub.lost > 0
    hold.set()
    hub.close()
    hub.open(pool)
    emit(hub, 1)
    hub.close()
    reports = [event for event in seen if isinstance(event, EventsLost)]
    assert [event.count for event in reports] == [hub.lost]
    assert len(seen) == 10_002 - hub.lost + 1
    pool.close()


def test_a_fork_starts_with_empty_queues(pool: CallbackPool) -> None:
    """What waited in the parent is the parent's, and so is the thread that held a lock when it forked."""
    hub, seen = EventHub("lab"), []
    hub.add_callback(seen.append, ())
    hub.open(CallbackPool(0))  # whose threads a fork does not have
    emit(hub, 10_000)
    assert hub.lost
    lost = hub.lost
    [receiver] = hub._receivers
    receiver._lock.acquire()
    hub.open(pool)
    emit(hub, 3)
    hub.close()
    assert [type(event) for event in seen] == [EventsLost, *[LeaseTaken] * 3]
    assert hub.lost == lost


def test_ids_are_unique_for_the_life_of_a_network(tmp_path: Any) -> None:
    network = NatNetwork(PLAIN)
    seen: list[str] = []
    for run in range(2):
        with network:
            if not run:
                network.create_endpoint("vm1")
            attachment = network.attach("vm1", "memory")
            listener = network.listen("stream", tmp_path / "net.sock")
            forward = network.publish("127.0.0.1:0:vm1:80")
            for one in (attachment, listener, forward):
                assert one.id in repr(one)
                seen.append(one.id)
            assert network.attachments[attachment.id] is attachment
            assert network.listeners[listener.id] is listener
            assert network.forwards[forward.id] is forward
            listener.close()
            assert network.listeners == []
    assert len(set(seen)) == len(seen) == 6
    assert network.attachments == network.forwards == []


def test_an_id_stands_for_its_object() -> None:
    with NatNetwork(PLAIN) as network:
        first, second = (network.publish("127.0.0.1:0:vm1:80") for _ in range(2))
        network.unpublish(first.id)
        assert network.forwards == [second]
        with pytest.raises(guestnet.ForwardNotFound, match="forward-2"):
            network.unpublish(first.id)
        with pytest.raises(LookupError, match="Known ids: none"):
            _ = network.attachments["attachment-7"]
        assert network.forwards.find("forward-7") is None


def test_flows_have_the_ids_of_their_events(network: NatNetwork, add_guest: AddGuest, echo: int) -> None:
    events = Events(network, flows=True)
    connection = add_guest("vm1").connect("192.168.64.254", echo)
    opened = events.next(FlowOpened)
    assert [flow.id for flow in network.flows()] == [opened.flow]
    connection.close()
    assert events.next(FlowClosed).flow == opened.flow


def test_workers_do_not_share_ids_of_flows(echo: int) -> None:
    with NatNetwork(PLAIN.replace(workers=2, host_loopback=True)) as network:
        connections = [add_memory_guest(network, f"vm{n}").connect("192.168.64.254", echo) for n in range(4)]
        assert len({flow.id for flow in network.flows()}) == len(connections)
