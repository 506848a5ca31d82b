"""`guestnet policy`: what it prints of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from guestnet import cli

_FILE = """\
default = "deny"

[[rule]]
action = "allow"
to = "public"

[[rule]]
action = "deny"
to = "192.0.2.0/24"

[[rule]]
action = "allow"
to = "git.example"
ports = [22]
"""


def test_warnings_name_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.toml"
    file.write_text(_FILE)
    assert cli.main(["policy", "check", str(file), "192.0.2.1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("allow 192.0.2.1:443/tcp: rule 1, allow public")
    assert f"Note: {file}, line 11: Rule 3 (allow git.example:22)" in captured.err
    assert cli.main(["policy", "show", "--json", str(file)]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith(f"{file}, line 11: Rule 3")
    # With a rule in front, the numbers are not those of the file.
    assert cli.main(["policy", "show", str(file), "--deny", "doh"]) == 0
    assert "Note: Rule 4 (allow git.example:22)" in capsys.readouterr().err
