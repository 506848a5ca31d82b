"""Captures are read in every format, in parts of any size, and wrong ones are refused with their place."""

from __future__ import annotations

import io

import pytest
from guestnet.nat import capture_file
from guestnet.nat.capture_file import CaptureError, CaptureFile, ip_offset
from hypothesis import given
from hypothesis import strategies as st
from unit.captures import block, pcap, pcapng

FRAMES = [(1_700_000_000_123_456_000 + n * 1000, bytes([n]) * (n * 7 % 100 + 1)) for n in range(50)]


class Dribble(io.RawIOBase):
    """A stream that gives a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, size: int = -1) -> bytes:
        got = self._data[self._at : self._at + min(size, 7)]
        self._at += len(got)
        return got


def read(data: bytes, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[list[tuple[int, bytes]], bytes]:
    file = CaptureFile(io.BytesIO(data), "it")
    seen, written = [], b""
    for chunk in file.chunks():
        for p in chunk.packets:
            seen.append((p.time, bytes(chunk.data[p.at : p.at + p.length])))
        written += chunk.data[: chunk.used]
    return seen, written


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [False, True])
def test_pcap(order: str, nano: bool) -> None:
    data = pcap(FRAMES, order=order, nano=nano)
    assert read(data) == (FRAMES, data)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("resolution", [None, 6, 9, 0x94])
def test_pcapng(order: str, resolution: int | None) -> None:
    data = pcapng(FRAMES, order=order, resolution=resolution)
    seen, written = read(data)
    assert written == data
    assert [frame for _, frame in seen] == [frame for _, frame in FRAMES]
    # 2**-20 of a second is about a microsecond.
    assert all(
        abs(a - b) <= (954 if resolution == 0x94 else 0) for (a, _), (b, _) in zip(seen, FRAMES, strict=True)
    )


def test_sections_of_both_orders() -> None:
    data = pcapng(FRAMES[:3], order="<") + pcapng(FRAMES[3:5], order=">")
    assert read(data) == (FRAMES[:5], data)


def test_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_file, "CHUNK", 64)
    for data in (pcap(FRAMES), pcapng(FRAMES)):
        assert read(data) == (FRAMES, data)
        chunks = CaptureFile(Dribble(data), "it").chunks()  # type: ignore[arg-type]
        assert b"".join(bytes(c.data[: c.used]) for c in chunks) == data


def test_simple_packet_blocks_have_no_time() -> None:
    data = pcapng([]) + block(3, (5).to_bytes(4, "little") + b"hello")
    assert read(data) == ([(0, b"hello")], data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"short", "too short"),
        (b"MZ" + bytes(100), "is no capture"),
        (pcap(FRAMES)[:-1], "ends in the middle"),
        (pcapng(FRAMES)[:-1], "ends in the middle"),
        (pcap([])[:24] + bytes(8) + b"\xff" * 8, "which cannot be"),
        (block(0x0A0D0D0A, b"?" * 16), "byte order"),
        (pcapng([]) + b"\x06\0\0\0\x0d\0\0\0" + bytes(5), "block of 13 bytes"),
        (pcapng([]) + block(6, (7).to_bytes(4, "little") + bytes(20)), "interface 7"),
        (pcapng([]) + block(6, bytes(4) + b"\xff" * 8 + bytes(8)), "a time that cannot be"),
        (pcapng([], resolution=0) + block(6, bytes(4) + b"\1" * 8 + bytes(8)), "a time that cannot be"),
        (pcapng([]) + block(6, bytes(12) + (99).to_bytes(4, "little") + bytes(4)), "longer than its block"),
    ],
)
def test_wrong_files(data: bytes, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        read(data)


@given(st.sampled_from([pcap(FRAMES[:5]), pcapng(FRAMES[:5])]), st.data())
def test_damage_is_read_or_refused(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 8))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        _, written = read(bytes(damaged))
    except CaptureError:
        return
    assert written == damaged


IP = b"\x45" + bytes(19)


@pytest.mark.parametrize(
    ("link", "head", "offset"),
    [
        (1, bytes(12) + b"\x08\x00", 14),
        (1, bytes(12) + b"\x81\x00\x00\x05\x08\x00", 18),
        (1, bytes(12) + b"\x88\xa8\x00\x05\x81\x00\x00\x05\x08\x00", 22),
        (1, bytes(12) + b"\x08\x06", -1),
        (101, b"", 0),
        (228, b"", 0),
        (12, b"", 0),
        (113, bytes(14) + b"\x08\x00", 16),
        (276, b"\x08\x00" + bytes(18), 20),
        (0, b"\x02\0\0\0", 4),
        (108, b"\0\0\0\x02", 4),
        (147, b"", -1),
    ],
)
def test_link_headers(link: int, head: bytes, offset: int) -> None:
    data = bytearray(b"before" + head + IP)
    assert ip_offset(data, 6, len(head) + 20, link) == offset
    # Cut short it is none.
    assert ip_offset(data[:-1], 6, len(head) + 19, link) == -1


def test_other_versions_are_none() -> None:
    assert ip_offset(bytearray(b"\x60" + bytes(39)), 0, 40, 101) == -1
