"""A guest with both families: its own kernel's IPv6, through the host sockets of guestnet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator

import pytest
from lab import Lab, Process, wait_until
from lab.namespaces import FAR6, HOST4, HOST6, OUT4, OUT6, ip
from lab.runner import GUESTNET, Blob, GuestRunner

PREFIX = "fd12:3456:789a:1::/64"
GATEWAY6, GUEST6 = "fd12:3456:789a:1::1", "fd12:3456:789a:1::2"
BOTH = ("--prefix", PREFIX)


@pytest.fixture
def own_guest(own_lab: Lab) -> Iterator[GuestRunner]:
    runner = GuestRunner(own_lab, "guestnet")
    yield runner
    for process in runner.dataplanes:
        process.stop()


@pytest.fixture(autouse=True)
def _only_guestnet(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--peer") != "guestnet":
        pytest.skip("about guestnet's own options")


def test_both_families_are_there_before_the_command(guest: GuestRunner) -> None:
    """No duplicate address detection delays it: the first program has addresses and routes."""
    out = guest.check(["sh", "-c", "ip -o addr show dev eth0; ip -6 route; ip -4 route"], *BOTH)
    assert f"inet6 {GUEST6}/64" in out
    assert "inet 192.168.64.2/24" in out
    assert "tentative" not in out
    assert "default via fe80::1 dev eth0" in out
    assert "default via 192.168.64.1 dev eth0" in out


def test_http_over_both(guest: GuestRunner) -> None:
    script = f"curl -sS -g http://[{OUT6}]/peer; echo; curl -sS http://{OUT4}/peer"
    out = guest.check(["sh", "-c", script], *BOTH)
    assert HOST6 in out
    assert HOST4 in out


def test_a_large_download_and_upload(guest: GuestRunner, blob: Blob) -> None:
    """64 MiB each way: large segments, and digests from both ends."""
    script = f"""
import hashlib, socket, urllib.request
with urllib.request.urlopen("http://[{OUT6}]/blob") as answer:
    data = answer.read(64 << 20)
s = socket.create_connection(("{OUT6}", 9007))
s.sendall(data); s.shutdown(socket.SHUT_WR)
print(hashlib.sha256(data).hexdigest(), s.makefile().read())
"""
    down, count, up = guest.check(["python3", "-c", script], *BOTH, seconds=90).split()
    with blob.path.open("rb") as file:
        wanted = hashlib.sha256(file.read(64 << 20)).hexdigest()
    assert (down, up, count) == (wanted, wanted, str(64 << 20))


@pytest.mark.parametrize("direction", [[], ["-R"]])
def test_four_streams_each_carry_data(guest: GuestRunner, direction: list[str]) -> None:
    """iperf3 -6: no stream starves, whichever way they go."""
    server = guest.lab.start(
        ["iperf3", "-s", "-6", "-1", "-p", "5206", "--forceflush"], ns=guest.lab.out, ready="listening"
    )
    try:
        words = ["iperf3", "-6", "-J", "-c", OUT6, "-p", "5206", "-t", "2", "-P", "4", *direction]
        report = json.loads(guest.check(words, *BOTH, seconds=60))
    finally:
        server.stop()
    received = [stream["receiver"]["bytes"] for stream in report["end"]["streams"]]
    assert len(received) == 4
    assert min(received) > 1 << 20, received


@pytest.mark.parametrize("address", [OUT6, FAR6, GATEWAY6])
def test_echo(guest: GuestRunner, address: str) -> None:
    out = guest.check(["ping", "-6", "-n", "-c", "2", "-i", "0.2", "-W", "3", address], *BOTH)
    assert "2 received" in out


def test_a_large_echo(guest: GuestRunner) -> None:
    """3000 bytes: fragments each way."""
    out = guest.check(["ping", "-6", "-n", "-c", "2", "-i", "0.2", "-W", "3", "-s", "3000", OUT6], *BOTH)
    assert "2 received" in out


def test_traceroute(guest: GuestRunner) -> None:
    words = ["traceroute", "-6", "-n", "-q", "1", "-w", "3", "-m", "5", FAR6]
    lines = guest.check(words, *BOTH).splitlines()[1:]
    assert [line.split()[1] for line in lines] == [GATEWAY6, OUT6, FAR6]


def test_path_mtu_is_learned(guest: GuestRunner) -> None:
    """1452 bytes to a host behind a 1400-byte link: the guest is told 1400."""
    words = ["ping", "-6", "-n", "-c", "3", "-i", "0.3", "-W", "3", "-M", "do", "-s", "1452", FAR6]
    done = guest(words, *BOTH)
    assert "1400" in done.stdout + done.stderr


def test_a_refused_connection_and_datagram(guest: GuestRunner) -> None:
    script = f"""
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    s = socket.socket(socket.AF_INET6, kind); s.settimeout(5)
    try:
        s.connect(("{OUT6}", 9)); s.send(b"x"); s.recv(1)
    except ConnectionRefusedError:
        print("refused")
