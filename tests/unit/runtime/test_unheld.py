"""A running network that nobody holds any more is stopped."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
from guestnet import NatConfig, NatNetwork
from lab.process import wait_until

PLAIN = NatConfig(dhcp=False, dns=False)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def start_and_drop(count: int) -> None:
    for _ in range(count):
        NatNetwork().start()
    gc.collect()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_networks_that_were_dropped_leave_no_descriptors_and_no_threads() -> None:
    with NatNetwork():  # what the first one loads stays
        pass
    files, tasks = descriptors(), threads()
    with pytest.warns(ResourceWarning, match="was dropped") as warned:
        start_and_drop(10)
    assert len(warned) == 10
    wait_until(lambda: descriptors() <= files, f"no more than {files} descriptors")
    wait_until(lambda: threads() <= tasks, f"no more than {tasks} threads")


@pytest.mark.parametrize("use", ["callback", "memory", "forward", "listener", "endpoint"])
def test_what_a_network_handed_out_does_not_keep_it_running(use: str, tmp_path: Path) -> None:
    network = NatNetwork(PLAIN)
    network.start()
    kept: list[object] = []
    path = tmp_path / "net.sock"
    if use == "callback":
        network.on_event(lambda event, held=network: held.stats())
    elif use == "memory":
        network.create_endpoint("vm1")
        network.attach("vm1", "memory", on_frame=lambda frame, held=network: held.stats())
    elif use == "forward":
        network.create_endpoint("vm1")
        kept.append(network.publish("127.0.0.1:0:80"))
    elif use == "listener":
        kept.append(network.listen("stream", path))
    elif use == "endpoint":
        kept.append(network.create_endpoint("vm1"))
    session = weakref.ref(network._session)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del network
        gc.collect()
    wait_until(lambda: not control_threads(), "the control thread to end")
    wait_until(lambda: not path.exists(), "the socket to be removed")
    for one in kept:
        close = getattr(one, "close", None)
        if close is not None:
            close()  # nothing happens
    kept.clear()
    wait_until(lambda: gc.collect() >= 0 and session() is None, "the session to be freed")


def control_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "guestnet-control"]


DROPPED = """
import guestnet, os, sys
network = guestnet.NatNetwork(guestnet.NatConfig(dhcp=False, dns=False))
network.start()
network.listen("stream", sys.argv[1])
if sys.argv[2] == "dropped":
    del network
elif sys.argv[2] == "fork":
    pid = os.fork()
    if pid == 0:
        del network
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert network.is_running and os.path.exists(sys.argv[1])
    assert network.create_endpoint("vm1")
print("end", flush=True)
"""


@pytest.mark.parametrize("how", ["held", "dropped", "fork"])
def test_the_end_of_the_program_ends_a_network(how: str, tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DROPPED, str(path), how],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("end\n", "", 0)
    assert not path.exists(), "its socket is removed"
