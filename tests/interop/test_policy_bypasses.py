"""What a guest under `allow www.example.test` tries with real tools to reach more, and what it is told.

The guest is a network namespace behind a TAP device. www.example.test is 203.0.113.2, where the outside also
has alias.example.test; second.example.test is 203.0.113.3, which nothing allows. Each with both uplinks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, need
from lab.namespaces import OUT4, SECOND4
from lab.policy_guest import Guest, certificate, policy_guest

TESTS = Path(__file__).resolve().parents[1]
WWW, ALIAS, SECOND = "www.example.test", "alias.example.test", "second.example.test"
POLICY = """
default = "deny"
[[rule]]
action = "allow"
to = "www.example.test"
"""
NOTHING = 'default = "deny"\n'
QUIC_DENIED = """
default = "allow"
[[rule]]
action = "deny"
to = "ok.example"
"""
FLIGHTS = TESTS.parent / "crates/guestnet-core/tests/inspection_support/quic"
"""First flights of QUIC clients: `small` is for ok.example, the others are not."""


@pytest.fixture(scope="module")
def tls_servers(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> None:
    """openssl's server at both addresses of the outside."""
    openssl = need.program("openssl")
    cert, key = certificate(lab, tmp_path_factory.mktemp("certificate"))
    for address in (OUT4, SECOND4):
        command = [openssl, "s_server", "-accept", f"{address}:443", "-key", key, "-cert", cert, "-www"]
        lab.start(command, ns=lab.out, ready="ACCEPT")


@pytest.fixture(params=["sockets", "tun"])
def guest(lab: Lab, tls_servers: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Guest]:
    with policy_guest(lab, tmp_path, POLICY, request.param) as made:
        yield made


def test_what_is_allowed_is_reached(guest: Guest) -> None:
    status, page = guest.curl(f"http://{WWW}/")
    assert (status, page[-3:]) == (0, "200")
    assert "Certificate chain" in guest.tls(WWW, "-servername", WWW)


def test_a_raw_address_is_refused_at_once(guest: Guest) -> None:
    for url in (f"http://{OUT4}/", f"http://{SECOND4}/", f"https://{SECOND4}/"):
        before = time.monotonic()
        status, told = guest.curl(url)
        assert status == 7, told
        assert time.monotonic() - before < 5


def test_an_address_with_a_forged_host_or_name(guest: Guest) -> None:
    """The name is right, but this guest did not get the address for it."""
    status, told = guest.curl("--resolve", f"{WWW}:80:{SECOND4}", f"http://{WWW}/")
    assert status == 7, told
    assert "errno=111" in guest.tls(SECOND4, "-servername", WWW)


def test_another_host_at_an_allowed_address_gets_403(guest: Guest) -> None:
    status, told = guest.curl("-H", f"Host: {ALIAS}", f"http://{WWW}/")
    assert (status, told[-3:]) == (0, "403")
    body = json.loads(told[:-3])
    assert (body["error"], body["rule"], body["name"]) == ("denied", "default", ALIAS)
    assert ["tcp", "default", "policy", WWW, ALIAS] in guest.denials()


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\r\nHost: www.example.test\r\nHost: alias.example.test\r\n\r\n",
        "GET http://alias.example.test/ HTTP/1.1\r\nHost: www.example.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: www.example.test\r\n alias.example.test\r\n\r\n",
        "CONNECT second.example.test:443 HTTP/1.1\r\nHost: www.example.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: alias.example.test\r\nX: www.example.test\r\n\r\n",
    ],
)
def test_heads_that_servers_read_in_different_ways_get_403(guest: Guest, head: str) -> None:
    done = guest.run("socat", "-t", "10", "-", f"TCP:{WWW}:80", stdin=head)
    assert done.stdout.startswith("HTTP/1.1 403 "), done


def test_a_pipelined_request_with_another_host(guest: Guest) -> None:
    head = "GET /{} HTTP/1.1\r\nHost: {}\r\n\r\n"
    both = head.format("peer", WWW) + head.format("", ALIAS)
    done = guest.run("socat", "-t", "10", "-", f"TCP:{WWW}:80", stdin=both)
    first, _, rest = done.stdout.partition("HTTP/1.1 403 ")
    assert first.startswith("HTTP/1.1 200 "), done
    assert f'"name":"{ALIAS}"' in rest


