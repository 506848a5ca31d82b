"""A capture of some size through `guestnet nat`; tshark is the judge of its checksums."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

from lab import need
from lab.runner import GUESTNET
from unit.packets import echo, ethernet, tcp, udp

SIZE = 64 << 20


def write_capture(path: Path) -> int:
    """Packets of a few thousand conversations, in random order; returns how many."""
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
        frame = ethernet(packet)
        known.append(struct.pack("<II", len(frame), len(frame)) + frame)
    count = size = 0
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 1))
        while size < SIZE:
            seconds, micros = divmod(count * 50, 1_000_000)
            record = struct.pack("<II", 1_700_000_000 + seconds, micros) + rng.choice(known)
            size += file.write(record)
            count += 1
    return count


def bad_checksums(tshark: str, path: Path) -> str:
    checks = [word for proto in ("ip", "tcp", "udp") for word in ("-o", f"{proto}.check_checksum:TRUE")]
    bad = " || ".join(f"{proto}.checksum.status == 0" for proto in ("ip", "tcp", "udp", "icmp"))
    command = [tshark, "-n", "-r", str(path), *checks, "-Y", bad, "-T", "fields", "-e", "frame.number"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=110).stdout


def test_no_checksum_is_bad(tmp_path: Path) -> None:
    tshark = need.program("tshark")
    inside, outside = tmp_path / "inside.pcap", tmp_path / "outside.pcap"
    count = write_capture(inside)
    argv = [GUESTNET, "nat", "--external", "203.0.113.1", str(inside), str(outside)]
    told = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=110).stderr
    assert f"{count:,} translated" in told
    assert outside.stat().st_size == inside.stat().st_size
    assert bad_checksums(tshark, outside) == ""
    # The judge sees one that is bad.
    data = bytearray(outside.read_bytes())
    data[24 + 16 + 14 + 25] ^= 1
    end = 24 + 16 + struct.unpack_from("<I", data, 24 + 8)[0]
    outside.write_bytes(data[:end])
    assert bad_checksums(tshark, outside).strip() == "1"
