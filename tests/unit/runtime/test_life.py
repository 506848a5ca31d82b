"""The life of a network, and what misuse gets."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from guestnet import (
    AddressPoolExhausted,
    AlreadyRunning,
    ConfigError,
    EndpointExists,
    EndpointNotFound,
    GuestnetError,
    NatConfig,
    NatNetwork,
    NetMode,
    NotRunning,
)

PLAIN = NatConfig(dhcp=False, dns=False)


def test_creation() -> None:
    network = NatNetwork.with_defaults()
    assert not network.is_running
    assert network.endpoint_count == 0
    assert str(network.gateway) == "192.168.64.1"
    assert network.config == NatConfig()
    assert repr(network) == (
        "<NatNetwork 192.168.64.0/24 nat gateway=192.168.64.1 endpoints=0 connections=0 stopped>"
    )


def test_endpoints_without_a_running_network() -> None:
    network = NatNetwork(PLAIN)
    endpoint = network.create_endpoint("vm1")
    assert (endpoint.mode, str(endpoint.ip)) == (NetMode.NAT, "192.168.64.2")
    network.create_endpoint("vm2")
    assert network.endpoint_count == len(network) == 2
    assert network.get_endpoint("vm1") is endpoint
    assert "vm1" in network
    network.remove_endpoint("vm1")
    assert network.endpoint_count == 1
    assert network.get_endpoint("vm1") is None
    with pytest.raises(EndpointNotFound):
        network.remove_endpoint("vm1")
    with pytest.raises(EndpointExists):
        network.create_endpoint("vm2")
    assert [endpoint.id for endpoint in network] == ["vm2"]


def test_the_same_while_it_runs() -> None:
    with NatNetwork(PLAIN.replace(subnet="10.0.0.0/30")) as network:
        network.create_endpoint("vm1")
        with pytest.raises(EndpointExists):
            network.create_endpoint("vm1")
        with pytest.raises(AddressPoolExhausted):
            network.create_endpoint("vm2")
        with pytest.raises(EndpointNotFound):
            network.remove_endpoint("vm2")
        network.remove_endpoint("vm1")
        network.create_endpoint("vm2")
        assert network.endpoint_count == 1


def test_start_and_stop() -> None:
    network = NatNetwork(PLAIN)
    for _ in range(3):
        network.start()
        assert network.is_running
        with pytest.raises(AlreadyRunning):
            network.start()
        network.stop()
        network.stop()
        assert not network.is_running


def test_endpoints_outlive_a_stop() -> None:
    network = NatNetwork(PLAIN)
    network.create_endpoint("before")
    with network:
        network.create_endpoint("during")
        network.attach("before", "memory")
    assert [e.id for e in network.endpoints] == ["before", "during"]
    assert network.endpoints[0].attachment is None
    with network:
        network.attach("during", "memory")
        network.attach("before", "memory")


@pytest.mark.parametrize(
    "call",
    [
        lambda n: n.attach("vm1", "memory"),
        lambda n: n.listen("stream", "/tmp/never"),
        lambda n: n.publish("0:80"),
        lambda n: n.flows(),
        lambda n: n.endpoint_stats(),
        lambda n: n.start_capture("/tmp/never"),
    ],
)
def test_what_needs_a_running_network_says_so(call: object) -> None:
    network = NatNetwork(PLAIN)
    with pytest.raises(NotRunning, match="start it"):
        call(network)  # type: ignore[operator]
    assert not Path("/tmp/never").exists()


def test_wrong_configurations() -> None:
    with pytest.raises(ConfigError, match="NatConfig"):
        NatNetwork({"subnet": "10.0.0.0/24"})  # type: ignore[arg-type]
    network = NatNetwork(PLAIN.replace(capture="/nowhere/at/all.pcapng"))
    with pytest.raises(ConfigError, match="/nowhere/at/all"):
        network.start()
    assert not network.is_running


def test_a_network_that_was_stopped_holds_nothing() -> None:
    """Neither one that is kept, to be started again, nor what it handed out, nor until the garbage collector
    comes."""

    def held() -> int:
        return len(os.listdir("/proc/self/fd"))

    kept: list[object] = []
    gc.collect()
    gc.disable()
    try:
        for turn in range(6):
            network = NatNetwork()
            with network:
                network.create_endpoint("vm1")
                guest = network.attach("vm1", "memory")
                guest.send(bytes(60))
                network.publish("127.0.0.1:0:80")
            kept.append(network)
            kept.append(guest)
            if turn == 0:
                before = held()  # what is opened once for all is open
        assert held() == before
    finally:
        gc.enable()


def test_no_threads_and_descriptors_are_left() -> None:
    def left() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    NatNetwork(PLAIN).start  # noqa: B018 - everything is imported
    with NatNetwork(PLAIN):
        pass
    before = left()
    for _ in range(5):
        with NatNetwork(PLAIN) as network:
            network.create_endpoint("vm1")
            network.attach("vm1", "memory")
            network.publish("0:80")
    assert left() == before


async def test_asyncio() -> None:
    network = NatNetwork(PLAIN)
    async with network:
        assert network.is_running
        with pytest.raises(AlreadyRunning):
            await network.astart()
        endpoints = await asyncio.gather(*(network.acreate_endpoint(f"vm{n}") for n in range(20)))
        assert len({e.ip for e in endpoints}) == 20
        with pytest.raises(EndpointExists):
            await network.acreate_endpoint("vm1")
        await network.aattach("vm1", "memory")
        forward = await network.apublish("0:vm1:80")
        assert await network.aflows() == []
        assert set(await network.aendpoint_stats()) == {e.id for e in endpoints}
        await network.aunpublish(forward)
        await network.aremove_endpoint("vm1")
        assert network.endpoint_count == 19
    assert not network.is_running
    await network.aclose()
    with pytest.raises(NotRunning):
        await network.aflows()


def test_waiting_in_the_control_thread_is_refused() -> None:
    async def use() -> list[str]:
        seen = []
        for call in (network.flows, network.stop, lambda: network.create_endpoint("x")):
            try:
                call()
            except GuestnetError as error:
                seen.append(str(error))
        return seen

    with NatNetwork(PLAIN) as network:
        seen = network._run(use())
        assert len(seen) == 3
        assert all("another thread" in text for text in seen)
        assert network.endpoint_count == 0


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False
    )


BEGIN = """
from guestnet import NatConfig, NatNetwork
network = NatNetwork(NatConfig(dhcp=False, dns=False))
network.start()
network.create_endpoint("vm1")
"""


@pytest.mark.parametrize(
    "end",
    ["", "raise SystemExit(0)", "import threading; threading.Thread(target=network.flows).start()"],
)
def test_a_program_that_forgets_to_stop_ends_all_the_same(end: str) -> None:
    done = run(BEGIN + end)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_leaves_the_network_to_its_parent() -> None:
    code = """
