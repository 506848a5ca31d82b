"""ping and traceroute in the guest see the outside as it is."""

from __future__ import annotations

import pytest
from lab.namespaces import FAR4, FAR_UNREACHABLE4, OUT4, UNREACHABLE4
from lab.runner import GuestRunner


def ping(guest: GuestRunner, address: str, *words: str, ordinary: bool = True) -> tuple[int, str]:
    done = guest(["ping", "-n", "-c", "3", "-i", "0.2", "-W", "3", *words, address], ordinary=ordinary)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("address", [OUT4, FAR4, "192.168.64.1"])
def test_echo(guest: GuestRunner, address: str) -> None:
    status, output = ping(guest, address)
    assert status == 0, output
    assert "3 received" in output


def test_echo_as_root(guest: GuestRunner) -> None:
    status, output = ping(guest, OUT4, ordinary=False)
    assert status == 0, output


def test_a_large_echo(guest: GuestRunner) -> None:
    """3000 bytes: fragments each way."""
    status, output = ping(guest, OUT4, "-s", "3000")
    assert status == 0, output


def test_an_unused_address_does_not_answer(guest: GuestRunner) -> None:
    status, output = ping(guest, "192.168.64.77")
    assert status != 0, output
    assert "0 received" in output


def test_unreachable_is_reported(guest: GuestRunner) -> None:
    status, output = ping(guest, FAR_UNREACHABLE4)
    assert status != 0
    assert f"From {OUT4}" in output, output
    assert "Unreachable" in output, output


def test_unreachable_from_the_host_is_reported(guest: GuestRunner) -> None:
    status, output = ping(guest, UNREACHABLE4)
    assert status != 0
    assert "Unreachable" in output, output


def test_traceroute(guest: GuestRunner) -> None:
    """UDP probes with a growing TTL: the gateway, the router outside, the host behind it."""
    lines = guest.check(["traceroute", "-n", "-q", "1", "-w", "3", "-m", "5", FAR4]).splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["192.168.64.1", OUT4, FAR4]


def test_a_refused_datagram_is_reported(guest: GuestRunner) -> None:
    script = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)\n"
        f"s.connect(('{OUT4}', 9)); s.send(b'x')\n"
        "try:\n    s.recv(1)\nexcept ConnectionRefusedError:\n    print('refused')"
    )
    assert guest.check(["python3", "-c", script]) == "refused\n"


def test_path_mtu_is_learned(guest: GuestRunner) -> None:
    """DF and 1472 bytes to a host behind a 1400-byte link: the guest is told 1400."""
    _, output = ping(guest, FAR4, "-M", "do", "-s", "1472")
    assert "mtu=1400" in output or "mtu = 1400" in output, output


def test_path_mtu_is_reported_again_when_the_host_knows_it(guest: GuestRunner) -> None:
    """The host has learned the path's MTU from the first echo: it does not cut the next one, which forbids
    it. One that allows it is cut."""
    echo = f"ping -n -c 2 -i 0.2 -W 3 -s 1472 {FAR4}"
    script = f"{echo} -M do; ip route flush cache; echo AGAIN; {echo} -M do; echo PLAIN; {echo} -M dont"
    done = guest(["sh", "-c", script])
    _, _, rest = (done.stdout + done.stderr).partition("AGAIN")
    again, _, plain = rest.partition("PLAIN")
    assert "1400" in again, done.stdout
    assert " 0 received" in again, done.stdout
    assert " 2 received" in plain, done.stdout
