"""Work that is given up halfway: what the control side knows and what the worker has stay the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Coroutine
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from guestnet import AlreadyRunning, NatConfig, NatNetwork
from guestnet.model.forward_spec import ForwardSpec
from guestnet.model.handles import Ids
from guestnet.model.ipam import parse_mac
from guestnet.runtime.published.host_sockets import close_sockets, open_sockets
from guestnet.runtime.published.publishing import Publishing
from guestnet.testing.guest import Guest

from .conftest import AddGuest


def give_up(network: NatNetwork, work: Coroutine[Any, Any, object]) -> None:
    """Begins work in the control thread and cancels it when its command is given but not acknowledged."""

    async def begin() -> None:
        task = asyncio.get_running_loop().create_task(work)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    network._run(begin())


def test_an_endpoint_that_was_not_made_leaves_its_address_free(
    network: NatNetwork, add_guest: AddGuest
) -> None:
    give_up(network, network._create("vm1", None, None, None, None, frozenset(), None))
    assert network.endpoint_count == 0
    guest = add_guest("vm1")
    assert str(network.endpoints[0].ip) == "192.168.64.2"
    guest.ping(str(network.gateway))


def test_an_endpoint_that_is_being_removed_is_gone(network: NatNetwork, add_guest: AddGuest) -> None:
    add_guest("vm1")
    network.publish("127.0.0.1:0:vm1:80")
    give_up(network, network._remove("vm1"))
    assert network.forwards[0].target is None
    guest = add_guest("vm2")
    assert str(network.endpoints[0].ip) == "192.168.64.2"
    guest.ping(str(network.gateway))


def test_an_endpoint_that_is_removed_while_it_is_made(network: NatNetwork, add_guest: AddGuest) -> None:
    async def both() -> None:
        making = asyncio.get_running_loop().create_task(
            network._create("vm1", None, None, None, None, frozenset(), None)
        )
        await asyncio.sleep(0)
        await network._remove("vm1")
        await making

    network._run(both())
    assert network.endpoint_count == 0
    guest = add_guest("vm2")
    assert str(network.endpoints[0].ip) == "192.168.64.2"
    guest.ping(str(network.gateway))


def test_an_attachment_that_was_given_up_can_be_made_again(network: NatNetwork) -> None:
    network.create_endpoint("vm1")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        give_up(network, network._live().attach("vm1", "stream", theirs.fileno(), None))
        theirs.close()
        ours.settimeout(10)
        assert ours.recv(1) == b"", "the worker has let go of it"
    assert network.endpoints[0].attachment is None
    guest = Guest(parse_mac(network.endpoints[0].mac), lambda frame: attachment.send(frame))  # noqa: PLW0108
    attachment = network.attach("vm1", "memory", on_frame=guest.receive)
    guest.address = IPv4Interface("192.168.64.2/24")
    guest.router = network.gateway
    guest.ping(str(network.gateway))


def test_ports_that_were_not_published_are_free(network: NatNetwork) -> None:
    spec = ForwardSpec.parse("127.0.0.1:0:80")
    sockets = open_sockets(spec)
    port = sockets[0][0].getsockname()[1]
    give_up(network, network._live().publish(spec, sockets))
    close_sockets(sockets)
    network.flows()
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


def three_free_ports() -> int:
    """The first of three in a row, below those that the kernel gives to connections."""
    for first in range(20_000, 30_000, 3):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + 3):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no three free ports")


def test_a_forward_that_is_taken_back_is_taken_back_whole(network: NatNetwork, add_guest: AddGuest) -> None:
    add_guest("vm1").serve(80, lambda connection: connection.close())
    first = three_free_ports()
    forward = network.publish(f"127.0.0.1:{first}-{first + 2}:vm1:80-82")
    give_up(network, network._live().unpublish(forward))
    network.flows()
    for port in range(first, first + 3):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 10)


def test_a_listener_that_was_not_made_listens_nowhere(network: NatNetwork, tmp_path: Path) -> None:
    path, other = tmp_path / "guests", tmp_path / "another name"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen(1)
        os.link(path, other)
        give_up(network, network._live().listen("stream", str(path), sock))
    network.flows()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guest, pytest.raises(ConnectionRefusedError):
        guest.connect(str(other))


def test_a_guest_that_goes_while_its_port_is_published(network: NatNetwork, add_guest: AddGuest) -> None:
    add_guest("vm1")
    spec = ForwardSpec.parse("127.0.0.1:0:vm1:80")
    sockets = open_sockets(spec)

    async def both() -> None:
        publishing = asyncio.get_running_loop().create_task(network._live().publish(spec, sockets))
        await asyncio.sleep(0)
        await network._remove("vm1")
        await publishing

    network._run(both())
    close_sockets(sockets)
    assert network.forwards[0].target is None


async def test_a_port_of_the_uplink_that_was_not_published_is_taken_back() -> None:
    """All of the range, the one that was waited for too, and though the worker's queue is full."""
    registry = NatNetwork()._registry
    ensured: list[int] = []

    async def do(_command: object, number: int, *_: object, **_keywords: object) -> None:
        if number == 2:
            raise asyncio.CancelledError

    plane = SimpleNamespace(add_uplink_forward=None, remove_forward=None)
    control: Any = SimpleNamespace(plane=plane, do=do, ensure=lambda _command, number: ensured.append(number))
    publishing = Publishing(control, registry, Ids(), do)
    publishing.external = (IPv4Address("192.0.2.1"),)
    with pytest.raises(asyncio.CancelledError):
        await publishing.add_external(ForwardSpec.parse("8080-8082:80-82"))
    assert (ensured, publishing.all()) == ([1, 2, 3], [])


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8])
async def test_a_start_that_was_given_up_leaves_nothing_running(turns: int) -> None:
    made = NatNetwork(NatConfig(dhcp=False, dns=False))
    task = asyncio.get_running_loop().create_task(made.astart())
    for _ in range(turns):
        await asyncio.sleep(0)
    if task.cancel():
        with pytest.raises(asyncio.CancelledError):
            await task
    else:  # The worker was quicker than the turns of the loop.
        await made.astop()
    assert not made.is_running
    async with made:  # and it can be started again
        assert made.is_running
    assert not made.is_running


async def test_a_start_that_is_cancelled_when_it_is_done() -> None:
    """The thread has started it, and the loop is not told yet."""
    made = NatNetwork(NatConfig(dhcp=False, dns=False))
    task = asyncio.get_running_loop().create_task(made.astart())
    await asyncio.sleep(0)
    while not made.is_running:
        time.sleep(0.001)  # noqa: ASYNC251 - the loop is to stand still
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not made.is_running


async def test_a_second_start_that_is_given_up_does_not_stop_the_first() -> None:
    async with NatNetwork(NatConfig(dhcp=False, dns=False)) as made:
        task = asyncio.get_running_loop().create_task(made.astart())
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, AlreadyRunning):
            await task
        assert made.is_running
        assert await made.aflows() == []
