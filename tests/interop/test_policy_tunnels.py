"""Programs that carry data where none should pass, against a policy: DNS tunnels and an ICMP tunnel.

Each test runs the tunnel with everything allowed too: it cannot pass because the tunnel does not work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, need
from lab.namespaces import FAR4, OUT4
from lab.policy_guest import Guest, policy_guest
from lab.process import wait_until

OPEN = 'default = "allow"\n'
ONE_NAME = """
default = "deny"
[[rule]]
action = "allow"
to = "www.example.test"
"""
BELOW = """
default = "deny"
[[rule]]
action = "allow"
to = "*.tunnel.test"
"""
GATEWAY = "192.168.64.1"
PAGE = "a page from outside"
PASSWORD = "not a secret"
UP = "Connection setup complete"


@pytest.fixture
def resolver(lab: Lab) -> Iterator[None]:
    """The host asks FAR4, where the far end of a DNS tunnel is."""
    lab.set_resolver(FAR4)
    yield
    lab.set_resolver(OUT4)


@pytest.fixture
def guest(lab: Lab, tmp_path: Path) -> Iterator[Guest]:
    with policy_guest(lab, tmp_path, OPEN, "sockets") as made:
        yield made


def iodine(guest: Guest, server: str, seconds: int = 40) -> int:
    """How many of 20 pings come back through a tunnel by the name server `server`.

    0 when it does not come up within `seconds`.
    """
    command = [need.program("iodine"), "-f", "-r", "-P", PASSWORD, "-d", "dns0", server, "tunnel.test"]
    program = guest.lab.start(["timeout", str(seconds), *command], ns=guest.ns)
    wait_until(lambda: UP in program.output or not program.running, "the tunnel, or its end", seconds + 5)
    back = 0
    if UP in program.output:
        pings = guest.run("ping", "-n", "-c", "20", "-i", "0.2", "-W", "2", "-s", "300", "10.99.0.1")
        back = int(pings.stdout.partition(" received")[0].rpartition(" ")[2])
    program.stop()
    return back


def test_iodine(lab: Lab, resolver: None, guest: Guest) -> None:
    """By the gateway's resolver and past it."""
    server = [need.program("iodined"), "-f", "-c", "-P", PASSWORD, "-l", FAR4, "10.99.0.1", "tunnel.test"]
    far = lab.start(server, ns=lab.far, ready="Listening to dns")
    try:
        assert iodine(guest, GATEWAY) > 15
        assert iodine(guest, FAR4) > 15
        guest.put_in_force(ONE_NAME)
        assert iodine(guest, GATEWAY, 8) == 0
        assert iodine(guest, FAR4, 8) == 0
        # All names below its domain are allowed: it comes up, and ends with the budget of such names.
        guest.put_in_force(BELOW)
        assert iodine(guest, GATEWAY) < 10
        assert iodine(guest, GATEWAY, 8) == 0
        assert iodine(guest, FAR4, 8) == 0
    finally:
        far.stop()


def fetched(guest: Guest, port: int) -> bool:
    """Whether a page comes through a tunnel whose near end is a port of the guest."""
    status, page = guest.curl("--max-time", "6", f"http://127.0.0.1:{port}/")
    return status == 0 and PAGE in page


def test_dns2tcp(lab: Lab, resolver: None, guest: Guest, tmp_path: Path) -> None:
    """It carries data in TXT and KEY records."""
    config = tmp_path / "dns2tcpd.conf"
    config.write_text(
        f"listen = {FAR4}\nport = 53\nuser = nobody\nchroot = /tmp\ndomain = tunnel.test\n"
        f"resources = web:{OUT4}:80\n"
    )
    far = lab.start(
        [need.program("dns2tcpd"), "-F", "-d", "1", "-f", str(config)], ns=lab.far, ready="Listening"
    )
    client = need.program("dns2tcpc")
    guest.lab.check(["ip", "link", "set", "lo", "up"], ns=guest.ns)
    try:
        for policy, passes in ((OPEN, True), (ONE_NAME, False), (BELOW, False)):
            guest.put_in_force(policy)
            for number, by in enumerate((GATEWAY, FAR4)):
                port = 8100 + number
                command = [client, "-z", "tunnel.test", "-r", "web", "-l", str(port), "-d", "1", by]
                near = guest.lab.start(
                    ["timeout", "20", *command], ns=guest.ns, ready="Listening|No response|Error"
                )
                assert fetched(guest, port) is passes, (policy, by)
                near.stop()
    finally:
        far.stop()


def test_ptunnel(lab: Lab, guest: Guest) -> None:
    """It carries data in echo requests and replies."""
    program = need.program("ptunnel")
    far = lab.start([program, "-x", PASSWORD], ns=lab.out)
    guest.lab.check(["ip", "link", "set", "lo", "up"], ns=guest.ns)
    command = [program, "-x", PASSWORD, "-p", OUT4, "-lp", "8200", "-da", OUT4, "-dp", "80"]
    near = lab.start(command, ns=guest.ns)
    try:
        wait_until(lambda: fetched(guest, 8200), "a page through the tunnel", step=0.2)
        guest.put_in_force(ONE_NAME)
        assert not fetched(guest, 8200)
    finally:
        near.stop()
        far.stop()
