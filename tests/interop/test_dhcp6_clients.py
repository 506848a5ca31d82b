"""The DHCPv6 clients of real systems get, renew and release an address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import Lab, Process, need, wait_until

CLIENTS = Path(__file__).parent / "clients"
DEVICE = "gn0"
LEASE = 20
"""Seconds; a client renews at half of it."""
PREFIX, ADDRESS = "fd00:6e:0:1::/64", "fd00:6e:0:1::2"

# Both clients call a script with the event and the address in the environment, in their own words.
SCRIPT = f"""#!/bin/sh
event=$(echo "$reason" | tr A-Z a-z)
address=${{new_ip6_address:-$new_dhcp6_ia_na1_ia_addr1}}
case $event in
    bound6|renew6|rebind6|reboot6) ip -6 address replace "$address/128" dev {DEVICE} ;;
    release6|stop6|expire6|depref6) ip -6 address flush dev {DEVICE} scope global ;;
    preinit6) ip link set {DEVICE} up ;;
esac
echo "EVENT $event $address search=$new_dhcp6_domain_search"
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
        event = client.wait_line(r"^EVENT (?:bound6|reboot6) (\S+)")
        assert event[1] == ADDRESS
        assert self.leases() == [ADDRESS]
        shown = self.lab.check(["ip", "-6", "address", "show", "dev", DEVICE], ns=self.ns)
        assert f"{ADDRESS}/128" in shown

    def check_released(self) -> None:
        wait_until(lambda: self.leases() == [], "the lease to be free again")


@pytest.fixture
def lease() -> int:
    """Seconds."""
    return LEASE


@pytest.fixture
def segment(lab: Lab, lease: int) -> Iterator[Segment]:
    ns = lab.add_namespace(f"{lab.host}-dhcp6")
    script = lab.dir / "dhcp6-script"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    paths = [str(CLIENTS.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(CLIENTS / "tap_network.py"), ns, DEVICE, str(lease), PREFIX]
    network = lab.start(command, stdin=subprocess.PIPE, env=env, ready="^ready$")
    lab.check(["ip", "link", "set", DEVICE, "up"], ns=ns)
    show = ["ip", "-6", "address", "show", "dev", DEVICE, "scope", "link", "-tentative"]
    wait_until(lambda: "fe80" in lab.check(show, ns=ns), "the link-local address")
    yield Segment(lab, ns, network, str(script))
    network.stdin.close()
    network.stop()
    lab.remove_namespace(ns)


def test_dhclient(segment: Segment) -> None:
    program = need.program("dhclient", "isc-dhcp-client")
    configuration = segment.lab.dir / "dhclient6.conf"
    configuration.write_text("request dhcp6.name-servers, dhcp6.domain-search;\n")
    common = ["-6", "-d", "-v", "-lf", segment.file("dhclient6.leases"), "-pf", segment.file("dhclient6.pid")]
    common += ["-cf", str(configuration), "-sf", segment.script, DEVICE]
    client = segment.start(program, *common)
    segment.check_bound(client)
    assert f"EVENT bound6 {ADDRESS} search=guestnet.internal" in client.output
    client.wait_line(f"^EVENT renew6 {ADDRESS}", seconds=LEASE + 10)
    segment.lab.check([program, "-r", *common], ns=segment.ns)
    segment.check_released()
    client.stop()


def test_dhclient_without_an_address(segment: Segment) -> None:
    """Stateless: options alone (RFC 8415 section 18.2.6)."""
    program = need.program("dhclient", "isc-dhcp-client")
    common = ["-6", "-S", "-d", "-v", "-lf", segment.file("stateless.leases")]
    common += ["-pf", segment.file("stateless.pid"), "-cf", "/dev/null", "-sf", segment.script, DEVICE]
    client = segment.start(program, *common)
    client.wait_line(r"^EVENT renew6  search=guestnet\.internal")
    assert segment.leases() == []
    client.stop()


@pytest.mark.parametrize("lease", [600])
def test_dhcpcd(segment: Segment) -> None:
    program = need.program("dhcpcd", "dhcpcd-base")
    configuration = segment.lab.dir / "dhcpcd6.conf"
    configuration.write_text(
        "noipv6rs\nia_na 1\noption dhcp6_domain_search\noption dhcp6_rapid_commit\nslaac hwaddr\n"
    )
    common = ["-6", "-B", "-d", "-f", str(configuration), "-c", segment.script, DEVICE]
    client = segment.start(program, *common)
    segment.check_bound(client)
    # It would not release while it renews by itself, so the lease is a long one.
    segment.lab.run([program, "-6", "-N", DEVICE], ns=segment.ns)
    client.wait_line(f"^EVENT renew6 {ADDRESS}")
    segment.lab.run([program, "-6", "-k", DEVICE], ns=segment.ns)
    segment.check_released()
    client.wait()
