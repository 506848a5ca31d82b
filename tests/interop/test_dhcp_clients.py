"""The DHCP clients of real systems get, renew and release a lease."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import Lab, Process, need, wait_until
from lab.namespaces import OUT4

CLIENTS = Path(__file__).parent / "clients"
DEVICE = "gn0"
LEASE = 20
"""Seconds; a client renews at half of it. dhcpcd takes no less."""
ADDRESS = "192.168.64.2"

# All three clients call a script with the event in their own words and the address in the environment.
SCRIPT = f"""#!/bin/sh
event=$(echo "${{1:-}}${{reason:-}}" | tr A-Z a-z)
address=${{ip:-$new_ip_address}}
case $event in
    bound|renew|reboot)
        ip address replace "$address/24" dev {DEVICE}
        ip route replace default via "${{router:-$new_routers}}" dev {DEVICE}
        ;;
    deconfig) ip address flush dev {DEVICE}; ip link set {DEVICE} up ;;
    release|stop*) ip address flush dev {DEVICE} ;;
    preinit) ip link set {DEVICE} up ;;
esac
echo "EVENT $event $address mtu=$mtu$new_interface_mtu dns=${{dns:-$new_domain_name_servers}}"
"""


@dataclass
class Segment:
    """A namespace whose only device is an unconfigured endpoint of a guestnet network."""

    lab: Lab
    ns: str
    network: Process
    script: str

    def leases(self) -> list[str]:
        seen = len(self.network.lines)
        self.network.stdin.write(b"leases\n")
        self.network.stdin.flush()
        found: list[str] = json.loads(self.network.wait_line("^leases (.*)$", start=seen)[1])
        return found

    def start(self, *command: str) -> Process:
        return self.lab.start(command, ns=self.ns)

    def file(self, name: str) -> str:
        return str(self.lab.dir / name)

    def check_bound(self, client: Process) -> None:
        event = client.wait_line(r"^EVENT (?:bound|reboot) (\S+) mtu=(\d*) dns=(\S*)")
        assert event[1] == ADDRESS
        assert event[3] == "192.168.64.1"
        assert self.leases() == [ADDRESS]
        page = ["curl", "-sS", "-m", "10", f"http://{OUT4}/"]
        assert self.lab.check(page, ns=self.ns) == "a page from outside\n"

    def check_released(self) -> None:
        wait_until(lambda: self.leases() == [], "the lease to be free again")


@pytest.fixture
def segment(lab: Lab) -> Iterator[Segment]:
    ns = lab.add_namespace(f"{lab.host}-dhcp")
    script = lab.dir / "dhcp-script"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    env = {"PYTHONPATH": str(CLIENTS.parents[1])}
    command = [sys.executable, str(CLIENTS / "tap_network.py"), ns, DEVICE, str(LEASE)]
    network = lab.start(command, stdin=subprocess.PIPE, env=env, ready="^ready$")
    yield Segment(lab, ns, network, str(script))
    network.stdin.close()
    network.stop()
    lab.remove_namespace(ns)


def test_udhcpc(segment: Segment) -> None:
    program = need.program("udhcpc")
    client = segment.start(program, "-f", "-R", "-i", DEVICE, "-s", segment.script)
    segment.check_bound(client)
    client.signal(signal.SIGUSR1)
    client.wait_line("^EVENT renew 192.168.64.2")
    client.signal(signal.SIGUSR2)
    segment.check_released()
    client.stop()


def test_dhclient(segment: Segment) -> None:
    program = need.program("dhclient", "isc-dhcp-client")
    common = ["-4", "-d", "-v", "-lf", segment.file("dhclient.leases"), "-pf", segment.file("dhclient.pid")]
    common += ["-cf", "/dev/null", "-sf", segment.script, DEVICE]
    client = segment.start(program, *common)
    segment.check_bound(client)
    client.wait_line("^EVENT renew 192.168.64.2", seconds=LEASE + 10)
    # It asks the server itself by unicast, as one renews.
    assert re.search(rf"DHCPREQUEST for {ADDRESS} on {DEVICE} to 192\.168\.64\.1 port 67", client.output)
    segment.lab.check([program, "-r", *common], ns=segment.ns)
    segment.check_released()
    # The second client ends the first, unless that is about to renew.
    client.stop()


def test_dhcpcd(segment: Segment) -> None:
    program = need.program("dhcpcd", "dhcpcd-base")
    # Without a configuration it asks for next to nothing.
    asked = ["-o", "domain_name_servers", "-o", "interface_mtu"]
    common = ["-4", "-B", "-d", "-f", "/dev/null", *asked, "-c", segment.script, DEVICE]
    client = segment.start(program, *common)
    segment.check_bound(client)
    segment.lab.run([program, "-4", "-N", DEVICE], ns=segment.ns)
    client.wait_line("^EVENT renew 192.168.64.2")
    segment.lab.run([program, "-4", "-k", DEVICE], ns=segment.ns)
    segment.check_released()
    client.wait()


def test_a_client_that_comes_back_keeps_its_address(segment: Segment) -> None:
    program = need.program("udhcpc")
    for _ in range(2):
        client = segment.start(program, "-f", "-i", DEVICE, "-s", segment.script)
        segment.check_bound(client)
        client.stop()
    # A different client identifier on the same port gets the port's address as well: it has one endpoint.
    client = segment.start(program, "-f", "-i", DEVICE, "-s", segment.script, "-x", "0x3d:01020304050607")
    segment.check_bound(client)
    client.stop()


def test_a_wrong_address_is_refused(segment: Segment) -> None:
    """A client that remembers an address of another network is told so (DHCPNAK), and asks anew."""
    program = need.program("udhcpc")
    client = segment.start(program, "-f", "-R", "-i", DEVICE, "-s", segment.script, "-r", "10.1.2.3")
    segment.check_bound(client)
    client.stop()
    segment.check_released()
