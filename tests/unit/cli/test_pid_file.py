"""The file with the process id: whole when it is there, and nothing else is written to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from guestnet.cli.commands.up import _pid_file
from guestnet.errors import GuestnetError


def test_it_is_there_as_long_as_guestnet_runs(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("an old one")
    with _pid_file(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
        assert os.listdir(tmp_path) == ["pid"]
    assert not path.exists()
    with pytest.raises(GuestnetError, match="choose another path"), _pid_file(str(tmp_path / "no" / "pid")):
        pass


def test_a_link_in_place_of_the_pid_file_is_not_followed(tmp_path: Path) -> None:
    """In a directory that others write to too, the name that it has at first can be foreseen."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "pid"
    (tmp_path / f"pid.{os.getpid()}").symlink_to(victim)
    with _pid_file(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"
        assert not path.is_symlink()
    assert victim.read_text() == "precious"