"""
    assert guest.check(["python3", "-c", script], *BOTH).split() == ["refused", "refused"]


def test_datagrams(guest: GuestRunner) -> None:
    """Small ones, and one that travels in fragments each way."""
    echo = f"""
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(("{OUT6}", 7707)); print("ready", flush=True)
while True:
    s.sendto(*s.recvfrom(9000))
"""
    server = guest.lab.start(["python3", "-c", echo], ns=guest.lab.out, ready="^ready$")
    script = f"""
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.settimeout(5)
for size in (1, 1400, 5000):
    s.sendto(b"a" * size, ("{OUT6}", 7707))
    print(len(s.recv(9000)))
"""
    try:
        assert guest.check(["python3", "-c", script], *BOTH).split() == ["1", "1400", "5000"]
    finally:
        server.stop()


def test_names_by_the_gateway_over_ipv6(guest: GuestRunner) -> None:
    for transport in ("+notcp", "+tcp"):
        words = ["dig", transport, "+short", f"@{GATEWAY6}", "www.example.test", "AAAA"]
        assert guest.check(words, *BOTH).split() == [OUT6]


def test_a_host_without_ipv6_is_known_at_once(own_lab: Lab, own_guest: GuestRunner) -> None:
    """No route, no wait: a client that tries IPv6 first goes on with IPv4."""
    ip("-n", own_lab.host, "-6", "route", "del", "default")
    script = (
        f"ip -6 route show default; time -p curl -sS -g -m 5 http://[2001:db8:99::1]/ ; "
        f"curl -sS http://{OUT4}/peer"
    )
    done = own_guest(["bash", "-c", script], *BOTH)
    assert "default" not in done.stdout
    assert "203.0.113.1" in done.stdout
    real = next(line for line in done.stderr.splitlines() if line.startswith("real"))
    assert float(real.split()[1]) < 1.0, done.stderr


def test_the_hosts_ipv6_is_followed(own_lab: Lab, own_guest: GuestRunner) -> None:
    """The guest's default route goes and comes with the host's, within five seconds."""
    watch = "while :; do ip -6 route show default | grep -c via; sleep 0.1; done"
    process = own_guest.start(["sh", "-c", watch], *BOTH, ready="^1$")

    def last() -> str:
        return process.output.split()[-1]

    ip("-n", own_lab.host, "-6", "route", "del", "default")
    wait_until(lambda: last() == "0", "the route to go", seconds=5)
    ip("-n", own_lab.host, "-6", "route", "add", "default", "via", OUT6)
    wait_until(lambda: last() == "1", "the route to come", seconds=5)


def test_joined_guests_have_both_families(lab: Lab, guestnet: Callable[..., Process]) -> None:
    """Two guests of one network: each has the number of its IPv4 address, and they reach each other."""
    guestnet("up", "--name", "both", "--json", *BOTH, ready='"event": "ready"')
    first = [GUESTNET, "run", "--network", "both", "--id", "one", "--"]
    show = [
        "sh",
        "-c",
        "ip -o -6 addr show dev eth0 scope global; ip -6 route show default; echo up; exec sleep 60",
    ]
    one = lab.start([*first, *show], ordinary=True, ready="^up$")
    try:
        address = one.output.split("inet6 ")[1].split("/")[0]
        assert address.startswith("fd12:3456:789a:1::")
        assert "via fe80::1" in one.output
        script = f"ping -6 -n -c 1 -W 5 {address} && curl -sS -g http://[{OUT6}]/peer"
        words = [GUESTNET, "run", "--network", "both", "--id", "two", "--", "sh", "-c", script]
        done = lab.run(words, ordinary=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert HOST6 in done.stdout
    finally:
        one.stop()
