"""Which files a capture may be written to: the process that opens them may be that of root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from guestnet import ConfigError, NatNetwork

PCAPNG = b"\x0a\x0d\x0d\x0a"


@pytest.fixture(scope="module")
def network() -> Iterator[NatNetwork]:
    with NatNetwork() as running:
        yield running


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770], ids=oct)
@pytest.mark.parametrize("content", [None, PCAPNG + b"old"], ids=["dangling", "capture"])
def test_a_link_where_others_can_write_is_not_followed(
    network: NatNetwork, tmp_path: Path, mode: int, content: bytes | None
) -> None:
    target, shared = tmp_path / "target", tmp_path / "shared"
    if content is not None:
        target.write_bytes(content)
    shared.mkdir()
    shared.chmod(mode)
    (shared / "guests.pcapng").symlink_to(target)
    with pytest.raises(ConfigError, match="symbolic link in a directory that other users can write"):
        network.start_capture(shared / "guests.pcapng")
    assert (target.read_bytes() if target.exists() else None) == content
    # A file there is one like any other.
    network.start_capture(shared / "other.pcapng")
    network.stop_capture()
    assert (shared / "other.pcapng").read_bytes().startswith(PCAPNG)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes directories of others")
def test_a_link_in_a_directory_of_another_user_is_not_followed(network: NatNetwork, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(0o700)
    (theirs / "guests.pcapng").symlink_to(tmp_path / "target")
    os.chown(theirs, 65534, 65534)
    with pytest.raises(ConfigError, match="symbolic link"):
        network.start_capture(theirs / "guests.pcapng")
    assert not (tmp_path / "target").exists()


def test_a_link_of_our_own_is_followed(network: NatNetwork, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "link").symlink_to("target")
    network.start_capture(tmp_path / "link")
    network.stop_capture()
    assert (tmp_path / "target").read_bytes().startswith(PCAPNG)


def test_a_capture_is_replaced_and_another_file_is_not(
    network: NatNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old").write_bytes(PCAPNG + bytes(1 << 20))
    Path("letter").write_text("Dear reader")
    Path("empty").touch()
    for name in ("old", "empty", "new"):
        network.start_capture(name)
        network.stop_capture()
        assert Path(name).read_bytes().startswith(PCAPNG)
        assert Path(name).stat().st_size < 1 << 20
    with pytest.raises(ConfigError, match="exists and is not a pcapng capture"):
        network.start_capture("letter")
    assert Path("letter").read_text() == "Dear reader"


def test_a_descriptor_stays_the_callers(network: NatNetwork, tmp_path: Path) -> None:
    with (tmp_path / "capture").open("wb") as file:
        network.start_capture(file.fileno())
        network.stop_capture()
        os.fstat(file.fileno())
    assert (tmp_path / "capture").read_bytes().startswith(PCAPNG)


@pytest.mark.parametrize("name", ["", "folder/", "folder", "nowhere/guests.pcapng"])
def test_what_is_no_file_is_refused(
    network: NatNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="capture file"):
        network.start_capture(name)
