"""`guestnet nat`: what becomes of each packet of a capture, both ways, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from guestnet import cli
from unit.captures import pcap, pcapng
from unit.packets import check, destination, echo, ethernet, source, tcp, udp

GUEST, OUTSIDE, EXTERNAL = ("192.168.64.2", 50000), ("198.51.100.7", 80), "203.0.113.1"
SECOND = 10**9
START = 1_700_000_000 * SECOND
ARP = bytes(12) + b"\x08\x06" + bytes(28)


def run(folder: Path, source: bytes, *more: str, external: str = EXTERNAL) -> list[bytes]:
    """What OUT has, frame by frame, with the ports of a first run."""
    (folder / "in").write_bytes(source)
    argv = ["nat", "--external", external, *more, "-q", str(folder / "in"), str(folder / "out")]
    assert cli.main(argv) == 0
    return [frame for _, frame in frames((folder / "out").read_bytes())]


def frames(data: bytes) -> list[tuple[int, bytes]]:
    import io

    from guestnet.nat.capture_file import CaptureFile

    return [
        (p.time, bytes(c.data[p.at : p.at + p.length]))
        for c in CaptureFile(io.BytesIO(data), "out").chunks()
        for p in c.packets
    ]


@pytest.mark.parametrize("make", [pcap, pcapng])
def test_out_and_in(tmp_path: Path, make: object) -> None:
    inside = [udp(GUEST, OUTSIDE), tcp(GUEST, OUTSIDE), echo(GUEST[0], OUTSIDE[0], 9)]
    timed = [(START + n * SECOND, ethernet(p)) for n, p in enumerate(inside)]
    data = make([*timed, (START + 4 * SECOND, ARP)])  # type: ignore[operator]
    out = run(tmp_path, data)
    assert len(out) == 4
    for frame in out[:3]:
        check(frame[14:])
        assert source(frame[14:])[0] == EXTERNAL
    assert out[3] == ARP
    if make is pcapng:
        kept = (tmp_path / "out").read_bytes()
        assert kept.count(b"kept") == 4
        assert b"of nobody's business" in kept
    # The other side: answers to what was sent come back to the guest.
    port = source(out[0][14:])[1]
    (tmp_path / "inside").write_bytes(data)
    answers = [
        (START + SECOND // 2, ethernet(udp(OUTSIDE, (EXTERNAL, port)))),
        (START + SECOND // 2, ethernet(udp(("198.51.100.99", 80), (EXTERNAL, port)))),
        (START + 900 * SECOND, ethernet(udp(OUTSIDE, (EXTERNAL, port)))),
    ]
    back = run(tmp_path, make(answers), "--reverse", "--inside", str(tmp_path / "inside"))  # type: ignore[operator]
    # A stranger is filtered, and after 300 s the mapping is gone.
    assert len(back) == 1
    check(back[0][14:])
    assert destination(back[0][14:]) == GUEST


def test_a_capture_of_both_sides(tmp_path: Path) -> None:
    out = run(tmp_path, pcap([(START, ethernet(udp(GUEST, OUTSIDE)))]))
    port = source(out[0][14:])[1]
    both = [(START, ethernet(udp(GUEST, OUTSIDE))), (START + 1000, ethernet(udp(OUTSIDE, (EXTERNAL, port))))]
    assert destination(run(tmp_path, pcap(both))[1][14:]) == GUEST


def test_a_published_port(tmp_path: Path) -> None:
    call = pcap([(START, ethernet(tcp(OUTSIDE, (EXTERNAL, 8080))))])
    out = run(tmp_path, call, "--reverse", "-p", "8080:192.168.64.9:80")
    assert destination(out[0][14:]) == ("192.168.64.9", 80)
    # Without it the call is dropped, and so left out.
    assert run(tmp_path, call, "--reverse") == []


def test_truncated_packets_are_translated_as_far_as_they_go(tmp_path: Path) -> None:
    whole = ethernet(tcp(GUEST, OUTSIDE, data=b"x" * 1000))
    expected = run(tmp_path, pcap([(START, whole)]))[0][:96]
    for make in (pcap, pcapng):
        assert run(tmp_path, make([(START, whole)], snaplen=96)) == [expected]


def test_fragments_that_come_in_any_order_are_all_there(tmp_path: Path) -> None:
    whole = udp(GUEST, OUTSIDE, b"y" * 800, df=False)

    def piece(first: int, last: int, more: bool) -> bytes:
        body = whole[20 + first : 20 + last]
        head = bytearray(whole[:20])
        struct.pack_into("!HHH", head, 2, 20 + len(body), 7, (0x2000 if more else 0) | first // 8)
        struct.pack_into("!H", head, 10, 0)
        from unit.packets import checksum

        struct.pack_into("!H", head, 10, checksum(bytes(head)))
        return ethernet(bytes(head) + bytes(body))

    first, second = piece(0, 400, True), piece(400, 808, False)
    for order in ([first, second], [second, first]):
        out = run(tmp_path, pcap([(START + n, f) for n, f in enumerate(order)]))
        assert sorted(len(f) for f in out) == sorted((len(first), len(second)))
        assert all(f[26:30] == bytes([203, 0, 113, 1]) for f in out)


def test_only_translated(tmp_path: Path) -> None:
    data = pcap(
        [(START, ARP), (START, ethernet(udp(OUTSIDE, GUEST))), (START, ethernet(udp(GUEST, OUTSIDE)))]
    )
    assert len(run(tmp_path, data)) == 3
    assert len(run(tmp_path, data, "--only-translated")) == 1


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = pcap(
        [
            (START, ARP),
            (START, ethernet(udp(GUEST, ("127.0.0.1", 5)))),
            (START, ethernet(udp(GUEST, OUTSIDE))),
        ]
    )
    (tmp_path / "in").write_bytes(data)
    argv = ["nat", "--external", EXTERNAL, str(tmp_path / "in"), str(tmp_path / "out")]
    assert cli.main(argv) == 0
    told = capsys.readouterr().err
    assert "3 packets read" in told
    assert "1 translated" in told
    assert "1 dropped: bad_destination" in told
    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().err)
    assert (report["packets"], report["written"], report["translated"]) == (3, 2, 1)
    assert (report["not_ip"], report["connections"], report["dropped"]) == (1, 1, {"bad_destination": 1})


def test_standard_streams(tmp_path: Path) -> None:
    data = pcap([(START, ethernet(udp(GUEST, OUTSIDE)))])
    out = run(tmp_path, data)
    argv = [sys.executable, "-m", "guestnet", "nat", "-q", "--external", EXTERNAL, "-", "-"]
    piped = subprocess.run(argv, input=data, capture_output=True, check=True, timeout=60)
    assert [frame for _, frame in frames(piped.stdout)] == out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nat", "a", "b"], "--external"),
        (["nat", "--external", "x", "a", "b"], "'x'"),
        (["nat", "--external", EXTERNAL, "--internal", "y", "a", "b"], "'y'"),
        (["nat", "--external", EXTERNAL, "--ports", "9", "a", "b"], "'9'"),
        (["nat", "--external", EXTERNAL, "--ports", "9-3", "a", "b"], "write 3-9"),
        (["nat", "--external", EXTERNAL, "--ports", "0-3", "a", "b"], "65535"),
        (["nat", "--external", EXTERNAL, "--ports", "x-3", "a", "b"], "'x'"),
        (["nat", "--external", EXTERNAL, "--table-size", "0", "a", "b"], "16777214"),
        (["nat", "--external", EXTERNAL, "--table-size", "many", "a", "b"], "'many'"),
        (["nat", "--external", EXTERNAL, "--internal", "192.168.64.9/24", "a", "b"], "write 192.168.64.0/24"),
        (["nat", "--external", EXTERNAL, "a"], "guestnet nat --external IP IN OUT"),
        (["nat"], "guestnet nat --external IP IN OUT"),
        (["nat", "--external", EXTERNAL, "-p", "192.168.64.2:80", "a", "b"], "192.168.64.2"),
        (["nat", "--external", EXTERNAL, "-p", ":192.168.64.2:80", "a", "b"], "which external port"),
        (["nat", "--external", EXTERNAL, "--reverse", "--inside", "-", "-", "b"], "cannot both be stdin"),
        (["nat", "--external", EXTERNAL, "--reverse", "--inside", "", "a", "b"], "inside.pcap"),
        (["nat", "--external", "192.168.64.9", "a", "b"], "192.168.64.9"),
        (["nat", "--external", EXTERNAL, "--inside", "c", "a", "b"], "--reverse"),
        (["nat", "--external", EXTERNAL, "-p", "80:80", "a", "b"], "guest's address"),
        (["nat", "--external", EXTERNAL, "/nowhere/at/all", "b"], "/nowhere/at/all"),
        (["nat", "--external", EXTERNAL, "/dev/null", "b"], "is empty"),
        (["nat", "--external", EXTERNAL, "/", "b"], "directory"),
    ],
)
def test_what_is_refused(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = [str(tmp_path / "b") if word == "b" else word for word in argv]
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not list(tmp_path.iterdir())


def test_a_bad_capture_leaves_the_target_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_bytes(pcap([(START, ethernet(udp(GUEST, OUTSIDE)))])[:-3])
    before = pcapng([])
    (tmp_path / "out").write_bytes(before)
    argv = ["nat", "--external", EXTERNAL, str(tmp_path / "in"), str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "ends in the middle" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    # Nor is a capture written over itself, nor over what is no capture.
    assert cli.main(["nat", "--external", EXTERNAL, str(tmp_path / "in"), str(tmp_path / "in")]) == 2
    (tmp_path / "letter").write_text("Dear reader")
    assert cli.main(["nat", "--external", EXTERNAL, str(tmp_path / "in"), str(tmp_path / "letter")]) == 2
    assert "is not a capture" in capsys.readouterr().err
    assert (tmp_path / "letter").read_text() == "Dear reader"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_leaves_no_unfinished_file(tmp_path: Path, number: signal.Signals) -> None:
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY))
    except OSError:
        pytest.skip("this file system has no files without names")
    argv = [sys.executable, "-m", "guestnet", "nat", "--external", EXTERNAL, "-", str(tmp_path / "out")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        # Enough to be read as its beginning, and not all that is waited for.
        process.stdin.write(pcapng([(START, ethernet(udp(GUEST, OUTSIDE, bytes(1000))))] * 200))
        process.stdin.flush()
        deadline = time.monotonic() + 20
        while not any(str(tmp_path) in target for target in descriptors(process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(20) == -number
    assert not list(tmp_path.iterdir())


def descriptors(pid: int) -> list[str]:
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found
