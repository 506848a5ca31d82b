"""Names, asked with dig in the guest: every type, TCP, big answers, and resolvers that are not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lab import Lab, need
from lab.namespaces import BLACKHOLE4, OUT4, SECOND4, UNREACHABLE4
from lab.runner import GuestRunner

TESTS = Path(__file__).resolve().parents[1]


def dig(guest: GuestRunner, *words: str, options: tuple[str, ...] = ()) -> str:
    need.program("dig", "bind9-dnsutils")
    return guest.check(["dig", "+tries=2", "+time=4", *words], *options)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("www.example.test", "A"), OUT4),
        (("www.example.test", "AAAA"), "2001:db8:113::2"),
        (("text.example.test", "TXT"), '"hello from outside" "second string"'),
        (("_sip._tcp.example.test", "SRV"), "10 20 5060 www.example.test."),
        (("mail.example.test", "MX"), "10 www.example.test."),
        (("odd.example.test", "CAA"), '0 issue "ca.example.test"'),
        (("odd.example.test", "TYPE65400"), "\\# 4 01020304"),
        (("alias.example.test", "A"), f"www.example.test.\n{OUT4}"),
        (("+tcp", "www.example.test", "A"), OUT4),
    ],
)
def test_types(guest: GuestRunner, words: tuple[str, ...], answer: str) -> None:
    assert dig(guest, "+short", *words).strip() == answer


def test_a_big_answer_comes_over_tcp(guest: GuestRunner) -> None:
    """7 kB: truncated over UDP with a small buffer, so dig asks again over TCP."""
    lines = dig(guest, "+short", "+bufsize=1232", "big.example.test", "TXT").splitlines()
    assert len(lines) == 40


def test_a_big_answer_over_tcp_at_once(guest: GuestRunner) -> None:
    assert len(dig(guest, "+short", "+tcp", "big.example.test", "TXT").splitlines()) == 40


def test_a_name_that_is_not_there(guest: GuestRunner) -> None:
    assert "status: NXDOMAIN" in dig(guest, "nowhere.example.test")


def test_own_records_and_names(guest: GuestRunner) -> None:
    options = ("--dns-record", "db.local=10.9.8.7", "--dns-record", "six.local=fd00::7")
    assert dig(guest, "+short", "db.local", options=options).strip() == "10.9.8.7"
    assert dig(guest, "+short", "six.local", "AAAA", options=options).strip() == "fd00::7"
    assert dig(guest, "+short", "gateway.guestnet.internal").strip() == "192.168.64.1"


def test_no_resolver_is_a_server_failure(own_lab: Lab) -> None:
    own_lab.set_resolver(None)
    guest = GuestRunner(own_lab, "guestnet")
    assert "status: SERVFAIL" in dig(guest, "www.example.test")
    assert dig(guest, "+short", "gateway.guestnet.internal").strip() == "192.168.64.1"


def test_a_dead_resolver_fails_over_to_the_next(own_lab: Lab) -> None:
    own_lab.set_resolver("192.0.2.53", OUT4)
    guest = GuestRunner(own_lab, "guestnet")
    assert dig(guest, "+short", "www.example.test").strip() == OUT4


def test_another_name_server_and_another_domain(guest: GuestRunner) -> None:
    words = ("--dns", SECOND4, "--search", "example.test")
    assert dig(guest, "+short", "+search", "www", options=words).strip() == OUT4
    assert "status: SERVFAIL" in dig(guest, "www.example.test", options=("--dns", UNREACHABLE4))


LOOK_UP = """
import socket, sys
try:
    print(socket.getaddrinfo(sys.argv[1], None, getattr(socket, sys.argv[2]))[0][4][0])
except socket.gaierror as error:
    names = ("EAI_AGAIN", "EAI_NONAME", "EAI_FAIL")
    print(next(name for name in names if getattr(socket, name) == error.errno))
"""


def look_up(guest: GuestRunner, name: str, family: str = "AF_INET", *options: str) -> str:
    """What glibc's getaddrinfo says; RES_OPTIONS (resolv.conf(5)) shortens its patience, not its search."""
    words = ["env", "RES_OPTIONS=timeout:1 attempts:1", "python3", "-c", LOOK_UP, name, family]
    return guest.check(words, *options).strip()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNSPEC"])
@pytest.mark.parametrize(
    ("resolver", "name"),
    [
        (OUT4, "www.elsewhere.example"),  # REFUSED
        (UNREACHABLE4, "www.example.test"),
        (BLACKHOLE4, "www.example.test"),
    ],
)
def test_a_temporary_failure_is_one_for_getaddrinfo(
    guest: GuestRunner, resolver: str, name: str, family: str
) -> None:
    """The answer to NAME.guestnet.internal, which glibc asks for next, does not make it permanent."""
    assert look_up(guest, name, family, "--dns", resolver) == "EAI_AGAIN"


def test_getaddrinfo_fails_for_a_name_that_does_not_exist(guest: GuestRunner) -> None:
    assert look_up(guest, "nowhere.example.test") == "EAI_NONAME"
    assert look_up(guest, "www.example.test") == OUT4


def test_a_resolv_conf_without_a_server_means_the_host_itself(own_lab: Lab) -> None:
    """resolv.conf(5): the name server on the local machine is asked."""
    command = [sys.executable, "-m", "lab.name_server", "127.0.0.1"]
    own_lab.start(command, ns=own_lab.host, ready="^ready$", env={"PYTHONPATH": str(TESTS)})
    own_lab.set_resolver(None)
    assert dig(GuestRunner(own_lab, "guestnet"), "+short", "www.example.test").strip() == OUT4
