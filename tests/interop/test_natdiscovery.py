"""An independent judge of NAT behaviour: coturn's natdiscovery (RFC 5780) against a STUN server that has two
addresses."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from lab import Lab, need
from lab.namespaces import HOST4, OUT4, SECOND4, ip
from lab.runner import GuestRunner

PORT = 3478
EXTERNAL = "192.0.2.78"


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


@pytest.fixture
def uplink(lab: Lab, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The options of an uplink; for packets the outside is told where their address is."""
    if request.param == "sockets":
        yield []
        return
    ip("-n", lab.out, "route", "add", EXTERNAL, "via", HOST4)
    yield ["--uplink", "tun", "--forwarding", "--external", EXTERNAL]
    ip("-n", lab.out, "route", "delete", EXTERNAL)


@pytest.mark.parametrize("uplink", ["sockets", "tun"], indirect=True)
@pytest.mark.parametrize(
    ("filtering", "told"),
    [
        ("endpoint_independent", "Endpoint Independent Filtering"),
        ("address_dependent", "Address Dependent Filtering"),
        ("address_and_port_dependent", "Address and Port Dependent Filtering"),
    ],
)
def test_behaviour(guest: GuestRunner, stun: str, uplink: list[str], filtering: str, told: str) -> None:
    judge = need.program("turnutils_natdiscovery", "coturn")
    options = ["--filtering", filtering, *uplink]
    done = guest([judge, "-m", "-f", stun], *options, ordinary=not uplink)
    print(done.stdout)
    found = re.findall(r"^NAT with (.*)!$", done.stdout, re.MULTILINE)
    assert found == ["Endpoint Independent Mapping", told], done.stdout
