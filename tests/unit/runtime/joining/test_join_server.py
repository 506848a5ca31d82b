"""The socket of a running network: what it takes, what it refuses, and what is left when a client goes."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guestnet import NatNetwork
from guestnet.cli.runner.network_client import NetworkClient
from guestnet.errors import (
    AlreadyRunning,
    AttachError,
    ConfigError,
    EndpointExists,
    GuestnetError,
    NotRunning,
)
from guestnet.runtime.joining import join_server, network_socket
from guestnet.runtime.joining.join_server import JoinServer


@pytest.fixture
def network() -> Iterator[NatNetwork]:
    with NatNetwork() as network:
        yield network


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "lab.sock")


@pytest.fixture
def server(network: NatNetwork, path: str) -> Iterator[JoinServer]:
    server = JoinServer(network, path)
    yield server
    server.close()
    assert not os.path.exists(path)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(20)
    sock.connect(path)
    return sock


def ask(sock: socket.socket, message: bytes, fds: list[int] | None = None) -> dict[str, Any]:
    if fds:
        socket.send_fds(sock, [message], fds)
    else:
        sock.send(message)
    answer: dict[str, Any] = json.loads(sock.recv(65536))
    return answer


RESERVE = json.dumps({"op": "reserve", "protocol": network_socket.PROTOCOL}).encode()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of this user's networks, which is not there yet."""
    path = tmp_path / "guestnet"
    monkeypatch.setattr(network_socket, "directory", lambda: str(path))
    return path


def test_the_directory_is_removed_when_it_is_empty(directory: Path) -> None:
    network_socket.remove_directory()
    network_socket.make_directory()
    (directory / "other.sock").touch()
    network_socket.remove_directory()
    assert [one.name for one in directory.iterdir()] == ["other.sock"]
    (directory / "other.sock").unlink()
    network_socket.remove_directory()
    assert not directory.exists()


def test_a_directory_that_an_ending_network_removed_is_made_again(
    network: NatNetwork, directory: Path
) -> None:
    network_socket.make_directory()
    path = network_socket.path_of("lab")
    network_socket.remove_directory()
    server = JoinServer(network, path)
    try:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        with connect(path) as sock:
            assert ask(sock, RESERVE)["id"] == "vm1"
    finally:
        server.close()


def test_only_the_directory_of_networks_is_made_again(network: NatNetwork, tmp_path: Path) -> None:
    with pytest.raises(GuestnetError, match="No such file"):
        JoinServer(network, str(tmp_path / "missing" / "lab.sock"))


def test_the_socket_is_for_its_user_alone(server: JoinServer, path: str) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_another_user_is_refused(
    server: JoinServer, path: str, monkeypatch: pytest.MonkeyPatch, network: NatNetwork
) -> None:
    monkeypatch.setattr(network_socket, "peer_user", lambda _sock: os.geteuid() + 1)
    with NetworkClient(path) as client, pytest.raises(ConfigError, match="belongs to another user"):
        client.reserve()
    assert len(network) == 0


def test_a_reservation_ends_with_its_connection(server: JoinServer, path: str, network: NatNetwork) -> None:
    with NetworkClient(path) as client:
        got = client.reserve(id="web", hostname="www")
        assert (got.id, str(got.address), str(got.gateway)) == ("web", "192.168.64.2/24", "192.168.64.1")
        assert network["web"].hostname == "www"
        with NetworkClient(path) as other:
            with pytest.raises(EndpointExists):
                other.reserve(id="web")
            assert other.reserve().id == "vm1"
    until(lambda: len(network) == 0)


