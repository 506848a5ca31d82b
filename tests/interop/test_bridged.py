"""Guests joined to a segment that is there already: a bridge of the host, or an interface that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from lab import Lab, Process, frames, need
from lab.namespaces import OUT4, ip
from lab.process import wait_until
from lab.runner import GUESTNET, Blob, GuestRunner

GUEST = "203.0.113.50"
HIGH_MAC = "fa:ff:ff:ff:ff:ff"
CONFIGURED = f"ip address add {GUEST}/24 dev eth0; ip route add default via {OUT4}; "
DHCP_SERVER = f"""\
interface up0
start 203.0.113.100
end 203.0.113.110
option subnet 255.255.255.0
option router {OUT4}
lease_file /dev/null
pidfile /dev/null
"""
SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add $ip/24 dev $interface && ip route add default via $router && echo "BOUND $ip"
"""


def interfaces(lab: Lab) -> list[str]:
    return [line.split()[0] for line in lab.check(["ip", "-br", "link"]).splitlines()]


@pytest.fixture(params=["br0", "up0"])
def segment(request: pytest.FixtureRequest, own_lab: Lab) -> Iterator[tuple[Lab, str]]:
    """A lab whose host has its interface in a bridge, or not; and what to join."""
    lab = own_lab
    if request.param == "br0":
        # A card with a high MAC: a bridge takes the lowest of its ports for its own.
        ip("-n", lab.host, "link", "set", "up0", "address", HIGH_MAC)
        ip("-n", lab.host, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        ip("-n", lab.host, "link", "set", "up0", "master", "br0")
        ip("-n", lab.host, "link", "set", "br0", "up")
    before = interfaces(lab)
    yield lab, request.param
    wait_until(lambda: interfaces(lab) == before, "the interfaces to be as before")


@pytest.fixture
def joined(segment: tuple[Lab, str]) -> Callable[..., str]:
    lab, name = segment

    def run(script: str, *options: str) -> str:
        runner = GuestRunner(lab, "guestnet")
        return runner.check(["sh", "-c", script], "--bridge", name, *options, ordinary=False, seconds=60)

    return run


def test_a_page_and_a_ping(joined: Callable[..., str]) -> None:
    out = joined(CONFIGURED + f"curl -sS http://{OUT4}/; ping -c 1 -W 5 {OUT4}")
    assert "a page from outside" in out
    assert "1 received" in out


def test_much_data_is_intact(joined: Callable[..., str], blob: Blob) -> None:
    down = joined(
        CONFIGURED
        + f"curl -sS -r 0-99999999 http://{OUT4}/blob | wc -c; curl -sS http://{OUT4}/blob | sha256sum"
    )
    assert blob.sha256 in down
    up = joined(CONFIGURED + f"curl -sS -H Expect: -T {blob.path} http://{OUT4}/upload")
    assert up.split() == [blob.sha256, str(blob.size)]


def test_the_segment_gives_the_address(segment: tuple[Lab, str], joined: Callable[..., str]) -> None:
    lab, _ = segment
    (lab.dir / "udhcpd.conf").write_text(DHCP_SERVER)
    script = lab.dir / "bound"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    server = [need.program("busybox", "busybox-static"), "udhcpd", "-f", str(lab.dir / "udhcpd.conf")]
    lab.start(server, ns=lab.out, ready="started")
    client = f"{need.program('udhcpc')} -f -q -n -i eth0 -s {script}"
    out = joined(f"{client}; curl -sS http://{OUT4}/")
    assert "BOUND 203.0.113.1" in out
    assert "a page from outside" in out


def test_it_is_reached_from_the_segment(segment: tuple[Lab, str]) -> None:
    lab, name = segment
    runner = GuestRunner(lab, "guestnet")
    serve = (
        f"{CONFIGURED} echo configured; exec {need.program('socat')} TCP-LISTEN:80,fork,reuseaddr EXEC:cat"
    )
    guest = runner.start(["sh", "-c", serve], "--bridge", name, ready="configured", ordinary=False)
    ask = ["sh", "-c", f"echo hello | socat -t5 - TCP:{GUEST}:80,retry=40,interval=0.1"]
    assert lab.check(ask, ns=lab.out) == "hello\n"
    guest.stop()


def test_two_guests_of_a_listener(segment: tuple[Lab, str]) -> None:
    """They become endpoints with the addresses that they show, hear the segment, and leave."""
    lab, name = segment
    path = str(lab.dir / "net.sock")
    up: Process = lab.start(
        [GUESTNET, "up", "--bridge", name, "--dgram", path, "--json"], ready='"event": "ready"'
    )
    mac, out_mac = bytes.fromhex("5254000000b1"), lab.check(["cat", "/sys/class/net/up0/address"], ns=lab.out)
    asking = frames.arp(mac, "203.0.113.61", OUT4)
    code = (
        "import socket,sys,os;"
        f"s=socket.socket(socket.AF_UNIX,socket.SOCK_DGRAM);s.bind({path + '.guest'!r});s.connect({path!r});"
        f"s.send(bytes.fromhex({asking.hex()!r}));s.settimeout(10)\n"
        f"while True:\n f=s.recv(2000)\n if f[12:14]==b'\\x08\\x06' and f[20:22]==b'\\0\\2': break\n"
        "print(f[22:28].hex(':'))"
    )
    assert lab.check(["python3", "-c", code]).strip() == out_mac.strip()
    event = up.wait_line('"guest_up".*52:54:00:00:00:b1')
    assert "vm1" in event.string
    up.wait_line('"address_seen".*203.0.113.61')
    if name == "br0":
        own = lab.check(["cat", "/sys/class/net/br0/address"])
        assert own.strip() == HIGH_MAC, "the host keeps the MAC that it is known by"
    up.stop()


def test_a_user_without_the_privilege_gets_an_error(own_lab: Lab) -> None:
    done = GuestRunner(own_lab, "guestnet")(["true"], "--bridge", "up0")
    assert done.returncode == 125
    assert "CAP_NET_RAW" in done.stderr
    done = GuestRunner(own_lab, "guestnet")(["true"], "--bridge", "nowhere0", ordinary=False)
    assert done.returncode == 2
    assert "'nowhere0'" in done.stderr