import os
pid = os.fork()
if pid == 0:
    network.stop()
    raise SystemExit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
network.create_endpoint("vm2")
print(network.flows())
"""
    done = run("import warnings; warnings.simplefilter('ignore')\n" + BEGIN + code)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_a_fork_is_told_that_the_network_is_not_its_own() -> None:
    code = """
import asyncio, os
pid = os.fork()
if pid == 0:
    for call in (network.flows, lambda: network.create_endpoint("x"), lambda: network.publish("0:80"),
                 lambda: asyncio.run(network.aflows())):
        try:
            call()
        except NotRunning as error:
            assert "forked" in str(error)
        else:
            os._exit(1)
    assert not network.is_running
    network.start()  # one of its own
    network.create_endpoint("vm2")
    network.stop()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
print(network.flows(), network.endpoint_count)
"""
    imports = "import warnings; warnings.simplefilter('ignore')\nfrom guestnet import NotRunning\n"
    done = run(imports + BEGIN + code)
    assert (done.stdout, done.stderr, done.returncode) == ("[] 1\n", "", 0)


def test_a_fork_while_a_network_starts_can_use_its_copy() -> None:
    """Another thread has the lock of the network at that moment, and does not exist in the new process."""
    code = """
import os, signal
other = NatNetwork(NatConfig(dhcp=False, dns=False))
with other._changing:
    pid = os.fork()
    if pid == 0:
        signal.alarm(15)  # ends a process that hangs
        other.start()
        other.stop()
        assert (network.stats().rx_frames, network.worker_stats()) == (0, [])
        network.stop()
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""
    done = run("import warnings; warnings.simplefilter('ignore')\n" + BEGIN + code)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_interrupted_while_it_waits() -> None:
    code = """
import os, signal, threading
def slow():
    import asyncio
    async def work():
        await asyncio.sleep(60)
    network._run(work())
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    slow()
except KeyboardInterrupt:
    print("interrupted")
network.create_endpoint("vm2")
network.stop()
"""
    done = run(BEGIN + code)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


