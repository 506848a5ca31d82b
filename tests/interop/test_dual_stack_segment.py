"""Two kernels on a network with IPv6: they configure themselves, have names, and reach each other by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest
from lab import Lab, Process, need, wait_until

CLIENTS = Path(__file__).parent / "clients"
DEVICE = "gn0"
PREFIX = IPv6Network("fd00:6e:0:1::/64")
GATEWAY = str(PREFIX[1])
SCRIPT = f"""#!/bin/sh
case "$reason" in
    BOUND6) ip -6 address replace "$new_ip6_address/128" dev {DEVICE} ;;
esac
echo "EVENT $reason $new_ip6_address dns=$new_dhcp6_name_servers"
"""


@dataclass
class Segment:
    """Two namespaces, each the guest of an endpoint."""

    lab: Lab
    one: str
    two: str

    def addresses(self, ns: str) -> list[IPv6Address]:
        """The addresses of the prefix that the kernel of a guest has, without tentative ones."""
        show = ["ip", "-6", "-j", "address", "show", "dev", DEVICE, "scope", "global"]
        shown = json.loads(self.lab.check(show, ns=ns))
        return [
            IPv6Address(one["local"])
            for link in shown
            for one in link.get("addr_info", ())
            if "local" in one and not one.get("tentative")
        ]

    def dig(self, *words: str) -> str:
        """What guest one is told over IPv6."""
        need.program("dig", "bind9-dnsutils")
        command = ["dig", "-6", f"@{GATEWAY}", "+tries=3", "+time=4", "+short", *words]
        return self.lab.check(command, ns=self.one).strip()

    def lease(self) -> Process:
        """Guest one takes an address by DHCPv6."""
        script = self.lab.dir / "dual-script"
        script.write_text(SCRIPT)
        script.chmod(0o755)
        configuration = self.lab.dir / "dual.conf"
        configuration.write_text("request dhcp6.name-servers, dhcp6.domain-search;\n")
        files = ["-lf", str(self.lab.dir / "dual.leases"), "-pf", str(self.lab.dir / "dual.pid")]
        program = need.program("dhclient", "isc-dhcp-client")
        command = [program, "-6", "-d", "-v", *files, "-cf", str(configuration), "-sf", str(script), DEVICE]
        return self.lab.start(command, ns=self.one)


@pytest.fixture
def segment(lab: Lab) -> Iterator[Segment]:
    made = Segment(lab, *(lab.add_namespace(f"{lab.host}-{name}") for name in ("one", "two")))
    paths = [str(CLIENTS.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    network = lab.start(
        [sys.executable, str(CLIENTS / "dual_network.py"), made.one, made.two, str(PREFIX)],
        stdin=subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join(paths)},
        ready="^ready$",
    )
    for ns in (made.one, made.two):
        lab.check(["ip", "link", "set", DEVICE, "up"], ns=ns)
        wait_until(lambda ns=ns: made.addresses(ns), "an address by router advertisement")
    yield made
    network.stdin.close()
    network.stop()
    for ns in (made.one, made.two):
        lab.remove_namespace(ns)


def test_a_guest_has_a_route_an_address_and_names(segment: Segment) -> None:
    (own,) = segment.addresses(segment.two)
    assert own in PREFIX
    route = segment.lab.check(["ip", "-6", "route", "show", "default"], ns=segment.two)
    assert f"via fe80::1 dev {DEVICE}" in route, "the host has IPv6"
    assert segment.dig("two.guestnet.internal", "AAAA") == str(own)
    assert segment.dig("+tcp", "two.guestnet.internal", "AAAA") == str(own)
    assert segment.dig("-x", str(own)) == "two.guestnet.internal."
    assert segment.dig("gateway.guestnet.internal", "AAAA") == GATEWAY
    assert segment.dig("-x", GATEWAY) == "gateway.guestnet.internal."
    segment.lab.check(["ping", "-6", "-c", "1", "-W", "5", str(own)], ns=segment.one)


def test_an_address_by_dhcpv6_beside_that_of_the_kernel(segment: Segment) -> None:
    (made,) = segment.addresses(segment.one)
    client = segment.lease()
    event = client.wait_line(r"^EVENT BOUND6 (\S+) dns=(\S*)")
    assert (event[1], event[2]) == (str(PREFIX[2]), GATEWAY)
    wait_until(lambda: set(segment.addresses(segment.one)) == {made, PREFIX[2]}, "the address to be usable")
    assert segment.dig("one.guestnet.internal", "AAAA") == str(PREFIX[2])
    for address in (made, PREFIX[2]):
        assert segment.dig("-x", str(address)) == "one.guestnet.internal."
        segment.lab.check(["ping", "-6", "-c", "1", "-W", "5", str(address)], ns=segment.two)
    client.stop()


def test_a_client_that_the_router_tells_to_use_dhcpv6(segment: Segment) -> None:
    """dhcpcd asks for an address because the advertisement says so (RFC 4861 section 4.2, M)."""
    program = need.program("dhcpcd", "dhcpcd-base")
    configuration = segment.lab.dir / "dual-dhcpcd.conf"
    configuration.write_text("option dhcp6_name_servers\nslaac hwaddr\n")
    script = segment.lab.dir / "dual-dhcpcd-script"
    script.write_text(
        '#!/bin/sh\necho "EVENT $reason $new_dhcp6_ia_na1_ia_addr1 dns=$new_dhcp6_name_servers"\n'
    )
    script.chmod(0o755)
    command = [program, "-6", "-B", "-d", "-f", str(configuration), "-c", str(script), DEVICE]
    client = segment.lab.start(command, ns=segment.two)
    client.wait_line(r"^EVENT ROUTERADVERT")
    event = client.wait_line(r"^EVENT BOUND6 (\S+) dns=(\S*)")
    assert (event[1], event[2]) == (str(PREFIX[3]), GATEWAY)
    assert segment.dig("two.guestnet.internal", "AAAA") == str(PREFIX[3])
    client.stop()