def test_a_guest_that_attaches_nothing_is_removed(
    server: JoinServer, path: str, network: NatNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_server, "_ATTACH_SECONDS", 0.05)
    with connect(path) as sock:
        assert ask(sock, RESERVE)["ok"]
        assert sock.recv(65536) == b""
    until(lambda: len(network) == 0)


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 50000,
        b"{}",
        b'{"op": "attach"}',
        b'{"op": ["reserve"]}',
        b'{"op": "keep"}',
        b'{"op": "reserve"}',
        b'{"op": "reserve", "protocol": 99}',
        b'{"op": "reserve", "protocol": 1, "id": ""}',
        b'{"op": "reserve", "protocol": 1, "id": {"a": 1}}',
        b'{"op": "reserve", "protocol": 1, "mac": 5}',
        b'{"op": "reserve", "protocol": 1, "mac": [1, 2]}',
        b'{"op": "reserve", "protocol": 1, "ip": "10.0.0.1"}',
        b'{"op": "reserve", "protocol": 1, "ip": {}}',
        b'{"op": "reserve", "protocol": 1, "hostname": "a b"}',
        b'{"op": "reserve", "protocol": 1, "hostname": 7}',
    ],
)
def test_a_wrong_message_is_refused_and_the_server_goes_on(
    server: JoinServer, path: str, network: NatNetwork, message: bytes
) -> None:
    with connect(path) as sock:
        answer = ask(sock, message)
        assert answer["ok"] is False
        assert answer["error"]
        assert ask(sock, RESERVE)["id"] == "vm1"
    until(lambda: len(network) == 0)


@pytest.mark.parametrize(
    "message",
    [
        {"op": "attach"},
        {"op": "attach", "publish": "8080:80"},
        {"op": "attach", "publish": [5]},
        {"op": "attach", "publish": ["nonsense"]},
        {"op": "reserve", "protocol": network_socket.PROTOCOL},
        {"op": "keep", "name": 5},
    ],
)
def test_a_wrong_descriptor_is_refused(
    server: JoinServer, path: str, network: NatNetwork, message: dict[str, Any]
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with connect(path) as sock, open(os.devnull, "rb") as file:
        assert ask(sock, RESERVE)["ok"]
        answer = ask(sock, json.dumps(message).encode(), [file.fileno()])
        assert answer["ok"] is False
    until(lambda: len(network) == 0)
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_errors_keep_their_type(server: JoinServer, path: str) -> None:
    with NetworkClient(path) as client, open(os.devnull, "rb") as file:
        client.reserve()
        with pytest.raises(AttachError):
            client.attach(file.fileno())
    with pytest.raises(GuestnetError, match="no reason"):
        network_socket.raise_refusal({"ok": False, "code": "SystemExit"})


def test_a_message_that_is_too_long_ends_the_connection(server: JoinServer, path: str) -> None:
    with connect(path) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.send(b" " * (network_socket.MESSAGE_BYTES + 1))
        assert sock.recv(65536) == b""


def test_a_client_that_reads_no_answer_is_dropped(server: JoinServer, path: str) -> None:
    with connect(path) as deaf, connect(path) as other:
        deaf.settimeout(0.05)
        try:
            while True:
                deaf.send(b"x")
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert ask(other, RESERVE)["ok"]


def test_connections_are_bounded(server: JoinServer, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_server, "CONNECTIONS_MAX", 2)
    with connect(path) as first, connect(path) as second, connect(path) as third:
        assert ask(first, RESERVE)["ok"]
        assert ask(second, RESERVE)["ok"]
        assert json.loads(third.recv(65536))["ok"] is False
        assert third.recv(65536) == b""


def test_one_server_for_a_path_and_a_stale_socket_is_replaced(
    server: JoinServer, network: NatNetwork, path: str, tmp_path: Path
) -> None:
    with pytest.raises(AlreadyRunning):
        JoinServer(network, path)
    with NetworkClient(path) as client:
        assert client.reserve().id == "vm1"
    stale = str(tmp_path / "stale.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(stale)
    JoinServer(network, stale).close()


def test_a_network_that_ends_says_so(network: NatNetwork, path: str) -> None:
    server = JoinServer(network, path)
    with NetworkClient(path) as client:
        client.reserve()
        server.close()
        with pytest.raises(NotRunning):
            client.is_moving()
    assert len(network) == 0
    with pytest.raises(NotRunning, match="guestnet up --name"):
        NetworkClient(path)


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "a b", "-x", "x" * 33, "ä", "a\0"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="network name"):
        network_socket.check_name(name)


def test_a_directory_of_another_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "runtime"
    monkeypatch.setattr(network_socket, "directory", lambda: str(place))
    network_socket.make_directory()
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    place.chmod(0o777)
    with pytest.raises(GuestnetError, match="belongs to this user alone"):
        network_socket.make_directory()
    place.rmdir()
    place.symlink_to("/tmp")
    with pytest.raises(GuestnetError, match="belongs to this user alone"):
        network_socket.make_directory()