def test_stop_while_others_wait() -> None:
    network = NatNetwork(PLAIN)
    network.start()

    async def for_ever() -> None:
        await asyncio.sleep(600)

    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            network._run(for_ever())
        except NotRunning as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    network.flows()
    network.stop()
    thread.join(10)
    assert len(outcome) == 1


def test_settings_without_a_config() -> None:
    assert NatNetwork(subnet="10.9.0.0/24", dhcp=False).config == NatConfig(subnet="10.9.0.0/24", dhcp=False)
    with pytest.raises(ConfigError, match="subnet cannot be given beside a NatConfig"):
        NatNetwork(NatConfig(), subnet="10.9.0.0/24")
    with pytest.raises(ConfigError, match="mtu"):
        NatNetwork(mtu=1)
    with pytest.raises(TypeError):
        NatNetwork(nonsense=1)


def test_an_endpoint_by_its_id() -> None:
    network = NatNetwork(PLAIN)
    endpoint = network.create_endpoint("vm1")
    assert network["vm1"] is endpoint
    for wrong in ("vm2", "", 1):
        with pytest.raises(EndpointNotFound):
            _ = network[wrong]  # type: ignore[index]


async def test_an_endpoint_publishes_its_ports_and_has_its_counters() -> None:
    async with NatNetwork(PLAIN) as network:
        one = await network.acreate_endpoint("one", hostname="web")
        await network.acreate_endpoint("two")
        forward = one.publish("127.0.0.1:0:80")
        assert (forward.spec.guest, forward.target) == ("one", one.ip)
        other = await one.apublish(f"127.0.0.1:0:{one.ip}:81/udp")
        assert other.spec.guest == "one"
        with pytest.raises(ConfigError, match="names 'two'"):
            one.publish("127.0.0.1:0:two:80")
        assert one.stats() == await one.astats() == network.endpoint_stats()["one"]
        forward.close()
        await other.aclose()
        assert network.forwards == []
        forward.close()
        await other.aclose()
        network.remove_endpoint("one")
        with pytest.raises(EndpointNotFound):
            one.stats()
    with pytest.raises(NotRunning):
        one.stats()
    forward.close()


@pytest.mark.parametrize("wrong", [1, None, b"forward-1"])
async def test_what_is_no_forward_or_callback_is_a_type_error(wrong: object) -> None:
    with NatNetwork(PLAIN) as network:
        with pytest.raises(TypeError, match="not a Forward"):
            network.unpublish(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="not a Forward"):
            await network.aunpublish(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="cannot be called"):
            network.on_event(wrong)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ConfigError)):
            network.publish(wrong and 1)  # type: ignore[arg-type]


async def test_frames_of_a_memory_guest_are_awaited() -> None:
    async with NatNetwork(PLAIN) as network:
        await network.acreate_endpoint("vm1")
        guest = await network.aattach("vm1", "memory")
        assert await guest.arecv(0) is None
        waiting = asyncio.create_task(guest.arecv())
        await asyncio.sleep(0)
        guest.deliver(b"one")
        guest.deliver(b"two")
        assert await waiting == b"one"
        assert await guest.arecv(5) == b"two"
        given_up = asyncio.create_task(guest.arecv())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        guest.deliver(b"three")
        assert await guest.arecv() == b"three"
        waiting = asyncio.create_task(guest.arecv())
        await asyncio.sleep(0)
    with pytest.raises(NotRunning):
        await waiting
    with pytest.raises(NotRunning):
        await guest.arecv(1)
