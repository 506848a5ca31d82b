"""Guests in memory talk to each other, to the host's loopback and to clients of published ports."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import threading
from array import array
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from guestnet import (
    AttachError,
    ConfigError,
    EndpointNotFound,
    ForwardNotFound,
    NatConfig,
    NatNetwork,
    NotRunning,
    PortInUse,
    UnsupportedError,
)
from guestnet.model.events import FlowClosed, FlowDenied, FlowOpened, GuestUp
from guestnet.model.ipam import parse_mac
from guestnet.runtime import capture
from guestnet.testing.guest import GuestError
from guestnet.testing.tcp import Connection

from ..captures import interfaces
from .conftest import PATIENCE, AddGuest, Events, add_memory_guest, fetch, until

LOOPBACK = "192.168.64.254"


def read_all(connection: Connection) -> bytes:
    data = b""
    while more := connection.recv(65536):
        data += more
    return data


def answer(text: bytes) -> Callable[[Connection], None]:
    def handle(connection: Connection) -> None:
        connection.send(text + connection.recv(100))
        connection.close()

    return handle


def test_a_guest_in_memory_sends_any_bytes_in_one_piece(network: NatNetwork) -> None:
    endpoint = network.create_endpoint("vm1")
    guest = network.attach("vm1", "memory")
    request = b"\0\1\x08\0\6\4\0\1" + parse_mac(endpoint.mac) + endpoint.ip.packed + bytes(6)
    frame = b"\xff" * 6 + parse_mac(endpoint.mac) + b"\x08\x06" + request + network.gateway.packed
    copy = (ctypes.c_char * len(frame)).from_buffer_copy(frame)
    for given in (frame, bytearray(frame), memoryview(frame), array("B", frame), copy):
        guest.send(given)
        answer = guest.recv(PATIENCE)
        assert answer is not None
        assert answer[12:22] == b"\x08\x06\0\1\x08\0\6\4\0\2", "ARP, a reply"
    with pytest.raises(TypeError):
        guest.send("text")  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [2, 5])
def test_guests_of_several_workers(workers: int, echo: int) -> None:
    config = NatConfig(dhcp=False, dns=False, host_loopback=True, workers=workers)
    with NatNetwork(config) as network:
        one, two = (add_memory_guest(network, name) for name in ("one", "two"))
        (there,) = network.get_endpoint("two").addresses  # type: ignore[union-attr]
        two.serve(80, answer(b"two says "))
        connection = one.connect(str(there), 80)
        connection.send(b"hello")
        assert read_all(connection) == b"two says hello"
        for guest in (one, two):
            connection = guest.connect(LOOPBACK, echo)
            connection.send(b"x" * 5000)
            connection.close()
            assert read_all(connection) == b"x" * 5000
        until(lambda: sum(s.rx_frames > 5 for s in network.worker_stats()) == 2, "both workers to work")
        assert len(network.worker_stats()) == workers
        assert set(network.endpoint_stats()) == {"one", "two"}
        network.remove_endpoint("one")
        two.ping(str(network.gateway))
    assert network.worker_stats() == []


def test_to_the_hosts_loopback_and_back(network: NatNetwork, add_guest: AddGuest, echo: int) -> None:
    guest = add_guest("vm1")
    data = random.Random(1).randbytes(400_000)
    connection = guest.connect(LOOPBACK, echo)
    sender = threading.Thread(target=lambda: (connection.send(data), connection.close()))
    sender.start()
    assert read_all(connection) == data
    sender.join()
    (flow,) = network.flows() or [None]
    if flow is not None:  # it is gone once both sides have closed
        assert (flow.endpoint, flow.protocol, flow.inbound) == ("vm1", "tcp", False)
    until(lambda: network.stats().flows_closed == 1, "the flow to be counted")
    stats = network.stats()
    assert stats.rx_bytes > len(data)
    assert (stats - stats).rx_bytes == 0
    assert stats.as_dict()["drops"].keys() == stats.drops.keys()
    assert network.endpoint_stats()["vm1"].rx_frames > 0


def test_refused_is_seen_as_such(add_guest: AddGuest) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(GuestError, match="refused"):
            add_guest("vm1").connect(LOOPBACK, nobody.getsockname()[1])


def test_guests_reach_each_other(add_guest: AddGuest) -> None:
    one, two = add_guest("vm1"), add_guest("vm2")
    two.serve(7, answer(b"hello "))
    connection = one.connect("192.168.64.3", 7)
    connection.send(b"world")
    assert read_all(connection) == b"hello world"


def test_echo(network: NatNetwork, add_guest: AddGuest) -> None:
    one = add_guest("vm1")
    add_guest("vm2")
    assert one.ping("192.168.64.3") < PATIENCE
    assert one.ping(str(network.gateway), bytes(1000)) < PATIENCE


def test_published(network: NatNetwork, add_guest: AddGuest) -> None:
    add_guest("vm1").serve(80, answer(b"hello "))
    forward = network.publish("127.0.0.1:0:80")
    assert str(forward) == f"127.0.0.1:{forward.host_port}/tcp -> vm1:80"
    assert network.forwards == [forward]
    assert fetch(forward.host_port, b"you") == b"hello you"
    network.unpublish(forward)
    with pytest.raises(ConnectionRefusedError):
        fetch(forward.host_port)
    with pytest.raises(ForwardNotFound):
        network.unpublish(forward)
    assert network.forwards == []


def publish_three(network: NatNetwork) -> int:
    """Publishes three ports in a row; others may take one of them meanwhile, so some are tried."""
    for _ in range(20):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            base: int = probe.getsockname()[1] - 1
        try:
            network.publish(f"127.0.0.1:{base}-{base + 2}:vm1:90-92")
        except PortInUse:
            continue
        return base
    raise AssertionError("no three ports in a row are free")


def test_a_published_range(network: NatNetwork, add_guest: AddGuest) -> None:
    guest = add_guest("vm1")
    for n in range(3):
        guest.serve(90 + n, answer(b"%d " % n))
    base = publish_three(network)
    assert [fetch(base + n, b"x") for n in range(3)] == [b"0 x", b"1 x", b"2 x"]
    with pytest.raises(PortInUse, match=str(base + 1)):
        network.publish(f"127.0.0.1:{base + 1}:80")


def test_no_guest_gets_the_ports_of_another_by_its_name(network: NatNetwork, add_guest: AddGuest) -> None:
    forward = network.publish("127.0.0.1:0:web:80")
    add_guest("vm1").serve(80, answer(b"liar "))
    liar = network.get_endpoint("vm1")
    assert liar is not None
    network._registry.note_hostname(liar, parse_mac(liar.mac), "web")
    assert liar.hostname == "web"
    another = network.publish("127.0.0.1:0:web:80")
    for one in (forward, another):
        with pytest.raises(ConnectionResetError):
            fetch(one.host_port)


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.64.0", "192.168.64.255", "8.8.8.8"])
def test_no_guest_can_have_that_address(network: NatNetwork, address: str) -> None:
    with pytest.raises(ConfigError, match=address):
        network.publish(f"127.0.0.1:0:{address}:80")
    assert network.forwards == []


def test_published_before_the_guest_is_there(network: NatNetwork, add_guest: AddGuest) -> None:
    by_name = network.publish("127.0.0.1:0:vm2:80")
    by_address = network.publish("127.0.0.1:0:192.168.64.3:80")
    only = network.publish("127.0.0.1:0:80")
    for forward in (by_name, by_address, only):
        with pytest.raises(ConnectionResetError):
            fetch(forward.host_port)
    add_guest("vm1").serve(80, answer(b"one "))
    assert fetch(only.host_port, b"x") == b"one x"
    add_guest("vm2").serve(80, answer(b"two "))
    for forward, text in ((by_name, b"two x"), (by_address, b"two x"), (only, b"one x")):
        assert fetch(forward.host_port, b"x") == text
    with pytest.raises(ConfigError, match="which guest"):
        network.publish("127.0.0.1:0:80")
    network.remove_endpoint("vm2")
    with pytest.raises(ConnectionResetError):
        fetch(by_name.host_port)
    network.remove_endpoint("vm1")
    add_guest("vm3").serve(80, answer(b"three "))
    assert fetch(only.host_port, b"x") == b"three x", "the only guest is another one now"


def test_published_udp(network: NatNetwork, add_guest: AddGuest) -> None:
    guest = add_guest("vm1")
    forward = network.publish("127.0.0.1:0:vm1:5000/udp")
    guest._datagrams[5000] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(b"question", ("127.0.0.1", forward.host_port))
        with guest._changed:
            assert guest._changed.wait_for(lambda: guest._datagrams[5000], PATIENCE)
        assert guest._datagrams[5000] == [b"question"]
        # A client on the loopback is the gateway for the guest.
        guest.send_udp("192.168.64.1", client.getsockname()[1], 5000, b"answer")
        assert client.recv(100) == b"answer"


def test_ipv6_guests_cannot_be_published_to_yet(network: NatNetwork) -> None:
    with pytest.raises(UnsupportedError, match="fd00::2"):
        network.publish("127.0.0.1:0:[fd00::2]:80")


def test_attach_misuse(network: NatNetwork) -> None:
    network.create_endpoint("vm1")
    with pytest.raises(EndpointNotFound, match="'vm2'"):
        network.attach("vm2", "memory")
    with pytest.raises(ConfigError, match="'carrier pigeon'"):
        network.attach("vm1", "carrier pigeon", fd=3)
    with pytest.raises(ConfigError, match="fd or sock"):
        network.attach("vm1", "stream")
    with pytest.raises(ConfigError, match="on_frame"):
        network.attach("vm1", "stream", fd=0, on_frame=print)
    with pytest.raises(ConfigError, match="no descriptor"):
        network.attach("vm1", "memory", fd=0)  # type: ignore[call-overload]
    with pytest.raises(AttachError, match="999999"):
        network.attach("vm1", "stream", fd=999999)
    with pytest.raises(AttachError):
        network.attach("vm1", "stream", fd=-1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wrong:
        for kind in ("tap", "stream"):
            with pytest.raises(AttachError):
                network.attach("vm1", kind, sock=wrong)
        assert wrong.fileno() >= 0, "what is refused stays the caller's"
    network.attach("vm1", "memory")
    with pytest.raises(AttachError, match="memory"):
        network.attach("vm1", "memory")


def who_is_the_gateway(network: NatNetwork) -> bytes:
    """An ARP request of the first guest, whose MAC is 02:00:00:00:00:01."""
    ask = bytes.fromhex("ffffffffffff02000000000108060001080006040001020000000001")
    return ask + IPv4Address("192.168.64.2").packed + bytes(6) + network.gateway.packed


def test_frames_wait_for_recv(network: NatNetwork) -> None:
    network.create_endpoint("vm1", mac="02:00:00:00:00:01")
    attachment = network.attach("vm1", "memory")
    attachment.send(who_is_the_gateway(network))
    frame = attachment.recv(PATIENCE)
    assert frame is not None
    assert frame[12:14] == b"\x08\x06"
    assert attachment.recv(0) is None


def test_events_of_flows(network: NatNetwork, add_guest: AddGuest, echo: int) -> None:
    quiet, events = Events(network), Events(network, flows=True)
    guest = add_guest("vm1")
    assert events.next(GuestUp).endpoint == "vm1"
    connection = guest.connect(LOOPBACK, echo)
    opened = events.next(FlowOpened)
    assert (opened.endpoint, opened.remote) == ("vm1", (IPv4Address(LOOPBACK), echo))
    connection.send(b"12345")
    connection.recv(5)
    connection.close()
    closed = events.next(FlowClosed)
    assert closed.endpoint == opened.endpoint
    assert closed.flow == opened.flow
    assert closed.bytes_out == 5
    kinds = {quiet.queue.get_nowait().kind for _ in range(quiet.queue.qsize())}
    assert not kinds & {"flow_opened", "flow_closed"}


def test_callbacks_can_be_ended(network: NatNetwork) -> None:
    seen: list[str] = []
    end = network.on_event(lambda event: seen.append(event.kind))
    end()
    end()
    network.create_endpoint("vm1")
    network.attach("vm1", "memory")
    assert seen == []


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_fails_costs_the_guests_nothing(
    error: type[BaseException], network: NatNetwork, add_guest: AddGuest, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise error("on purpose")

    network.on_event(fail)
    network.create_endpoint("vm1", mac="02:00:00:00:00:01")
    attachment = network.attach("vm1", "memory", on_frame=fail)
    attachment.send(who_is_the_gateway(network))
    other = add_guest("vm2")
    other.ping(str(network.gateway))
    until(lambda: "on_frame of 'vm1' failed" in caplog.text, "the answer that on_frame fails at")
    assert "a callback for events failed" in caplog.text
    assert network.flows() is not None


def test_capture(network: NatNetwork, add_guest: AddGuest, echo: int, tmp_path: Path) -> None:
    path = tmp_path / "all.pcapng"
    network.start_capture(path)
    connection = add_guest("vm1").connect(LOOPBACK, echo)
    connection.send(b"marked bytes")
    connection.recv(100)
    network.stop_capture()
    content = path.read_bytes()
    assert content[:4] == b"\x0a\x0d\x0d\x0a"
    assert content.count(b"marked bytes") >= 2
    assert path.stat().st_mode & 0o777 == 0o600
    assert [name for name, _ in interfaces(content)] == ["vm1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_capture_on_a_full_disk_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with NatNetwork(NatConfig(capture="/dev/full")) as network:
        network.create_endpoint("vm1")
    assert "the capture" in caplog.text
    assert caplog.text.count("cannot be written") + caplog.text.count("could not be written") == 1


def test_host_only_lets_nothing_out() -> None:
    with NatNetwork(NatConfig(mode="host_only", dhcp=False, dns=False)) as network:
        seen = Events(network, flows=True)
        add_memory_guest(network, "vm1").send_udp("192.0.2.1", 53, 5000, b"x")
        assert seen.next(FlowDenied).reason == "policy"
        until(lambda: network.stats().drops["policy"] == 1, "the drop to be counted")


@pytest.mark.parametrize("end", [NatNetwork.stop, lambda network: network.remove_endpoint("vm1")])
def test_who_waits_for_frames_hears_of_the_end(
    network: NatNetwork, end: Callable[[NatNetwork], None]
) -> None:
    network.create_endpoint("vm1")
    attachment = network.attach("vm1", "memory")
    heard: list[str] = []

    def wait() -> None:
        try:
            while attachment.recv():
                pass  # the network's own, if there are any
        except NotRunning as error:
            heard.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    end(network)
    waiting.join(PATIENCE)
    assert heard
    with pytest.raises(NotRunning, match="vm1"):
        attachment.send(bytes(60))
    with pytest.raises(NotRunning, match="vm1"):
        attachment.recv(timeout=0)


def test_the_end_does_not_wait_long_for_the_reader_of_a_capture(
    network: NatNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe is full, and nobody reads it: it has less time than a file."""
    monkeypatch.setattr(capture, "_FILE_SECONDS", 3600.0)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(reader, bytes(4096))
        network.start_capture(path)
        network.stop()
        assert not network.is_running
    finally:
        os.close(reader)


def test_a_capture_to_a_pipe_that_nobody_reads(network: NatNetwork, tmp_path: Path) -> None:
    """To wait for a reader is what nothing could interrupt."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="start who reads the pipe first"):
        network.start_capture(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        network.start_capture(path)
        network.stop_capture()
        assert os.read(reader, 4) == b"\x0a\x0d\x0d\x0a"  # a section header of pcapng
    finally:
        os.close(reader)
