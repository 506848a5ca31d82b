"""`guestnet up` as a process: its signals, its counters, its files. No guest attaches."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from unit.packets import checksum

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `guestnet up`, with what it says in `said`, and waits until it is ready."""
    started: list[subprocess.Popen[str]] = []

    def begin(*options: str, stdout: int | IO[str] = subprocess.DEVNULL) -> subprocess.Popen[str]:
        said = (tmp_path / "said").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "guestnet", "up", "--stream", str(tmp_path / "net.sock"), *options],
            stderr=said,
            stdout=stdout,
            text=True,
        )
        said.close()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def said(folder: Path, word: str) -> str:
    """What the process has said, once it matches `word`."""
    deadline = time.monotonic() + 20
    while not re.search(word, text := (folder / "said").read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)
    return text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_to_stop_leaves_no_socket(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start("--pid-file", str(tmp_path / "pid"))
    said(tmp_path, "is up")
    process.send_signal(number)
    assert process.wait(20) == 0
    assert f"stopping on {number.name}" in said(tmp_path, "stopping")
    assert os.listdir(tmp_path) == ["said"]


_NAMED = """
import sys
from guestnet.cli import main
from guestnet.runtime.joining import network_socket
network_socket.directory = lambda: sys.argv[1]
sys.exit(main(["up", "--name", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("starts", [True, False])
def test_a_named_network_leaves_no_empty_directory(tmp_path: Path, starts: bool) -> None:
    folder = tmp_path / "guestnet"
    reader, writer = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = 0 if starts else taken.getsockname()[1]
        words = [sys.executable, "-c", _NAMED, str(folder), "lab", "--ready-fd", str(writer)]
        with subprocess.Popen(
            [*words, "-p", f"127.0.0.1:{port}:vm1:80"], pass_fds=[writer], stderr=subprocess.DEVNULL
        ) as process:
            os.close(writer)
            assert bool(os.read(reader, 64)) == starts
            os.close(reader)
            assert not starts or os.listdir(folder) == ["lab.sock"]
            process.terminate()
            assert process.wait(20) == (0 if starts else 125)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGHUP, "SIGHUP is ignored: without --policy nothing is read again"),
        (signal.SIGUSR2, "SIGUSR2 is ignored: SIGTERM stops guestnet"),
        (signal.SIGALRM, "SIGALRM is ignored"),
        (signal.SIGIO, "is ignored"),
        (signal.SIGRTMIN, "Real-time signal 0 is ignored"),
        (signal.SIGRTMAX, "is ignored"),
        (signal.SIGUSR1, "io polls|no frame was carried yet"),
    ],
)
def test_other_signals_end_nothing(start: Start, tmp_path: Path, number: int, word: str) -> None:
    process = start()
    said(tmp_path, "is up")
    process.send_signal(number)
    said(tmp_path, word)
    assert process.poll() is None
    assert (tmp_path / "net.sock").exists()
    process.terminate()
    assert process.wait(20) == 0


def test_counters_on_request_for_programs(start: Start, tmp_path: Path) -> None:
    process = start("--json", stdout=subprocess.PIPE)
    assert process.stdout is not None
    events = (json.loads(line) for line in process.stdout)
    while next(events)["event"] != "ready":
        pass
    process.send_signal(signal.SIGUSR1)
    stats = next(events)
    assert (stats["event"], stats["rx_frames"]) == ("stats", 0)
    assert "policy" in stats["drops"]
    process.send_signal(signal.SIGHUP)
    assert next(events) == {"event": "signal_ignored", "signal": "SIGHUP"}
    process.terminate()
    assert next(events)["event"] == "stopping"
    assert process.wait(20) == 0
    process.stdout.close()


def test_a_terminal_that_is_gone_stops_it(tmp_path: Path) -> None:
    """That hangup comes from the kernel; one that somebody sends means a reload."""
    path = tmp_path / "net.sock"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(sys.executable, [sys.executable, "-m", "guestnet", "up", "--stream", str(path)])
    text = ""
    while "is up" not in text:
        text += os.read(terminal, 4096).decode()
    os.close(terminal)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert not path.exists()


def test_counters_come_after_the_end(start: Start, tmp_path: Path) -> None:
    process = start("--stats")
    said(tmp_path, "is up")
    process.terminate()
    assert process.wait(20) == 0
    lines = said(tmp_path, "io polls|no frame was carried").splitlines()
    assert lines.index("guestnet: stopping on SIGTERM") < next(
        number for number, line in enumerate(lines) if re.match("io polls|guestnet: no frame", line)
    )


def test_a_capture_to_stdout(start: Start, tmp_path: Path) -> None:
    with (tmp_path / "capture").open("w+") as capture:
        process = start("--pcap", "-", stdout=capture)
        said(tmp_path, "is up")
        process.terminate()
        assert process.wait(20) == 0
    assert (tmp_path / "capture").read_bytes()[:4] == b"\x0a\x0d\x0d\x0a"


def test_a_file_that_is_no_capture_is_not_overwritten(start: Start, tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text("Dear reader")
    assert start("--pcap", str(letter)).wait(20) == 2
    assert "is not a pcapng capture" in said(tmp_path, "guestnet: ")
    assert letter.read_text() == "Dear reader"
    assert not (tmp_path / "net.sock").exists()


def test_an_earlier_capture_is_replaced_with_a_word(start: Start, tmp_path: Path) -> None:
    capture = tmp_path / "seen.pcapng"
    for first in (True, False):
        process = start("--pcap", str(capture))
        told = said(tmp_path, "is up")
        assert (f"Note: the capture {str(capture)!r} exists and is replaced." in told) is not first
        process.terminate()
        assert process.wait(20) == 0
        assert capture.read_bytes()[:4] == b"\x0a\x0d\x0d\x0a"


def test_ports_of_both_families_are_printed(start: Start, tmp_path: Path) -> None:
    start("-p", "80", "--publish-address", "127.0.0.1", "-p", "0.0.0.0:0:vm1:81", "-p", "[::1]::vm1:82")
    text = said(tmp_path, "is up")
    assert "published 127.0.0.1:" in text
    assert "/tcp -> vm1:81" in text
    assert "published [::1]:" in text


def test_all_addresses_of_a_port_are_printed(start: Start, tmp_path: Path) -> None:
    start("-p", "0:vm1:80")
    text = said(tmp_path, "is up")
    assert " and [::]:" in text or not os.path.exists("/proc/net/if_inet6")


@pytest.mark.parametrize(("low", "words"), [("192.0.2.9:40000-40001", "no address 192.0.2.9")])
def test_ports_that_guests_could_never_open_are_refused(
    start: Start, tmp_path: Path, low: str, words: str
) -> None:
    assert start("--pcp", low).wait(20) == 125
    text = said(tmp_path, words)
    assert "Guests cannot open the ports of --pcp" in text
    assert len(text.splitlines()) == 1


class Machine:
    """A guest on a stream socket, as QEMU frames it."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))

    def ask_for_gateway(self) -> None:
        mac = bytes.fromhex("525400000009")
        request = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
        frame = b"\xff" * 6 + mac + b"\x08\x06" + request + mac + bytes([192, 168, 64, 9]) + bytes(6)
        frame += bytes([192, 168, 64, 1])
        self.sock.sendall(struct.pack("!I", len(frame)) + frame)

    def answer(self) -> bytes:
        with self.sock.makefile("rb") as file:
            (length,) = struct.unpack("!I", file.read(4))
            return file.read(length)


def test_a_machine_that_connects_again_after_a_restart_is_served_as_before(
    start: Start, tmp_path: Path
) -> None:
    """What QEMU does with reconnect-ms: it tries until the socket is there again."""
    options = ("--lease", "52:54:00:00:00:09=192.168.64.9,web")
    for _ in range(2):
        process = start(*options)
        said(tmp_path, "is up")
        machine = Machine(tmp_path / "net.sock")
        machine.ask_for_gateway()
        assert machine.answer()[28:32] == bytes([192, 168, 64, 1])
        assert "web came" in said(tmp_path, "came")
        process.terminate()
        assert process.wait(20) == 0
        assert machine.sock.recv(1) == b"", "the machine sees the end, and connects again"
        machine.sock.close()


def test_why_a_guest_left_is_said_without_numbers_of_errors(start: Start, tmp_path: Path) -> None:
    start()
    said(tmp_path, "is up")
    machine = Machine(tmp_path / "net.sock")
    machine.ask_for_gateway()
    said(tmp_path, "came")
    machine.sock.recv(1, socket.MSG_PEEK)
    machine.sock.close()  # with an answer that nobody has read: a reset
    assert "os error" not in said(tmp_path, "Connection reset by peer")


def test_a_refusal_is_said_with_verbose(start: Start, tmp_path: Path) -> None:
    start("-v")
    said(tmp_path, "is up")
    machine = Machine(tmp_path / "net.sock")
    machine.ask_for_gateway()
    gateway = machine.answer()[6:12]
    mac, source, target = bytes.fromhex("525400000009"), [192, 168, 64, 9], [169, 254, 169, 254]
    header = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + bytes(source + target))
    header[10:12] = struct.pack("!H", checksum(bytes(header)))
    syn = bytearray(struct.pack("!HHIIBBHHH", 50000, 80, 1, 0, 0x50, 2, 8192, 0, 0))
    pseudo = bytes(source + target) + struct.pack("!HH", 6, len(syn))
    syn[16:18] = struct.pack("!H", checksum(pseudo + bytes(syn)))
    frame = gateway + mac + b"\x08\x00" + bytes(header) + bytes(syn)
    machine.sock.sendall(struct.pack("!I", len(frame)) + frame)
    assert "refused TCP to 169.254.169.254:80" in said(tmp_path, "refused")
    assert "frames dropped: " in said(tmp_path, "frames dropped")
    machine.sock.close()
