"""Machines whose memory guestnet shares: QEMU as the front-end of vhost-user, without KVM."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import Lab, Process, need, wait_until
from lab.namespaces import HOST4, OUT4
from lab.runner import GUESTNET
from lab.vm import BOOT, Image, vhost_nic

pytestmark = pytest.mark.timeout(300)

ALPHA, BETA = "52:54:00:00:00:0a", "52:54:00:00:00:0b"
NO_OFFLOADS = ",csum=off,guest_csum=off,gso=off,host_tso4=off,host_tso6=off,guest_tso4=off,guest_tso6=off"
# Without the queue nothing may be offered that needs it: Linux takes no such card.
NO_CONTROL = "".join(
    f",{name}=off"
    for name in (
        "ctrl_vq", "ctrl_rx", "ctrl_vlan", "ctrl_rx_extra", "ctrl_mac_addr", "ctrl_guest_offloads",
        "guest_announce", "mq",
    )
)  # fmt: skip

BOTH_WAYS = f"""
head -c 4000000 /dev/urandom >/tmp/up
sha256sum </tmp/up | cut -c 1-64
nc {OUT4} 9007 </tmp/up | cut -d' ' -f2
nc {OUT4} 7 </tmp/up | sha256sum | cut -c 1-64
"""
SERVE = "httpd -p 80 -h /www; echo SERVING; sleep 600"


@pytest.fixture
def socket_path(lab: Lab) -> Iterator[str]:
    path = lab.dir / "vhost.sock"
    yield str(path)
    assert not Path(path).exists(), "guestnet up left its socket behind"


@pytest.fixture
def network(socket_path: str, guestnet: Callable[..., Process]) -> Process:
    leases = ("--lease", f"{ALPHA}=192.168.64.10,alpha", "--lease", f"{BETA}=192.168.64.11,beta")
    options = ("--json", "-p", "8090:alpha:80", *leases)
    return guestnet("up", "--vhost-user", socket_path, *options, ready='"event": "ready"')


@pytest.fixture
def boot(lab: Lab, image: Image, socket_path: str, network: Process) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(name: str, mac: str, script: str, **nic: object) -> Process:
        command = image.command(name, script, nic=vhost_nic(socket_path, mac, **nic))  # type: ignore[arg-type]
        started.append(lab.start(command, ordinary=True))
        return started[-1]

    yield start
    for process in started:
        process.stop()


def digests_agree(vm: Process) -> None:
    vm.wait_line("^GUEST-STATUS", BOOT)
    digests = re.findall(r"^[0-9a-f]{64}$", vm.output, re.M)
    assert len(digests) == 3, vm.output
    assert len(set(digests)) == 1, vm.output


def test_vm_boots_resolves_fetches_and_is_reached(lab: Lab, image: Image) -> None:
    script = """
