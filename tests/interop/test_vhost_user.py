"""Machines whose memory guestnet shares: QEMU as the front-end of vhost-user, without KVM."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, Process, wait_until
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
