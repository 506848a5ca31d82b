"""A page, and a gigabyte each way, through `guestnet run` as an ordinary user."""

from __future__ import annotations

import pytest
from lab.namespaces import FAR4, OUT4
from lab.runner import Blob, GuestRunner


def test_a_page_by_name(guest: GuestRunner) -> None:
    assert guest.check(["curl", "-sS", "http://www.example.test/"]) == "a page from outside\n"


def test_a_page_as_root(guest: GuestRunner) -> None:
    assert guest.check(["curl", "-sS", f"http://{OUT4}/"], ordinary=False) == "a page from outside\n"


@pytest.mark.timeout(300)
def test_a_gigabyte_down_is_intact(guest: GuestRunner, blob: Blob) -> None:
    out = guest.check(["sh", "-c", f"curl -sS http://{OUT4}/blob | sha256sum"], seconds=240)
    assert out.split()[0] == blob.sha256


@pytest.mark.timeout(300)
def test_a_gigabyte_up_is_intact(guest: GuestRunner, blob: Blob) -> None:
    out = guest.check(
        ["curl", "-sS", "-H", "Expect:", "-T", str(blob.path), f"http://{OUT4}/upload"], seconds=240
    )
    assert out.split() == [blob.sha256, str(blob.size)]


@pytest.mark.parametrize("mtu", [576, 1280, 9000, 65520])
def test_other_mtus(guest: GuestRunner, mtu: int) -> None:
    script = f"ip -o link; curl -sS http://{OUT4}/"
    out = guest.check(["sh", "-c", script], "--mtu", str(mtu)).splitlines()
    assert out[-1] == "a page from outside"
    assert any(f" mtu {mtu} " in line for line in out), out


def test_a_host_behind_a_router_with_a_smaller_mtu(guest: GuestRunner) -> None:
    listener = guest.lab.start(["socat", "-u", "TCP-LISTEN:9100,reuseaddr", "SYSTEM:wc -c"], ns=guest.lab.far)
    guest.lab.wait_listening(guest.lab.far, 9100)
    guest.check(["sh", "-c", f"head -c 3000000 /dev/zero | socat -u - TCP:{FAR4}:9100"])
    listener.wait_line("^3000000$")


def test_data_arrives_after_the_command_has_ended(guest: GuestRunner) -> None:
    """The guest's kernel has megabytes yet to send when the command ends, and the reader is slow."""
    slow = ["socat", "-u", "TCP-LISTEN:9101,reuseaddr,rcvbuf=20000", "SYSTEM:sleep 0.5; wc -c"]
    listener = guest.lab.start(slow, ns=guest.lab.far)
    guest.lab.wait_listening(guest.lab.far, 9101)
    guest.check(["sh", "-c", f"head -c 6000000 /dev/zero | socat -u - TCP:{FAR4}:9101,sndbuf=4000000"])
    listener.wait_line("^6000000$")