nslookup -type=a www.example.test
wget -q -O - http://www.example.test/
ping -c 1 -W 5 203.0.113.2 >/dev/null && echo PING-OK
httpd -p 80 -h /www
echo SERVING
sleep 600
"""
    qemu = image.command("alpha", script)
    vm = lab.start([GUESTNET, "vm", "--vhost-user", "-p", "8080:80", "--", *qemu], ordinary=True)
    assert vm.wait_line("^GUEST-UP alpha (.*)$", BOOT)[1] == "192.168.64.2/24"
    vm.wait_line("^SERVING", BOOT)
    assert re.search(rf"Address:? ?\d*:? {re.escape(OUT4)}$", vm.output, re.M), vm.output
    assert "a page from outside" in vm.output
    assert "PING-OK" in vm.output
    page = lab.check(["curl", "-sS", "-m", "20", f"http://{HOST4}:8080/"], ns=lab.out)
    assert page == "a page from the guest\n"
    vm.stop()


@pytest.mark.parametrize(
    "nic",
    [
        pytest.param({}, id="offloads"),
        pytest.param({"device": NO_OFFLOADS}, id="no-offloads"),
        pytest.param({"device": ",mrg_rxbuf=off"}, id="no-mergeable-buffers"),
        pytest.param({"device": NO_OFFLOADS + ",mrg_rxbuf=off"}, id="neither"),
        pytest.param({"device": ",event_idx=off,indirect_desc=off"}, id="plain-rings"),
        pytest.param({"device": NO_CONTROL}, id="no-control-queue"),
        pytest.param({"device": ",disable-modern=on,disable-legacy=off"}, id="legacy"),
        pytest.param({"queues": 2}, id="two-pairs"),
    ],
)
def test_megabytes_each_way(boot: Callable[..., Process], nic: dict[str, object]) -> None:
    """Proved by digests: what the outside got, and what came back from it."""
    digests_agree(boot("alpha", ALPHA, BOTH_WAYS, **nic))


def test_two_machines_and_one_killed_and_another_comes(
    lab: Lab, network: Process, boot: Callable[..., Process]
) -> None:
    alpha = boot("alpha", ALPHA, SERVE)
    assert alpha.wait_line("^GUEST-UP alpha (.*)$", BOOT)[1] == "192.168.64.10/24"
    alpha.wait_line("^SERVING", BOOT)
    page = ["curl", "-sS", "-m", "20", f"http://{HOST4}:8090/"]
    assert "guest" in lab.check(page, ns=lab.out)

    fetch = "while :; do wget -q -O - http://alpha/ && echo TICK; sleep 1; done"
    beta = boot("beta", BETA, fetch)
    assert beta.wait_line("^GUEST-UP beta (.*)$", BOOT)[1] == "192.168.64.11/24"
    beta.wait_line("^TICK", BOOT)

    alpha.signal(signal.SIGKILL)
    alpha.wait()
    network.wait_line('"guest_down"', BOOT)
    seen = len(beta.lines)
    again = boot("alpha", ALPHA, SERVE)
    assert again.wait_line("^GUEST-UP alpha (.*)$", BOOT)[1] == "192.168.64.10/24"
    again.wait_line("^SERVING", BOOT)
    beta.wait_line("^TICK", BOOT, start=seen)
    wait_until(lambda: "guest" in lab.run(page, ns=lab.out).stdout, "the forward to reach the new machine")
    assert network.running


def test_a_machine_stays_when_guestnet_is_started_again(
    lab: Lab,
    guestnet: Callable[..., Process],
    boot: Callable[..., Process],
    network: Process,
    socket_path: str,
) -> None:
    tick = f"while :; do timeout 3 wget -q -O - http://{OUT4}/peer && echo TICK; sleep 1; done"
    alpha = boot("alpha", ALPHA, tick, chardev=",reconnect=1")
    alpha.wait_line("TICK$", BOOT)
    for number in (signal.SIGINT, signal.SIGKILL):
        network.signal(number)
        network.wait()
        network = guestnet("up", "--vhost-user", socket_path, "--json", ready='"event": "ready"')
        seen = len(alpha.lines)
        alpha.wait_line("TICK$", BOOT, start=seen)
    assert alpha.running
    network.stop()


class Testpmd:
    """DPDK's testpmd on a virtio-user port: a driver that polls and never asks to be called."""

    __test__ = False

    def __init__(self, lab: Lab, path: str, name: str, mac: str, address: str, peer: str, more: str) -> None:
        # Its output is not a terminal: by lines all the same.
        command = ["stdbuf", "-o", "L", need.program("dpdk-testpmd", "dpdk-dev")]
        command += ["-l", "0,1", "--no-huge", "-m", "128", "--no-pci", "--no-telemetry"]
        command += ["--file-prefix", f"{lab.dir.name}-{name}"]
        command += ["--vdev", f"net_virtio_user0,path={path},mac={mac}{more}", "--", "-i"]
        command += ["--total-num-mbufs=4096", f"--tx-ip={address},{peer}"]
        self.process = lab.start(command, stdin=subprocess.PIPE, ready="^Done")

    def tell(self, *words: str) -> None:
        for word in words:
            self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    def count(self, what: str) -> int:
        """A counter of the port, as it is now."""
        start = len(self.process.lines)
        self.tell("show port stats all")
        # Not what "stop" prints, which looks much the same.
        line = rf"{what}-packets: (\d+) +{what}-(errors|missed)"
        return int(self.process.wait_line(line, start=start)[1])

    def end(self) -> dict[str, int]:
        """Stops it; its last counters."""
        self.tell("stop")
        counts = {what: self.count(what) for what in ("RX", "TX")}
        self.tell("quit")
        assert self.process.wait() == 0
        return counts


def exchange(a: Testpmd, b: Testpmd) -> tuple[dict[str, int], dict[str, int]]:
    """Frames from `a` to `b`; what both counted."""
    # Each is known when it has sent; then all goes straight to the other.
    b.tell("set fwd txonly", f"set eth-peer 0 {ALPHA}", "start")
    wait_until(lambda: b.count("TX") > 1000, "frames of b")
    b.tell("stop", "set fwd rxonly", "start")
    a.tell("set fwd txonly", f"set eth-peer 0 {BETA}", "start")
    wait_until(lambda: b.count("RX") > 20_000, "frames of a at b")
    return a.end(), b.end()


@pytest.mark.parametrize("more", ["", ",queue_size=64", ",mrg_rxbuf=0", ",in_order=0,vectorized=1"])
def test_testpmd_loses_nothing_unaccounted(lab: Lab, guestnet: Callable[..., Process], more: str) -> None:
    """Two drivers that poll: what they sent is what guestnet counts, and what it counts is what they got."""
    path = str(lab.dir / "pmd.sock")
    network = guestnet("up", "--vhost-user", path, "--stats", "-v", ready="is up")
    one, two = "192.168.64.50", "192.168.64.51"
    with ExitStack() as stack:
        a = Testpmd(lab, path, "a", ALPHA, one, two, more)
        stack.callback(a.process.stop)
        b = Testpmd(lab, path, "b", BETA, two, one, more)
        stack.callback(b.process.stop)
        a_counts, b_counts = exchange(a, b)
    network.signal(signal.SIGINT)
    assert network.wait() == 0
    lines = re.finditer(r"^(\w+ frames) +([\d,]+)$", network.output, re.M)
    told = {line[1]: int(line[2].replace(",", "")) for line in lines}
    # What was in a queue when its driver went is the difference, a queue's length at most.
    sent = a_counts["TX"] + b_counts["TX"]
    assert 0 <= sent - told["rx frames"] <= 2 * 256, (a_counts, b_counts, told)
    got = a_counts["RX"] + b_counts["RX"]
    assert 0 <= told["tx frames"] - got <= 2 * 256, (a_counts, b_counts, told)
    assert "bad frames" not in told
