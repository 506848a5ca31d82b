"""Stale and live socket files."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from guestnet.cli.runner.sockets import remove_stale
from guestnet.errors import GuestnetError

KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_socket_is_removed(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))
    assert path.exists()
    assert remove_stale(str(path))
    assert not path.exists()
    assert not remove_stale(str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_socket_is_refused(kind: int, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            sock.listen(1)
        with pytest.raises(GuestnetError, match="Another process"):
            remove_stale(str(path))
    assert path.exists()


def test_a_full_backlog_is_a_live_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen(0)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(path)
        with pytest.raises(GuestnetError, match="Another process"):
            remove_stale(path)
        for client in clients:
            client.close()


def test_a_file_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("x")
    with pytest.raises(GuestnetError, match="not a socket"):
        remove_stale(str(path))
    assert path.read_text() == "x"
