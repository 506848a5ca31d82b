"""The attachments' own framing, spoken byte by byte by clients that trust nothing."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, Process, frames
from lab.frames import BROADCAST, GATEWAY4, Seen

MACS = [bytes.fromhex(f"5254000000{i:02x}") for i in range(1, 9)]


@pytest.fixture
def network(lab: Lab, guestnet: Callable[..., Process]) -> Iterator[dict[str, str]]:
    """A network with a listener of each kind; their paths."""
    paths = {kind: str(lab.dir / f"{kind}.sock") for kind in ("stream", "dgram", "unixgram")}
    options = [word for kind, path in paths.items() for word in (f"--{kind}", path)]
    process = guestnet("up", "--json", *options, ready='"event": "ready"')
    yield paths
    assert process.running, process.output


class Stream:
    """QEMU's stream framing: a 4-byte big-endian length, then the frame."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(path)

    @staticmethod
    def framed(frame: bytes) -> bytes:
        return struct.pack("!I", len(frame)) + frame

    def send(self, frame: bytes) -> None:
        self.sock.sendall(self.framed(frame))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise ConnectionError("closed")
            data += more
        return data

    def receive(self) -> bytes:
        return self._exactly(struct.unpack("!I", self._exactly(4))[0])

    def close(self) -> None:
        self.sock.close()


class Datagram:
    """One bare frame per datagram, from a bound socket; vfkit says VFKT first."""

    def __init__(self, path: str, own: Path, magic: bytes = b"") -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.settimeout(10)
        self.own = own
        self.sock.bind(str(own))
        # guestnet runs as an ordinary user here and has to reach a socket that root made.
        own.chmod(0o777)
        self.sock.connect(path)
        if magic:
            self.sock.send(magic)

    def send(self, frame: bytes) -> None:
        self.sock.send(frame)

    def receive(self) -> bytes:
        return self.sock.recv(65536 + 18)

    def close(self) -> None:
        self.sock.close()
        self.own.unlink(missing_ok=True)


Client = Stream | Datagram


def expect(client: Client, what: Callable[[Seen], object]) -> Seen:
    """The first frame that `what` finds something in; others are passed over."""
    for _ in range(100):
        seen = Seen.of(client.receive())
        if what(seen) is not None:
            return seen
    raise AssertionError("100 frames and none of them the one")


def offered(client: Client, mac: bytes) -> str:
    client.send(frames.discover(mac))
    address = expect(client, lambda s: s.offered).offered
    assert address is not None
    return address


def gateway_mac(client: Client, mac: bytes, address: str) -> bytes:
    client.send(frames.arp(mac, address, GATEWAY4))
    seen = expect(client, lambda s: s.arp_reply_from)
    assert seen.arp_reply_from == GATEWAY4
    assert seen.dst == mac
    return seen.src


def check_alive(client: Client, mac: bytes) -> str:
    """The guest gets an address offered, finds the gateway, and hears its echo."""
    address = offered(client, mac)
    gateway = gateway_mac(client, mac, address)
    client.send(frames.echo(mac, gateway, address, GATEWAY4, 321))
    assert expect(client, lambda s: s.echo_reply).echo_reply == 321
    return address


@pytest.fixture
def open_client(network: dict[str, str], lab: Lab) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def open_one(kind: str) -> Client:
        client: Client
        if kind == "stream":
            client = Stream(network["stream"])
        else:
            magic = b"VFKT" if kind == "vfkit" else b""
            path = network["dgram" if kind == "dgram" else "unixgram"]
            client = Datagram(path, lab.dir / f"c{len(made)}.{os.getpid()}", magic)
        made.append(client)
        return client

    yield open_one
    for client in made:
        client.close()


