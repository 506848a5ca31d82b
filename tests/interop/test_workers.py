"""Two guests on different workers of one network."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, need
from lab.namespaces import HOST4, OUT4
from lab.runner import Blob
from lab.taps import TapNetwork, address

CLIENTS = Path(__file__).parent / "clients"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def network(lab: Lab) -> Iterator[TapNetwork]:
    with TapNetwork(lab, "w", 2, workers=2) as made:
        yield made


def test_they_reach_each_other_and_the_outside(lab: Lab, network: TapNetwork) -> None:
    one, two = network.ns
    lab.check(["ping", "-c", "3", "-i", "0.2", "-W", "5", address(1)], ns=one)
    lab.check(["ping", "-c", "3", "-i", "0.2", "-W", "5", address(0)], ns=two)
    for ns in network.ns:
        assert lab.check(["curl", "-sS", "-m", "10", f"http://{OUT4}/"], ns=ns) == "a page from outside\n"
    assert all(worker["rx_frames"] > 6 for worker in network.stats())


@pytest.mark.parametrize(("sender", "receiver"), [(0, 1), (1, 0)])
def test_a_gigabyte_arrives_intact(
    lab: Lab, network: TapNetwork, blob: Blob, sender: int, receiver: int
) -> None:
    need.program("socat")
    take = "socat -u TCP-LISTEN:9000 - | sha256sum"
    taker = lab.start(["sh", "-c", take], ns=network.ns[receiver])
    lab.wait_listening(network.ns[receiver], 9000)
    give = ["socat", "-u", f"FILE:{blob.path}", f"TCP:{address(receiver)}:9000"]
    lab.check(give, ns=network.ns[sender], seconds=120)
    assert taker.wait_line("^[0-9a-f]{64} ", 60)[0].strip() == blob.sha256


def test_published_ports_and_one_that_leaves(lab: Lab, network: TapNetwork) -> None:
    serve = [sys.executable, str(CLIENTS / "serve.py"), "tcp", "80"]
    for ns in network.ns:
        lab.start(serve, ns=ns, ready="^ready$")

    def call(n: int) -> str:
        words = ["socat", "-t", "5", "-", f"TCP:{HOST4}:{8080 + n}"]
        return lab.run(words, ns=lab.out, stdin="hello\n").stdout

    for n in (0, 1):
        assert call(n).splitlines()[1:] == ["hello", "goodbye"]
    network.tell("leave vm0")
    assert call(0) == ""
    assert call(1).splitlines()[1:] == ["hello", "goodbye"]
    gone = lab.run(["ping", "-c", "1", "-W", "1", address(0)], ns=network.ns[1])
    assert gone.returncode != 0
    assert lab.check(["curl", "-sS", "-m", "10", f"http://{OUT4}/"], ns=network.ns[1]).startswith("a page")
