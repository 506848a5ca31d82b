"""Captures of some size through `guestnet nat`, there and back; tshark is the judge of their checksums.

`GUESTNET_CAPTURE_MB=1024` makes each capture that large, for a look at speed (`pytest -s`) and memory: three
times that much room is needed where pytest keeps its files.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from lab import need
from lab.runner import GUESTNET
from unit.captures import block
from unit.packets import echo, ethernet, tcp, udp

MEGABYTES = int(os.environ.get("GUESTNET_CAPTURE_MB", "32"))
LIMIT = 100 + MEGABYTES
"""Seconds for a program that reads a capture: tshark is the slow one."""
MEMORY_MB = 150
"""What a run may take at most, however long the capture. A chunk of it is 4 MB."""
ECHO, ECHO_REPLY = 8, 0
ETHERNET_HEADER = 14

pytestmark = pytest.mark.timeout(10 * LIMIT)


def frames() -> Iterator[bytes]:
    """Packets of a few thousand conversations, in random order, without end."""
    rng = random.Random(5)
    known = []
    for n in range(3000):
        guest = (f"192.168.64.{rng.randrange(2, 250)}", rng.randrange(1024, 65536))
        outside = (f"198.51.100.{rng.randrange(1, 250)}", rng.choice((53, 80, 443)))
        body = rng.randbytes(rng.choice((0, 1, 18, 201, 1400, 1400)))
        match n % 3:
            case 0:
                packet = udp(guest, outside, body)
            case 1:
                packet = tcp(guest, outside, 16, body)
            case _:
                packet = echo(guest[0], outside[0], guest[1])
        known.append(ethernet(packet))
    while True:
        yield rng.choice(known)


class Pcap:
    """How a pcap is written and read."""

    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 1)
    before = 16
    """Bytes of a record before its frame."""

    @staticmethod
    def record(frame: bytes, micros: int) -> bytes:
        return struct.pack("<IIII", *divmod(micros, 1_000_000), len(frame), len(frame)) + frame

    @staticmethod
    def read(file: BinaryIO) -> Iterator[bytes]:
        file.seek(len(Pcap.head))
        while head := file.read(16):
            yield file.read(struct.unpack_from("<I", head, 8)[0])


class Pcapng:
    """How a pcapng is written and read: one section, one interface, enhanced packet blocks."""

    head = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)) + block(
        1, struct.pack("<HHI", 1, 0, 1 << 18)
    )
    before = 28

    @staticmethod
    def record(frame: bytes, micros: int) -> bytes:
        size = len(frame)
        body = struct.pack("<IIIII", 0, micros >> 32, micros & 0xFFFFFFFF, size, size)
        return block(6, body + frame)

    @staticmethod
    def read(file: BinaryIO) -> Iterator[bytes]:
        file.seek(len(Pcapng.head))
        while head := file.read(8):
            body = file.read(struct.unpack_from("<I", head, 4)[0] - 8)
            yield body[20 : 20 + struct.unpack_from("<I", body, 12)[0]]


Format = type[Pcap] | type[Pcapng]


def write(path: Path, kind: Format, source: Iterator[bytes], megabytes: int) -> int:
    """Writes frames, 50 microseconds apart, until the file is that large or there are no more; how many."""
    count = size = 0
    with path.open("wb") as file:
        file.write(kind.head)
        while size < megabytes << 20 and (frame := next(source, None)) is not None:
            size += file.write(kind.record(frame, 1_700_000_000_000_000 + count * 50))
            count += 1
    return count


def answer(frame: bytes) -> bytes:
    """What the other side answers: the same bytes the other way round."""
    at = ETHERNET_HEADER
    addresses, rest = frame[at + 12 : at + 20], bytearray(frame[at + 20 :])
    if frame[at + 9] == 1:
        assert rest[0] == ECHO
        rest[0] = ECHO_REPLY
        total = struct.unpack_from("!H", rest, 2)[0] + (ECHO << 8)
        struct.pack_into("!H", rest, 2, (total & 0xFFFF) + (total >> 16))
    else:
        rest[0:4] = rest[2:4] + rest[0:2]
    return frame[: at + 12] + addresses[4:] + addresses[:4] + bytes(rest)


def nat(*argv: str | Path) -> str:
    """Runs `guestnet nat`, within its memory; returns what it says."""
    began = time.monotonic()
    command = [GUESTNET, "nat", "--external", "203.0.113.1", *map(str, argv)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    assert process.returncode == 0, told
    assert used.ru_maxrss < MEMORY_MB << 10, f"{used.ru_maxrss} kB"
    size = Path(argv[-1]).stat().st_size
    busy = used.ru_utime + used.ru_stime
    rates = f"{size / 1e6 / seconds:.0f} MB/s, {size / 1e6 / busy:.0f} MB for a second of processor time"
    print(f"\n{told}{rates}, {used.ru_maxrss >> 10} MB of memory")
    return told


def bad_checksums(tshark: str, path: Path) -> str:
    checks = [word for proto in ("ip", "tcp", "udp") for word in ("-o", f"{proto}.check_checksum:TRUE")]
    bad = " || ".join(f"{proto}.checksum.status == 0" for proto in ("ip", "tcp", "udp", "icmp"))
    command = [tshark, "-n", "-r", str(path), *checks, "-Y", bad, "-T", "fields", "-e", "frame.number"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT * 3).stdout


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Names for files, which do not stay."""
    names: set[Path] = set()

    def name(word: str) -> Path:
        names.add(tmp_path / word)
        return tmp_path / word

    yield name
    for path in names:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", [Pcap, Pcapng])
def test_no_checksum_is_bad(room: Callable[[str], Path], kind: Format) -> None:
    tshark = need.program("tshark")
    inside, outside = room("inside"), room("outside")
    count = write(inside, kind, frames(), MEGABYTES)
    told = nat(inside, outside)
    assert f"{count:,} translated" in told
    assert outside.stat().st_size == inside.stat().st_size
    assert bad_checksums(tshark, outside) == ""
    # The judge sees one that is bad.
    with outside.open("rb") as file:
        first = bytearray(next(kind.read(file)))
    first[ETHERNET_HEADER + 25] ^= 1
    broken = room("broken")
    write(broken, kind, iter([bytes(first)]), 1)
    assert bad_checksums(tshark, broken).strip() == "1"


def test_answers_find_their_way_back(room: Callable[[str], Path]) -> None:
    tshark = need.program("tshark")
    inside, outside, answers, back = map(room, ("inside", "outside", "answers", "back"))
    count = write(inside, Pcap, frames(), MEGABYTES)
    nat(inside, outside)
    with outside.open("rb") as file:
        write(answers, Pcap, map(answer, Pcap.read(file)), MEGABYTES)
    outside.unlink()
    told = nat("--reverse", "--inside", inside, answers, back)
    assert f"{count:,} translated" in told
    assert bad_checksums(tshark, back) == ""
    # Each answer is for the guest that asked.
    with inside.open("rb") as asked, back.open("rb") as came:
        for there, here in zip(Pcap.read(asked), Pcap.read(came), strict=True):
            at = ETHERNET_HEADER
            assert there[at + 12 : at + 16] == here[at + 16 : at + 20]
            assert there[at + 16 : at + 20] == here[at + 12 : at + 16]
            if there[at + 9] != 1:
                assert there[at + 20 : at + 22] == here[at + 22 : at + 24]
