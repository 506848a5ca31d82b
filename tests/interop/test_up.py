"""Several machines on one `guestnet up`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, Process, wait_until
from lab.namespaces import HOST4
from lab.vm import BOOT, Image, stream_nic

pytestmark = pytest.mark.timeout(300)

ALPHA, BETA = "52:54:00:00:00:0a", "52:54:00:00:00:0b"


@pytest.fixture
def socket_path(lab: Lab) -> Iterator[str]:
    path = lab.dir / "net.sock"
    yield str(path)
    assert not Path(path).exists(), "guestnet up left its socket behind"


@pytest.fixture
def network(socket_path: str, guestnet: Callable[..., Process]) -> Process:
    leases = ("--lease", f"{ALPHA}=192.168.64.10,alpha", "--lease", f"{BETA}=192.168.64.11,beta")
    return guestnet(
        "up", "--stream", socket_path, "--json", "-p", "8090:alpha:80", *leases, ready='"event": "ready"'
    )


@pytest.fixture
def boot(lab: Lab, image: Image, socket_path: str) -> Callable[..., Process]:
    def start(name: str, mac: str, script: str) -> Process:
        command = image.command(name, script, nic=stream_nic(socket_path, mac))
        return lab.start(command, ordinary=True)

    return start


SERVE = "httpd -p 80 -h /www; echo SERVING; sleep 600"
FETCH = """
wget -q -O - http://alpha.guestnet.internal/ && echo NAME-OK
wget -q -O - http://alpha/ && echo BARE-OK
ping -c 2 -W 5 alpha >/dev/null && echo PING-OK
n=0
while :; do
    wget -q -O /dev/null http://203.0.113.2/ && echo "TICK $n" || echo FAILED
    n=$((n+1)); sleep 1
done
"""


def test_two_machines_by_name_and_one_killed(
    lab: Lab, network: Process, boot: Callable[..., Process]
) -> None:
    alpha = boot("alpha", ALPHA, SERVE)
    assert alpha.wait_line("^GUEST-UP alpha (.*)$", BOOT)[1] == "192.168.64.10/24"
    alpha.wait_line("^SERVING", BOOT)
    assert "guest" in lab.check(["curl", "-sS", "-m", "20", f"http://{HOST4}:8090/"], ns=lab.out)

    beta = boot("beta", BETA, FETCH)
    assert beta.wait_line("^GUEST-UP beta (.*)$", BOOT)[1] == "192.168.64.11/24"
    for word in ("NAME-OK", "BARE-OK", "PING-OK"):
        beta.wait_line(f"^{word}", BOOT)
    assert "a page from the guest" in beta.output
    beta.wait_line("^TICK 1$", BOOT)

    alpha.signal(signal.SIGKILL)
    alpha.wait()
    seen = len(beta.lines)
    for _ in range(3):
        beta.wait_line("^TICK", BOOT, start=seen)
        seen = len(beta.lines)
    assert "FAILED" not in beta.output
    assert network.running

    # Its place is free again: a machine with the same card gets the same address.
    again = boot("alpha", ALPHA, SERVE)
    assert again.wait_line("^GUEST-UP alpha (.*)$", BOOT)[1] == "192.168.64.10/24"
    again.wait_line("^SERVING", BOOT)
    page = ["curl", "-sS", "-m", "5", f"http://{HOST4}:8090/"]
    wait_until(lambda: "guest" in lab.run(page, ns=lab.out).stdout, "the forward to reach the new machine")
    for vm in (again, beta):
        vm.stop()