def test_tls_with_another_name_or_none_gets_an_alert(guest: Guest) -> None:
    assert "Certificate chain" in guest.tls(WWW, "-servername", WWW)
    for args in (("-servername", ALIAS), ("-servername", SECOND), ("-noservername",)):
        told = guest.tls(WWW, *args)
        assert "access denied" in told, told
    assert "Certificate chain" not in guest.tls(WWW, "-servername", ALIAS)


def test_a_hello_in_pieces_is_put_together(guest: Guest) -> None:
    for name, page in ((WWW, True), (ALIAS, False)):
        told = guest.tls(WWW, "-servername", name, "-split_send_frag", "512", "-max_send_frag", "512")
        assert ("Certificate chain" in told) is page, told


def test_silence_and_other_protocols_are_refused(guest: Guest) -> None:
    script = f"""
import socket, time
for first in (b"SSH-2.0-tunnel\\r\\n", bytes(range(9)), b""):
    s = socket.create_connection(("{WWW}", 443))
    before = time.monotonic()
    s.sendall(first)
    try:
        print("got", s.recv(10))
    except ConnectionResetError:
        print("reset", round((time.monotonic() - before) / 10))
"""
    assert guest.run(sys.executable, "-c", script, seconds=40).stdout.split() == ["reset", "0"] * 2 + [
        "reset",
        "1",
    ]


def test_names_that_no_rule_allows_are_not_asked(guest: Guest) -> None:
    for name, kind in ((SECOND, "A"), (ALIAS, "A"), ("data.www.example.test", "TXT"), (WWW, "TXT")):
        told = guest.dig(name, kind)
        assert "status: NXDOMAIN" in told or "status: REFUSED" in told, told
    status, told = guest.curl(f"http://{SECOND}/")
    assert status == 6, told


def test_other_resolvers_are_refused(guest: Guest) -> None:
    assert "status: NOERROR" not in guest.dig(f"@{OUT4}", WWW)
    assert "status: NOERROR" not in guest.dig("+tcp", f"@{OUT4}", WWW)
    status, _ = guest.curl(f"https://{OUT4}:853/")
    assert status == 7
    assert {denial[0] for denial in guest.denials()} >= {"udp", "tcp"}


def test_a_ping_is_told_that_it_is_prohibited(guest: Guest) -> None:
    guest.curl(f"http://{WWW}/")
    for address in (OUT4, SECOND4, "169.254.169.254"):
        told = guest.run("ping", "-c", "1", "-W", "3", address).stdout
        assert "Packet filtered" in told, told


def test_quic_to_a_denied_name_gets_icmp_and_another_passes(guest: Guest) -> None:
    guest.put_in_force(QUIC_DENIED)
    script = f"""
import pathlib, socket
flight = lambda name: pathlib.Path("{FLIGHTS}", name + ".bin").read_bytes()
def first(*names):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect(("{OUT4}", 7))
    s.settimeout(5)
    heard = []
    for name in names:
        s.send(flight(name))
    for name in names:
        try:
            heard.append(s.recv(2000) == flight(name))
        except OSError as error:
            heard.append(error.errno)
    print(heard)
first("small")
first("v1_0")
first("large_0", "large_1")
"""
    heard = guest.run(sys.executable, "-c", script).stdout.splitlines()
    assert heard == ["[113]", "[True]", "[True, True]"]
    assert ["udp", "deny ok.example", "policy", None, "ok.example"] in guest.denials()


def test_a_connection_is_cut_when_its_name_is_no_longer_allowed(guest: Guest) -> None:
    script = f"""
import socket
s = socket.create_connection(("{WWW}", 80))
s.sendall(b"GET /blob HTTP/1.1\\r\\nHost: {WWW}\\r\\n\\r\\n")
print("first", len(s.recv(1000)) > 0, flush=True)
try:
    while s.recv(65536):
        pass
    print("ended")
except ConnectionResetError:
    print("reset", flush=True)
"""
    program = guest.lab.start([sys.executable, "-c", script], ns=guest.ns, ready="first True")
    assert guest.put_in_force(NOTHING) >= 1
    program.wait_line("reset")
    status, _ = guest.curl(f"http://{WWW}/")
    assert status in (6, 7)
