"""The grammar of published ports, and the host's sockets for them."""

from __future__ import annotations

import socket
import subprocess
import sys
from ipaddress import ip_address
from typing import Any

import pytest
from guestnet.errors import ConfigError, GuestnetError, PortInUse, UnsupportedError
from guestnet.model.forward_spec import ForwardSpec
from guestnet.runtime.published.host_sockets import close_sockets, open_sockets
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "host_ip", "host", "guest", "guest_ports", "protocol"),
    [
        ("8080:80", None, range(8080, 8081), None, range(80, 81), "tcp"),
        ("8080:80/udp", None, range(8080, 8081), None, range(80, 81), "udp"),
        ("8080:80/TCP", None, range(8080, 8081), None, range(80, 81), "tcp"),
        ("127.0.0.1:53:5353/udp", "127.0.0.1", range(53, 54), None, range(5353, 5354), "udp"),
        ("localhost:53:5353", "127.0.0.1", range(53, 54), None, range(5353, 5354), "tcp"),
        ("[::1]:80:8080", "::1", range(80, 81), None, range(8080, 8081), "tcp"),
        ("2222:vm1:22", None, range(2222, 2223), "vm1", range(22, 23), "tcp"),
        ("2222:192.168.64.9:22", None, range(2222, 2223), "192.168.64.9", range(22, 23), "tcp"),
        ("10.0.0.1:2222:vm1:22", "10.0.0.1", range(2222, 2223), "vm1", range(22, 23), "tcp"),
        ("[fd00::1]:2222:vm-1:22/udp", "fd00::1", range(2222, 2223), "vm-1", range(22, 23), "udp"),
        ("8000-8002:90-92", None, range(8000, 8003), None, range(90, 93), "tcp"),
        ("127.0.0.1:8000-8002:vm1:90-92/udp", "127.0.0.1", range(8000, 8003), "vm1", range(90, 93), "udp"),
        ("0:80", None, range(1), None, range(80, 81), "tcp"),
        ("80:[fd00::2]:80", None, range(80, 81), "fd00::2", range(80, 81), "tcp"),
        (":80:8080", None, range(80, 81), None, range(8080, 8081), "tcp"),
        # Without a port of the host, as Docker: any that is free.
        ("80", None, range(1), None, range(80, 81), "tcp"),
        ("53/udp", None, range(1), None, range(53, 54), "udp"),
        (":80", None, range(1), None, range(80, 81), "tcp"),
        ("127.0.0.1::80", "127.0.0.1", range(1), None, range(80, 81), "tcp"),
        ("[::1]::80", "::1", range(1), None, range(80, 81), "tcp"),
        ("127.0.0.1::vm1:80", "127.0.0.1", range(1), "vm1", range(80, 81), "tcp"),
        (":vm1:80", None, range(1), "vm1", range(80, 81), "tcp"),
    ],
)
def test_grammar(
    text: str, host_ip: str | None, host: range, guest: str | None, guest_ports: range, protocol: str
) -> None:
    spec = ForwardSpec.parse(text)
    assert spec.host_ip == (None if host_ip is None else ip_address(host_ip))
    assert (spec.host_ports, spec.guest, spec.guest_ports) == (host, guest, guest_ports)
    assert spec.protocol == protocol


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "80-81",
        "127.0.0.1::80-81",
        "127.0.0.1:80",
        "80-/tcp",
        "80:",
        "a:b",
        "80:0",
        "80:65536",
        "65536:80",
        "-1:80",
        "80:80/sctp",
        "80:80/",
        "8000-8002:90-91",
        "8002-8000:90-92",
        "0-3:90-93",
        "1.2.3:80:80:80",
        "1.2.3.4:80:vm1:80:9",
        "::1:80:80",
        "[::1:80:80",
        "[::1]80:80",
        "[vm1]:80:80",
        "80:v m:80",
        "\u0661:80",
        "8080:80:vm1",
        "999999:1",
    ],
)
def test_wrong_text_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ForwardSpec.parse(text)
    assert repr(text) in str(caught.value)


def test_shown() -> None:
    assert str(ForwardSpec.parse("8080:80")) == "0.0.0.0:8080/tcp -> guest:80"
    assert str(ForwardSpec.parse("[::1]:1-2:vm1:3-4/udp")) == "[::1]:1-2/udp -> vm1:3-4"
    assert str(ForwardSpec.parse("80:[fd00::2]:80")) == "0.0.0.0:80/tcp -> [fd00::2]:80"