KINDS = ["stream", "dgram", "unixgram", "vfkit"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_guest_lives(open_client: Callable[..., Client], kind: str) -> None:
    check_alive(open_client(kind), MACS[0])


@pytest.mark.parametrize("kind", KINDS)
def test_guests_of_one_listener_reach_each_other(open_client: Callable[..., Client], kind: str) -> None:
    first, second = open_client(kind), open_client(kind)
    one, two = check_alive(first, MACS[1]), check_alive(second, MACS[2])
    assert one != two
    first.send(frames.arp(MACS[1], one, two))
    expect(second, lambda s: True if s.kind == 0x0806 and s.src == MACS[1] else None)
    second.send(frames.echo(MACS[2], MACS[1], two, one, 5))
    heard = expect(first, lambda s: True if s.kind == 0x0800 and s.src == MACS[2] else None)
    assert heard.dst == MACS[1]


def test_every_byte_on_its_own(open_client: Callable[..., Client]) -> None:
    client = open_client("stream")
    assert isinstance(client, Stream)
    address = offered(client, MACS[3])
    for byte in Stream.framed(frames.arp(MACS[3], address, GATEWAY4)):
        client.sock.sendall(bytes([byte]))
    assert expect(client, lambda s: s.arp_reply_from).arp_reply_from == GATEWAY4


def test_many_frames_in_one_write(open_client: Callable[..., Client]) -> None:
    client = open_client("stream")
    assert isinstance(client, Stream)
    address = offered(client, MACS[3])
    gateway = gateway_mac(client, MACS[3], address)
    echoes = [frames.echo(MACS[3], gateway, address, GATEWAY4, i) for i in range(50)]
    client.sock.sendall(b"".join(map(Stream.framed, echoes)))
    assert [expect(client, lambda s: s.echo_reply).echo_reply for _ in echoes] == list(range(50))


@pytest.mark.parametrize("length", [65536 + 4096 + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_oversized_length_ends_that_guest_alone(open_client: Callable[..., Client], length: int) -> None:
    other, bad = open_client("stream"), open_client("stream")
    assert isinstance(bad, Stream)
    check_alive(other, MACS[4])
    bad.sock.sendall(struct.pack("!I", length) + bytes(100))
    with pytest.raises(ConnectionError):
        expect(bad, lambda s: None)
    check_alive(other, MACS[4])


def test_a_peer_that_dies_in_the_middle_of_a_frame(open_client: Callable[..., Client]) -> None:
    other, bad = open_client("stream"), open_client("stream")
    assert isinstance(bad, Stream)
    bad.sock.sendall(struct.pack("!I", 1000) + bytes(500))
    bad.close()
    check_alive(other, MACS[4])


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_is_dropped(open_client: Callable[..., Client], kind: str) -> None:
    """Truncated, tagged, self-contradicting and random frames; the guest itself goes on."""
    client = open_client(kind)
    mac = MACS[5]
    address = offered(client, mac)
    gateway = gateway_mac(client, mac, address)
    good = frames.echo(mac, gateway, address, GATEWAY4)
    bad = [good[:i] for i in (1, 6, 13, 14, 20, 33, 34, 40)]
    bad += [good[:12] + b"\x81\x00\x00\x01" + good[12:], good[:14] + b"\x4f" + good[15:]]
    bad += [good[:16] + n.to_bytes(2, "big") + good[18:] for n in (0, 19, 60000, 65535)]
    bad += [BROADCAST + mac + b"\x08\x06" + os.urandom(28), gateway + BROADCAST + b"\x08\x00" + good[14:]]
    bad += [gateway + mac + b"\x08\x00" + os.urandom(60) for _ in range(500)]
    for frame in bad:
        client.send(frame)
    if kind == "stream":
        client.send(b"")
    assert check_alive(client, mac) == address


def test_a_guest_that_does_not_read_blocks_no_other(open_client: Callable[..., Client]) -> None:
    other, deaf = open_client("stream"), open_client("stream")
    assert isinstance(deaf, Stream)
    mac = MACS[6]
    address = offered(deaf, mac)
    gateway = gateway_mac(deaf, mac, address)
    deaf.sock.setblocking(False)
    echoes = b"".join(Stream.framed(frames.echo(mac, gateway, address, GATEWAY4, i)) for i in range(1000))
    try:
        for _ in range(200):
            deaf.sock.send(echoes)
    except BlockingIOError:
        pass
    check_alive(other, MACS[7])


def test_a_guest_that_reads_byte_by_byte_gets_whole_frames(open_client: Callable[..., Client]) -> None:
    """Its queue fills meanwhile, and what is dropped is dropped whole: the framing stays right."""
    other, slow = open_client("stream"), open_client("stream")
    assert isinstance(slow, Stream)
    mac = MACS[6]
    address = offered(slow, mac)
    gateway = gateway_mac(slow, mac, address)
    for first in range(0, 20_000, 1000):
        numbers = range(first, first + 1000)
        slow.sock.sendall(
            b"".join(Stream.framed(frames.echo(mac, gateway, address, GATEWAY4, n)) for n in numbers)
        )
    check_alive(other, MACS[7])
    # A last one that comes behind all that waited, when there is room again.
    heard: list[int] = []
    while not heard or heard[-1] != 65535:
        data = b""
        while len(data) < 4 or len(data) < 4 + struct.unpack_from("!I", data)[0]:
            data += slow.sock.recv(1)
        number = Seen.of(data[4:]).echo_reply
        assert number is not None
        heard.append(number)
        if len(heard) % 100 == 0:
            slow.send(frames.echo(mac, gateway, address, GATEWAY4, 65535))
    assert len(heard) > 500
    assert heard[:-1] == sorted(set(heard[:-1]))


def test_a_place_is_free_again(open_client: Callable[..., Client], network: dict[str, str]) -> None:
    """More guests than a /24 holds, one after another."""
    for _ in range(300):
        client = Stream(network["stream"])
        offered(client, MACS[0])
        client.close()
    check_alive(open_client("stream"), MACS[0])


def test_a_published_port_follows_its_machine_over_a_restart(
    lab: Lab, guestnet: Callable[..., Process]
) -> None:
    """`vm1` goes by order of arrival; after a restart the machines come in another order."""
    path = str(lab.dir / "restart.sock")
    options = ("up", "--json", "--stream", path, "-p", "8095:vm1:80")
    first, second = MACS[:2]

    def come(*macs: bytes) -> dict[bytes, str]:
        process = guestnet(*options, ready='"event": "ready"')
        found, clients = {}, []
        for mac in macs:
            clients.append(Stream(path))
            found[mac] = offered(clients[-1], mac)
            process.wait_line(f'"event": "guest_up".*{mac.hex(":")}')
        text = process.output
        process.stop()
        for client in clients:
            client.close()
        names = {
            mac: next(n for n in ("vm1", "vm2") if f'"{n}", "mac": "{mac.hex(":")}"' in text) for mac in macs
        }
        return {mac: f"{names[mac]} {found[mac]}" for mac in macs}

    before = come(first, second)
    assert before[first].startswith("vm1")
    after = come(second, first)
    assert after[first] == before[first]
    assert after[second].startswith("vm2")
