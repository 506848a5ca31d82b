"""An independent judge of NAT behaviour: coturn's natdiscovery (RFC 5780) against a STUN server that has two
addresses."""

from __future__ import annotations

import re

import pytest
from lab import Lab, need
from lab.namespaces import OUT4, SECOND4
from lab.runner import GuestRunner

PORT = 3478


@pytest.fixture(scope="module")
def stun(lab: Lab) -> str:
    server = [
        need.program("turnserver", "coturn"),
        # Debian's configuration, which -n leaves out, turns RFC 5780 off.
        "-n", "--no-auth", "--no-tls", "--no-dtls", "--no-cli", "--stun-only", "--no-tcp", "--no-tcp-relay",
        "--log-file=stdout", "--listening-port", str(PORT),
        f"--listening-ip={OUT4}", f"--listening-ip={SECOND4}", "--pidfile", str(lab.dir / "turnserver.pid"),
    ]  # fmt: skip
    lab.start(server, ns=lab.out)
    lab.wait_listening(lab.out, PORT, "udp")
    return OUT4


@pytest.mark.parametrize(
    ("filtering", "told"),
    [
        ("endpoint_independent", "Endpoint Independent Filtering"),
        ("address_dependent", "Address Dependent Filtering"),
        ("address_and_port_dependent", "Address and Port Dependent Filtering"),
    ],
)
def test_behaviour(guest: GuestRunner, stun: str, filtering: str, told: str) -> None:
    judge = need.program("turnutils_natdiscovery", "coturn")
    done = guest([judge, "-m", "-f", stun], "--filtering", filtering)
    print(done.stdout)
    found = re.findall(r"^NAT with (.*)!$", done.stdout, re.MULTILINE)
    assert found == ["Endpoint Independent Mapping", told], done.stdout
