"""A guest that is root in its namespace does its worst to its own interface and its own connections: guestnet
lives, other guests' flows do, and its memory does not grow."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Process
from lab.namespaces import OUT4
from lab.runner import Blob, GuestRunner

CLIENTS = Path(__file__).parent / "clients"
PAGE = f"curl -sS -m 10 http://{OUT4}/"
SERVED = "a page from outside\n"
ROUTE = "ip route replace default via 192.168.64.1"


def resident(process: Process) -> int:
    """Kilobytes in memory of guestnet itself."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def test_lying_virtio_headers(guest: GuestRunner) -> None:
    """Segments that are none, partial checksums outside of the packet, through the TAP."""
    odd = f"PYTHONPATH={CLIENTS.parents[1]} {sys.executable} {CLIENTS / 'odd_frames.py'}"
    script = f"echo ready; read x; for i in 1 2 3; do {odd} $i; {PAGE}; done; echo done; read x"
    process = guest.start(["sh", "-c", script], ready="^ready$", stdin=subprocess.PIPE)
    before = resident(process)
    process.stdin.write(b"go\n")
    process.stdin.flush()
    process.wait_line("^done$", 90)
    assert process.output.count(SERVED.strip()) == 3, process.output
    assert all(int(words.split()[0]) > 100 for words in process.output.split("sent ")[1:])
    # What is reassembled and buffered is bounded; 32 MB is far above the bounds that this reaches.
    assert resident(process) < before + 32_000
    process.stop()


@pytest.mark.parametrize(
    "change",
    [
        "for i in 1 2 3 4 5; do ip link set eth0 down; ip link set eth0 up; done",
        "ip link set eth0 name other",
        "ip link set eth0 mtu 9000; curl -sS -m 10 http://203.0.113.2/ >/dev/null; ip link set eth0 mtu 68",
        "ip link set eth0 mtu 65521",
        "ip link set eth0 down; ip link set eth0 address 02:11:11:11:11:11; ip link set eth0 up",
        "ip address flush dev eth0; ip address add 192.168.64.77/24 dev eth0",
        "ip address add 192.168.64.1/32 dev lo; ip address del 192.168.64.1/32 dev lo",
        "ip link add br0 type bridge; ip link set eth0 master br0; ip address flush dev eth0;"
        "ip link set br0 address 02:11:11:11:11:12 up; ip address add 192.168.64.2/24 dev br0",
    ],
    ids=["down and up", "name", "mtu", "large mtu", "mac", "address", "gateway's address", "bridge"],
)
def test_the_guest_changes_its_interface(guest: GuestRunner, change: str) -> None:
    assert guest.check(["sh", "-c", f"{change}; {ROUTE}; {PAGE}"], seconds=60) == SERVED


def test_the_guest_removes_its_interface(guest: GuestRunner) -> None:
    """The network is gone; the command goes on and ends as it likes."""
    done = guest(["sh", "-c", f"ip link delete eth0; {PAGE}; exec sh -c 'echo alive; exit 9'"])
    assert (done.returncode, done.stdout) == (9, "alive\n")


def test_one_byte_at_a_time(guest: GuestRunner, blob: Blob) -> None:
    """A reader with the smallest window holds up nobody and gets every byte."""
    slowly = 3000
    out = guest.check(["python3", str(CLIENTS / "slow_reader.py"), OUT4, str(slowly)], seconds=60)
    with blob.path.open("rb") as file:
        assert out.strip() == hashlib.sha256(file.read(slowly + 100_000)).hexdigest()


def test_the_smallest_segments(guest: GuestRunner, blob: Blob) -> None:
    """The guest says that it takes segments of one byte (RFC 9293 has no lowest MSS)."""
    small = "sysctl -qw net.ipv4.route.min_adv_mss=1 && ip route replace default via 192.168.64.1 advmss 1"
    fetch = f"curl -sS -m 50 -r 0-99999 http://{OUT4}/blob | head -c 100000 | sha256sum"
    out = guest.check(["sh", "-c", f"{small}; {fetch}"], seconds=60)
    with blob.path.open("rb") as file:
        assert out.split()[0] == hashlib.sha256(file.read(100_000)).hexdigest()