def test_guest_address() -> None:
    assert ForwardSpec.parse("1:2").guest_address is None
    assert ForwardSpec.parse("1:vm1:2").guest_address is None
    assert ForwardSpec.parse("1:10.0.0.2:2").guest_address == ip_address("10.0.0.2")
    with pytest.raises(UnsupportedError, match="fd00::2"):
        _ = ForwardSpec.parse("1:[fd00::2]:2").guest_address


@pytest.mark.parametrize(("kind", "protocol"), [(socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")])
def test_all_of_a_range_or_none(kind: socket.SocketKind, protocol: str) -> None:
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            other.listen()
        taken = other.getsockname()[1]
        spec = ForwardSpec.parse(f"127.0.0.1:{taken - 2}-{taken}:10-12/{protocol}")
        with pytest.raises(PortInUse) as caught:
            open_sockets(spec)
        assert f"127.0.0.1:{taken}" in str(caught.value)
        assert protocol.upper() in str(caught.value)
        # What was opened before is closed again.
        with socket.socket(socket.AF_INET, kind) as again:
            again.bind(("127.0.0.1", taken - 2))


def test_one_port_for_both_families() -> None:
    sockets = open_sockets(ForwardSpec.parse("0:80"))
    try:
        ports = {one.getsockname()[1] for group in sockets for one in group}
        assert len(ports) == 1
        families = {one.family for group in sockets for one in group}
        assert socket.AF_INET in families
        assert not any(one.getblocking() for group in sockets for one in group)
    finally:
        close_sockets(sockets)


def test_an_address_that_the_host_does_not_have() -> None:
    with pytest.raises(GuestnetError, match=r"no address 192\.0\.2\.7"):
        open_sockets(ForwardSpec.parse("192.0.2.7:0:80"))


_PARTS = st.sampled_from(
    ["80", "8000-8002", "0", "[::1]", "127.0.0.1", "vm1", ":", "::", "/tcp", "/udp", "-", "x"]
)


@given(st.one_of(st.text(max_size=40), st.lists(_PARTS, max_size=9).map("".join)))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        spec = ForwardSpec.parse(text)
    except ConfigError:
        return
    assert len(spec.host_ports) == len(spec.guest_ports) > 0
    assert 0 < spec.guest_ports[0] <= spec.guest_ports[-1] <= 65535
    assert 0 <= spec.host_ports[0] <= spec.host_ports[-1] <= 65535
    assert str(spec)


def test_more_ports_than_descriptors() -> None:
    """All or none, and what to do about it."""
    code = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from guestnet import NatNetwork, TooManyFiles
with NatNetwork() as network:
    before = len(os.listdir("/proc/self/fd"))
    try:
        network.publish("127.0.0.1:20000-20999:80-1079")
    except TooManyFiles as error:
        print(error)
    assert len(os.listdir("/proc/self/fd")) == before
    # The worker gets each descriptor when the one it was made from goes: there is room for them once.
    assert len(network.publish(f"127.0.0.1:20000-20029:80-109").host_ports) == 30
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert "publish fewer ports" in done.stdout


@pytest.mark.parametrize("spec", [80, None, b"8080:80", ("8080", "80")])
def test_what_is_no_text(spec: object) -> None:
    with pytest.raises(TypeError, match="neither text nor a ForwardSpec"):
        ForwardSpec.of(spec)


def test_a_spec_of_ports_as_numbers() -> None:
    assert ForwardSpec(8080, 80) == ForwardSpec.parse("8080:80")
    assert ForwardSpec(8080, 80, "udp", "127.0.0.1", "vm1") == ForwardSpec.parse("127.0.0.1:8080:vm1:80/udp")
    assert ForwardSpec(range(1, 4), range(11, 14)) == ForwardSpec.parse("1-3:11-13")


@pytest.mark.parametrize(
    "values",
    [
        (-1, 80),
        (65536, 80),
        (8080, 0),
        (range(0), range(0)),
        (range(1, 9, 2), range(1, 5)),
        (range(2), range(1, 3), "tcp", "nonsense"),
        (8080, 80, "sctp"),
        (8080, range(80, 82)),
        (range(65530, 65540), range(1, 11)),
    ],
)
def test_a_wrong_value_of_a_spec_is_a_config_error(values: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError):
        ForwardSpec(*values)


@pytest.mark.parametrize(
    "values",
    [("8080", 80), (8080, None), (True, 80), (8080.0, 80), (80, 80, "tcp", 1), (80, 80, "tcp", None, 1)],
)
def test_a_wrong_type_in_a_spec_is_a_type_error(values: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError):
        ForwardSpec(*values)
