"""Guests that come to sockets: each an endpoint of its own, gone when it leaves."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv6Address
from pathlib import Path

import pytest
from guestnet import AttachError, ConfigError, NatConfig, NatNetwork
from guestnet.model.events import AddressSeen, GuestDown, GuestUp
from guestnet.model.ipam import parse_mac
from guestnet.testing.guest import Guest

from .conftest import PATIENCE, Events, fetch, until
from .frames6 import advertisement

ALPHA = "02:00:00:00:00:0a"


class SocketGuest:
    """A guest behind a unix socket, with QEMU's framing or a frame per datagram."""

    def __init__(self, kind: str, path: Path, mac: str, first: bytes = b"") -> None:
        self._stream = kind == "stream"
        self._own = path.with_name(f"{mac.replace(':', '')}.sock")
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM if self._stream else socket.SOCK_DGRAM
        )
        if not self._stream:
            self._own.unlink(missing_ok=True)
            self._socket.bind(str(self._own))
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        if first:
            self._socket.send(first)
        self.guest = Guest(parse_mac(mac), self._send)
        self.guest.router = None
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _send(self, frame: bytes) -> None:
        self._socket.sendall(struct.pack("!I", len(frame)) + frame if self._stream else frame)

    def _receive(self) -> None:
        try:
            if not self._stream:
                while frame := self._socket.recv(65536):
                    self.guest.receive(frame)
            with self._socket.makefile("rb") as file:
                while len(head := file.read(4)) == 4:
                    self.guest.receive(file.read(struct.unpack("!I", head)[0]))
        except OSError:
            pass

    def appear(self, address: str) -> None:
        """Uses an address without asking for it, and says so by a datagram to the gateway."""
        self.guest.address = IPv4Interface(address)
        self.guest.router = self.guest.address.network[1]
        self.guest.send_udp(str(self.guest.router), 9, 9, b"x")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(PATIENCE)


@pytest.fixture
def network() -> Iterator[NatNetwork]:
    leases = [{"mac": ALPHA, "ip": "192.168.64.10", "name": "alpha"}]
    with NatNetwork(NatConfig(dhcp=False, dns=False, static_leases=leases)) as made:
        yield made


def test_guests_come_and_go(network: NatNetwork, tmp_path: Path) -> None:
    events = Events(network)
    path = tmp_path / "net.sock"
    listener = network.listen("stream", path)
    assert path.stat().st_mode & 0o777 == 0o600
    forward = network.publish("127.0.0.1:0:alpha:80")
    one = SocketGuest("stream", path, "02:00:00:00:00:01")
    alpha = SocketGuest("stream", path, ALPHA)
    one.appear("192.168.64.77/24")
    up = events.next(GuestUp)
    assert (up.endpoint, str(up.ip)) == ("vm1", "192.168.64.77")
    assert up.listener == str(path)
    alpha.appear("192.168.64.10/24")
    assert events.next(GuestUp).endpoint == "alpha"
    assert {(e.id, e.attachment, e.listener) for e in network.endpoints} == {
        ("vm1", "stream", str(path)),
        ("alpha", "stream", str(path)),
    }
    alpha.guest.serve(80, lambda connection: (connection.send(b"alpha"), connection.close()))
    assert fetch(forward.host_port) == b"alpha"
    one.guest.send_udp("192.168.64.10", 5000, 9, b"from one to alpha")

    alpha.close()
    down = events.next(GuestDown)
    assert (down.endpoint, down.mac) == ("alpha", ALPHA)
    assert network.get_endpoint("alpha") is None
    with pytest.raises(ConnectionError):
        fetch(forward.host_port)
    again = SocketGuest("stream", path, ALPHA)
    again.appear("192.168.64.10/24")
    again.guest.serve(80, lambda connection: (connection.send(b"again"), connection.close()))
    assert events.next(GuestUp).endpoint == "alpha"
    assert fetch(forward.host_port) == b"again"

    listener.close()
    assert not path.exists()
    listener.close()
    assert network.endpoint_count == 2, "guests of a stream stay"
    with pytest.raises(FileNotFoundError):
        SocketGuest("stream", path, "02:00:00:00:00:02")
    one.close()
    again.close()
    until(lambda: network.endpoint_count == 0, "both to leave")


