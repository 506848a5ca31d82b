"""Guests reach the outside through a proxy, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import Lab, need
from lab.namespaces import FAR4, HOST4, OUT4, ip
from lab.process import Process
from lab.runner import GUESTNET, GuestRunner

TESTS = Path(__file__).resolve().parents[1]
HTTP, SOCKS = 3128, 1080
PROXY4 = "203.0.113.3"
"""An address of the outside that only the proxies use."""
PAGE = f"http://{OUT4}/peer"


@pytest.fixture
def proxied(own_lab: Lab) -> Callable[..., Process]:
    """Starts the proxies on PROXY4 or in another namespace. The host has no other way to the outside."""
    ip("-n", own_lab.host, "route", "add", "unreachable", f"{OUT4}/32")
    ip("-n", own_lab.host, "route", "del", "default")

    def start(credentials: str = "", ns: str | None = None) -> Process:
        words = [sys.executable, "-m", "lab.proxies", str(HTTP), str(SOCKS), credentials]
        return own_lab.start(words, ns=ns or own_lab.out, ready="^ready$", env={"PYTHONPATH": str(TESTS)})

    return start


@pytest.mark.parametrize("scheme", ["socks5", "http"])
@pytest.mark.parametrize("credentials", ["", "me:s@cret"])
def test_pages_and_names_come_through_the_proxy(
    own_lab: Lab, proxied: Callable[..., Process], scheme: str, credentials: str
) -> None:
    """The name server is asked through it too, over TCP."""
    proxy = proxied(credentials)
    guest = GuestRunner(own_lab, "guestnet")
    login = "me:s%40cret@" if credentials else ""
    url = f"{scheme}://{login}{PROXY4}:{HTTP if scheme == 'http' else SOCKS}"
    said = guest.check(["curl", "-sS", "-m", "15", "http://www.example.test/peer"], "--proxy", url)
    assert OUT4 in said, "the server sees the proxy"
    assert HOST4 not in said
    assert [line for line in proxy.lines if line != "ready"][-2:] == [
        f"{scheme} {OUT4}:53",
        f"{scheme} {OUT4}:80",
    ]


def test_a_large_download(own_lab: Lab, proxied: Callable[..., Process]) -> None:
    proxied()
    guest = GuestRunner(own_lab, "guestnet")
    script = f"curl -sS -m 40 http://{OUT4}/blob | wc -c"
    said = guest.check(["sh", "-c", script], "--proxy", f"socks5://{PROXY4}:{SOCKS}", seconds=60)
    assert int(said) > 1 << 20


def test_a_proxy_on_the_hosts_loopback(own_lab: Lab) -> None:
    """It is in the host's namespace, so the outside sees the host."""
    words = [sys.executable, "-m", "lab.proxies", str(HTTP), str(SOCKS)]
    own_lab.start(words, ready="^ready$", env={"PYTHONPATH": str(TESTS)})
    guest = GuestRunner(own_lab, "guestnet")
    assert HOST4 in guest.check(["curl", "-sS", "-m", "15", PAGE], "--proxy", f"http://127.0.0.1:{HTTP}")


@pytest.mark.parametrize(
    ("url", "logged"),
    [
        (f"socks5://me:wrong@{PROXY4}:{SOCKS}", "it wants other credentials"),
        (f"http://{PROXY4}:{HTTP}", "it wants other credentials"),
        (f"socks5://me:secret@{PROXY4}:4", "Connection refused"),
    ],
)
def test_nothing_goes_around_a_proxy_that_fails(own_lab: Lab, url: str, logged: str) -> None:
    """The host has a way to the outside, which is not used."""
    words = [sys.executable, "-m", "lab.proxies", str(HTTP), str(SOCKS), "me:secret"]
    own_lab.start(words, ns=own_lab.out, ready="^ready$", env={"PYTHONPATH": str(TESTS)})
    done = GuestRunner(own_lab, "guestnet")(["curl", "-sS", "-m", "15", PAGE], "--proxy", url)
    assert done.returncode == 7, done.stdout + done.stderr
    assert logged in done.stderr
    assert "secret" not in done.stderr
    assert "wrong" not in done.stderr


@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_what_the_proxy_refuses_is_refused_to_the_guest(
    own_lab: Lab, proxied: Callable[..., Process], scheme: str
) -> None:
    proxied()
    guest = GuestRunner(own_lab, "guestnet")
    url = f"{scheme}://{PROXY4}:{HTTP if scheme == 'http' else SOCKS}"
    for place in (f"{OUT4}:9", f"{OUT4}:4"):
        done = guest(["curl", "-sS", "-m", "15", f"http://{place}/"], "--proxy", url)
        assert done.returncode == 7, done.stderr
        assert "opens no connections" not in done.stderr, "the proxy works"


def test_a_proxy_that_stays_silent(own_lab: Lab) -> None:
    """One for HTTP waits for the rest of a request."""
    words = [sys.executable, "-m", "lab.proxies", str(HTTP), str(SOCKS)]
    own_lab.start(words, ns=own_lab.out, ready="^ready$", env={"PYTHONPATH": str(TESTS)})
    guest = GuestRunner(own_lab, "guestnet")
    done = guest(["curl", "-sS", "-m", "50", PAGE], "--proxy", f"socks5://{PROXY4}:{HTTP}", seconds=60)
    assert done.returncode == 7, done.stderr
    assert "it does not answer" in done.stderr


def test_udp_and_ping_are_refused_and_say_so(own_lab: Lab) -> None:
    """The host has a way to the outside, which is not used."""
    script = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(8)\n"
        f"s.connect(('{OUT4}', 7)); s.send(b'x')\n"
        "try:\n    s.recv(1)\nexcept OSError as error:\n    print(error.strerror)"
    )
    guest = GuestRunner(own_lab, "guestnet")
    url = f"socks5://{PROXY4}:{SOCKS}"
    assert guest.check(["python3", "-c", script], "--proxy", url) in (
        "No route to host\n",
        "Permission denied\n",
    )
    done = guest(["ping", "-n", "-c", "1", "-W", "5", FAR4], "--proxy", url)
    assert done.returncode != 0
    assert "Packet filtered" in done.stdout, done.stdout


def test_the_url_comes_from_the_environment_or_a_file(own_lab: Lab, proxied: Callable[..., Process]) -> None:
    proxied("me:secret")
    url = f"http://me:secret@{PROXY4}:{HTTP}"
    words = [GUESTNET, "run", "--proxy", "host", "--", "curl", "-sS", "-m", "15", "--noproxy", "*", PAGE]
    assert OUT4 in own_lab.check(["env", f"HTTPS_PROXY={url}", *words])
    file = own_lab.dir / "proxy"
    file.write_text(f"{url}\n")
    guest = GuestRunner(own_lab, "guestnet")
    assert OUT4 in guest.check(["curl", "-sS", "-m", "15", PAGE], "--proxy", f"@{file}")


def test_a_packaged_proxy(own_lab: Lab, proxied: Callable[..., Process]) -> None:
    """microsocks, with credentials."""
    program = need.program("microsocks")
    own_lab.start([program, "-i", PROXY4, "-p", "1081", "-u", "me", "-P", "secret"], ns=own_lab.out)
    own_lab.wait_listening(own_lab.out, 1081)
    guest = GuestRunner(own_lab, "guestnet")
    url = f"socks5://me:secret@{PROXY4}:1081"
    assert OUT4 in guest.check(["curl", "-sS", "-m", "15", "http://www.example.test/peer"], "--proxy", url)
