"""Many networks in one process, and what they share."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from guestnet import ConfigError, NatConfig, NatNetwork, NetworkEvent, NotRunning, Runtime
from guestnet.control.channel import Control
from guestnet.model.events import GuestUp
from guestnet.testing.guest import GuestError
from unit.runtime.conftest import Events, add_memory_guest, until

PLAIN = NatConfig(dhcp=False, dns=False)


def control_threads() -> int:
    return sum(thread.name == "guestnet-control" for thread in threading.enumerate())


def test_networks_share_one_control_thread_that_ends_with_the_last() -> None:
    networks = [NatNetwork(PLAIN) for _ in range(20)]
    for network in networks:
        network.start()
    assert control_threads() == 1
    assert {network.runtime for network in networks} == {networks[0].runtime}
    assert networks[0].runtime.networks == 20
    for network in networks[:-1]:
        network.stop()
    assert control_threads() == 1
    assert networks[-1].create_endpoint("vm1")
    networks[-1].stop()
    assert control_threads() == 0
    with networks[0]:
        assert control_threads() == 1


def test_a_runtime_of_its_own_has_its_own_thread_until_it_is_closed() -> None:
    with Runtime() as runtime, NatNetwork(PLAIN) as other:
        assert control_threads() == 2
        for _ in range(2):
            with NatNetwork(PLAIN, runtime=runtime) as network:
                assert (control_threads(), runtime.networks, other.runtime.networks) == (2, 1, 1)
                assert network.runtime is runtime
        assert control_threads() == 2
    assert control_threads() == 0
    with pytest.raises(NotRunning, match="closed"):
        NatNetwork(PLAIN, runtime=runtime).start()
    with pytest.raises(TypeError, match="Runtime"):
        NatNetwork(PLAIN, runtime=4)  # type: ignore[arg-type]


def test_networks_share_the_packet_threads_of_their_runtime() -> None:
    with Runtime(workers=1) as runtime, Runtime(workers=2) as other:
        assert (runtime.workers, other.workers, runtime.threads) == (1, 2, 0)
        networks = [NatNetwork(PLAIN, runtime=runtime) for _ in range(5)]
        for network in networks:
            network.start()
        assert (runtime.networks, runtime.threads, other.threads) == (5, 1, 0)
        with NatNetwork(PLAIN.replace(workers=2), runtime=other) as several:
            assert (other.threads, len(several.worker_stats())) == (2, 2)
            guests = [add_memory_guest(network, "vm1") for network in (*networks, several)]
            for network, guest in zip((*networks, several), guests, strict=True):
                guest.ping(str(network.gateway))
            assert [network.endpoint_count for network in networks] == [1] * 5
        for network in networks:
            network.stop()
        assert (runtime.networks, runtime.threads, other.threads) == (0, 0, 0)
        with pytest.raises(ConfigError, match="workers"):
            NatNetwork(PLAIN.replace(workers=2), runtime=runtime).start()
        assert runtime.networks == 0


@pytest.mark.parametrize("workers", [0, 65, -1])
def test_a_number_of_workers_that_cannot_be(workers: int) -> None:
    with pytest.raises(ConfigError, match="workers"):
        Runtime(workers=workers)


def test_many_networks_have_one_set_of_threads() -> None:
    def tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    before = tasks()
    networks = [NatNetwork() for _ in range(100)]
    for network in networks:
        network.start()
        network.create_endpoint("vm1")
    runtime = networks[0].runtime
    assert runtime.networks == 100
    assert tasks() <= before + runtime.workers + 1
    for network in networks:
        network.stop()
    until(lambda: tasks() <= before, "the threads to end")


def test_a_runtime_that_is_closed_early_serves_its_networks_to_their_end() -> None:
    runtime = Runtime()
    network = NatNetwork(PLAIN, runtime=runtime)
    network.start()
    runtime.close()
    assert network.create_endpoint("vm1")
    assert control_threads() == 1
    network.stop()
    assert control_threads() == 0


def test_networks_with_the_same_subnet_do_not_meet() -> None:
    with NatNetwork() as first, NatNetwork() as second:
        networks = (first, second)
        guests = [add_memory_guest(network, "vm1") for network in networks]
        for n, (network, guest) in enumerate(zip(networks, guests, strict=True)):
            guest.name_server = network.gateway
            network.services.dns.add_record("which.example", f"192.0.2.{n}")
            assert str(guest.resolve("vm1")) == "192.168.64.2"
        assert [str(guest.resolve("which.example")) for guest in guests] == ["192.0.2.0", "192.0.2.1"]
        before = second.stats().rx_frames + second.stats().tx_frames
        add_memory_guest(first, "vm2").ping("192.168.64.2")
        guests[0].ping("192.168.64.3")
        assert second.stats().rx_frames + second.stats().tx_frames == before
        assert [network.endpoint_count for network in networks] == [2, 1]


def test_each_of_many_guests_with_one_address_reaches_its_own_gateway_and_no_other_guest() -> None:
    with Runtime(workers=2) as runtime:
        networks = [NatNetwork(PLAIN, runtime=runtime) for _ in range(50)]
        for network in networks:
            network.start()
        guests = [add_memory_guest(network, "vm1") for network in networks]
        assert {str(guest.address) for guest in guests} == {"192.168.64.2/24"}
        other = add_memory_guest(networks[0], "vm2")
        for network, guest in zip(networks, guests, strict=True):
            guest.ping(str(network.gateway))
        guests[0].ping("192.168.64.3")
        for guest in guests[1:4]:
            with pytest.raises(GuestError):
                guest.ping("192.168.64.3", patience=0.2)
        other.ping("192.168.64.2")
        assert [network.endpoint_count for network in networks] == [2] + [1] * 49
        assert all(len(network.endpoint_stats()) == network.endpoint_count for network in networks)
        assert (runtime.networks, runtime.threads) == (50, 2)
        # They end in another order than they began, and those that are left go on.
        for network in networks[::2]:
            network.stop()
        for network, guest in list(zip(networks, guests, strict=True))[1::2]:
            guest.ping(str(network.gateway))
            network.stop()
        assert (runtime.networks, runtime.threads) == (0, 0)


def test_the_end_of_a_network_ends_its_tasks_and_no_others() -> None:
    with Runtime() as runtime, NatNetwork(PLAIN, runtime=runtime) as staying:
        ending = NatNetwork(PLAIN, runtime=runtime)
        ending.start()
        mine, other = (n._live().control for n in (staying, ending))

        async def sleep(control: Control) -> Any:
            return control.loop.create_future(), await control.loop.create_future()

        waiting = [mine.submit(sleep(mine)), other.submit(sleep(other))]
        ending.flows()
        assert [len(control._party.tasks) for control in (mine, other)] == [1, 1]
        ending.stop()
        assert [future.done() for future in waiting] == [False, True]
        assert staying.create_endpoint("vm1")
        waiting[0].cancel()


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_error_in_one_network_does_not_end_the_thread_of_all(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error("on purpose")

    with Runtime() as runtime, NatNetwork(PLAIN, runtime=runtime) as network, caplog.at_level(logging.ERROR):
        loop = network._live().control.loop
        loop.call_soon_threadsafe(fail)
        assert network.create_endpoint("vm1")
        assert control_threads() == 1


def test_a_data_plane_whose_events_cannot_be_read_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    read, write = os.pipe()

    def drain(_most: int) -> list[Any]:
        raise OSError("broken")

    plane: Any = SimpleNamespace(event_fd=read, drain=drain, stop=lambda: None, is_healthy=True)
    with Runtime() as runtime, NatNetwork(PLAIN, runtime=runtime) as network:
        broken = Control(lambda: plane, dict, runtime)
        broken.start()
        os.write(write, b"x")
        until(lambda: broken._failure is not None, "the failure to be noted")
        assert network.create_endpoint("vm1")
        broken.stop()
        assert "broken" in (broken._failure or "")
    os.close(read)
    os.close(write)


def test_a_network_whose_events_never_end_leaves_others_their_turn() -> None:
    read, write = os.pipe()
    os.write(write, b"x")  # stays readable: there are always more events
    drained: list[int] = []

    def drain(most: int) -> list[Any]:
        drained.append(most)
        return [SimpleNamespace(sequence=0, error=None, value=None)] * most

    plane: Any = SimpleNamespace(event_fd=read, drain=drain, stop=lambda: None, is_healthy=True)
    with Runtime() as runtime, NatNetwork(PLAIN, runtime=runtime) as network:
        flooded = Control(lambda: plane, dict, runtime)
        flooded.start()
        until(lambda: drained, "the flood to begin")
        guest = add_memory_guest(network, "vm1")
        guest.ping(str(network.gateway))
        assert network.flows() is not None
        flooded.stop()
    assert set(drained) == {512}, "a turn has a bound"
    os.close(read)
    os.close(write)


def test_a_callback_that_blocks_delays_no_other_network() -> None:
    release = threading.Event()
    with NatNetwork(PLAIN) as slow, NatNetwork(PLAIN) as other:
        slow.on_event(lambda _event: release.wait(60))
        guest = add_memory_guest(slow, "vm1")
        seen = Events(other)
        add_memory_guest(other, "vm1").ping(str(other.gateway))
        assert seen.next(GuestUp).endpoint == "vm1"
        guest.ping(str(slow.gateway))
        release.set()


def test_a_callback_may_use_and_stop_the_network() -> None:
    done: list[object] = []
    ended = threading.Event()

    def callback(event: NetworkEvent) -> None:
        if isinstance(event, GuestUp):
            done.append(network.flows())
            done.append(network.create_endpoint("vm2").id)
            network.stop()
            ended.set()

    network = NatNetwork(PLAIN)
    network.start()
    network.on_event(callback)
    add_memory_guest(network, "vm1")
    assert ended.wait(30)
    assert (done, network.is_running) == ([[], "vm2"], False)
    until(lambda: control_threads() == 0, "the control thread to end")


def test_callbacks_are_made_before_stop_returns() -> None:
    seen: list[str] = []
    network = NatNetwork(PLAIN)
    with network:
        network.on_event(lambda event: seen.append(event.kind))
        for n in range(50):
            network.create_endpoint(f"vm{n}")
            network.attach(f"vm{n}", "memory")
    assert seen == ["guest_up"] * 50


def test_forked_processes_have_runtimes_of_their_own() -> None:
    code = """
import os, warnings
warnings.simplefilter("ignore")
from guestnet import NatConfig, NatNetwork, Runtime
plain = NatConfig(dhcp=False, dns=False)
with Runtime() as runtime, NatNetwork(plain, runtime=runtime) as network:
    network.on_event(print)
    pid = os.fork()
    if pid == 0:
        assert runtime.networks == 0
        with NatNetwork(plain, runtime=runtime) as other, NatNetwork(plain) as third:
            assert other.create_endpoint("vm1") and third.create_endpoint("vm1")
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert network.create_endpoint("vm1")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_stopped_networks_are_freed_although_the_runtime_stays() -> None:
    class Network(NatNetwork):
        pass

    def count() -> int:
        gc.collect()
        return sum(type(one) is Control for one in gc.get_objects())

    with Runtime() as runtime:
        before = count()
        for _ in range(10):
            with Network(PLAIN, runtime=runtime):
                pass
        assert count() == before