def test_a_guest_that_shows_its_ipv6_first_keeps_its_ipv4_address(tmp_path: Path) -> None:
    with NatNetwork(NatConfig(dhcp=False, dns=False, subnet6="fd00:6e:0:1::/64")) as network:
        events = Events(network)
        path = tmp_path / "net.sock"
        network.listen("stream", path)
        six = IPv6Address("fd00:6e:0:1::77")
        guest = SocketGuest("stream", path, ALPHA)
        guest._send(advertisement(parse_mac(ALPHA), six))
        guest.appear("192.168.64.77/24")
        up = events.next(GuestUp)
        assert str(up.ip) == "192.168.64.77"
        seen = events.next(AddressSeen)
        assert (seen.endpoint, seen.ip) == (up.endpoint, six)
        assert network[up.endpoint].addresses == (up.ip, six)
        guest.close()


@pytest.mark.parametrize("kind", ["dgram", "unixgram"])
def test_guests_on_datagram_sockets(network: NatNetwork, tmp_path: Path, kind: str) -> None:
    events = Events(network)
    path = tmp_path / "net.sock"
    listener = network.listen(kind, path)
    guests = [
        SocketGuest(kind, path, f"02:00:00:00:00:0{n}", b"VFKT" if kind == "unixgram" and n == 1 else b"")
        for n in (1, 2)
    ]
    for n, guest in enumerate(guests):
        guest.appear(f"192.168.64.{20 + n}/24")
        assert str(events.next(GuestUp).ip) == f"192.168.64.{20 + n}"
    assert [e.attachment for e in network.endpoints] == [kind, kind]
    listener.close()
    until(lambda: network.endpoint_count == 0, "guests of a datagram socket to go with it")
    for guest in guests:
        guest.close()


def test_stop_removes_sockets_and_guests(tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    network = NatNetwork(NatConfig(dhcp=False, dns=False))
    with network:
        events = Events(network)
        network.create_endpoint("stays")
        network.listen("stream", path)
        guest = SocketGuest("stream", path, ALPHA)
        guest.appear("192.168.64.30/24")
        events.next(GuestUp)
    assert not path.exists()
    assert [e.id for e in network.endpoints] == ["stays"]
    guest.close()


def test_two_cards_with_one_mac(network: NatNetwork, tmp_path: Path) -> None:
    events = Events(network)
    network.listen("stream", tmp_path / "net.sock")
    guests = [SocketGuest("stream", tmp_path / "net.sock", "02:00:00:00:00:01") for _ in range(2)]
    guests[0].appear("192.168.64.20/24")
    assert events.next(GuestUp).endpoint == "vm1"
    guests[1].guest.address = IPv4Interface("192.168.64.21/24")
    for guest in guests:
        guest.close()
    until(lambda: network.endpoint_count == 0, "both to leave")


def test_listen_misuse(network: NatNetwork, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'tcp'"):
        network.listen("tcp", tmp_path / "x")
    with pytest.raises(ConfigError, match="1 to 107 bytes"):
        network.listen("stream", tmp_path / ("x" * 200))
    with pytest.raises(AttachError, match="nowhere"):
        network.listen("stream", tmp_path / "nowhere" / "x")
    network.listen("stream", tmp_path / "x")
    with pytest.raises(AttachError, match="choose another path"):
        network.listen("dgram", tmp_path / "x")
    assert os.path.exists(tmp_path / "x")


async def test_asyncio(network: NatNetwork, tmp_path: Path) -> None:
    listener = await network.alisten("stream", tmp_path / "x")
    assert repr(listener) == f"<Listener listener-1 stream {tmp_path / 'x'}>"
    await listener.aclose()
    assert not (tmp_path / "x").exists()


def test_vhost_user_guests_come_and_go_with_their_connection(tmp_path: Path) -> None:
    with NatNetwork(NatConfig()) as network:
        listener = network.listen("vhost-user", tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(listener.path)
            # GET_FEATURES: version 1, no body.
            front_end.sendall(struct.pack("=3I", 1, 1, 0))
            request, flags, size, features = struct.unpack("=3IQ", front_end.recv(20))
            assert (request, flags, size) == (1, 5, 8)
            assert features >> 32 & 1
        listener.close()
        assert not Path(listener.path).exists()


def test_a_front_end_may_come_again_to_an_endpoint(tmp_path: Path) -> None:
    with NatNetwork(NatConfig()) as network, socket.socket(socket.AF_UNIX) as waiting:
        waiting.bind(str(tmp_path / "s"))
        waiting.listen()
        network.create_endpoint("vm")
        network.attach("vm", "vhost-user", sock=waiting)
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as front_end:
                front_end.settimeout(PATIENCE)
                front_end.connect(str(tmp_path / "s"))
                front_end.sendall(struct.pack("=3I", 15, 1, 0))
                assert len(front_end.recv(20)) == 20
