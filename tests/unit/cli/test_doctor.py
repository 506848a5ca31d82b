"""Each check of `guestnet doctor` on a system made up to lack the thing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from guestnet import cli
from guestnet.cli import checks


def test_json_is_complete_and_its_status_fits(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == (0 if report["run_works"] else 1)
    names = {check["name"] for check in report["checks"]}
    assert {
        "namespaces",
        "/dev/net/tun",
        "TAP offloads",
        "ping",
        "QEMU",
        "SO_PEEK_OFF",
        "name servers",
        "confinement",
    } <= names
    for check in report["checks"]:
        assert check["state"] in ("ok", "limited", "missing")
        assert check["state"] == "ok" or check["remedy"]


def test_text_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    text = capsys.readouterr().out
    assert "namespaces" in text
    assert "guestnet run" in text.splitlines()[-1]


def test_no_tun(tmp_path: Path) -> None:
    check = checks.check_tun(str(tmp_path / "tun"))
    assert (check.state, check.needed) == (checks.MISSING, True)
    assert "modprobe tun" in (check.remedy or "")
    (tmp_path / "tun").touch()
    assert checks.check_tun(str(tmp_path / "tun")).state == checks.MISSING


def test_no_name_servers(tmp_path: Path) -> None:
    assert checks.check_resolvers(str(tmp_path / "none")).state == checks.LIMITED
    file = tmp_path / "resolv.conf"
    file.write_text("search x\nnameserver\n")
    assert checks.check_resolvers(str(file)).state == checks.LIMITED
    file.write_text("nameserver 192.0.2.1\n")
    assert checks.check_resolvers(str(file)).found == "192.0.2.1"
    file.write_text("nameserver nonsense\nnameserver 2001:db8::1\nnameserver fe80::1%eth0\n")
    assert checks.check_resolvers(str(file)).found == "2001:db8::1, fe80::1%eth0"
    file.write_text("nameserver nonsense\n")
    assert checks.check_resolvers(str(file)).state == checks.LIMITED


def test_a_subnet_that_the_host_uses(tmp_path: Path) -> None:
    table = tmp_path / "route"
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
    table.write_text(
        f"{head}eth0 00000000 0101A8C0 3 0 0 0 00000000 0 0 0\nbr0 0040A8C0 0 1 0 0 0 00FFFFFF 0 0 0\n"
    )
    check = checks.check_subnet("192.168.64.0/24", str(table))
    assert check.state == checks.LIMITED
    assert "br0" in check.found
    assert checks.check_subnet("192.168.65.0/24", str(table)).state == checks.OK


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("QEMU emulator version 7.2.1 (x)", "ok"),
        ("QEMU emulator version 6.9.0", "missing"),
        ("what", "limited"),
    ],
)
def test_qemu_version(version: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ("x86_64", "aarch64"):
        program = tmp_path / f"qemu-system-{machine}"
        program.write_text(f"#!/bin/sh\necho '{version}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.check_qemu().state == state


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("7.2.22", "does not connect again"),
        ("8.0.0", "reconnect=1"),
        ("9.1.3", "reconnect=1"),
        ("9.2.0", "reconnect-ms=1000"),
        ("10.1.0", "reconnect-ms=1000"),
    ],
)
def test_how_a_machine_connects_again(
    version: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import platform

    program = tmp_path / f"qemu-system-{platform.machine()}"
    program.write_text(f"#!/bin/sh\necho QEMU emulator version {version}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: program.name.removeprefix("qemu-system-"))
    assert words in checks.check_qemu().found


def test_no_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = checks.check_qemu()
    assert check.state == checks.MISSING
    assert "apt install" in (check.remedy or "")


def test_no_kvm(tmp_path: Path) -> None:
    assert checks.check_kvm(str(tmp_path / "kvm")).state == checks.LIMITED


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_root_that_may_nothing() -> None:
    """As in a container with `--cap-drop ALL`: the namespaces can be made, but nobody can be root in them."""
    words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-m", "guestnet"]
    doctor = subprocess.run([*words, "doctor"], capture_output=True, text=True, timeout=60, check=False)
    assert doctor.returncode == 1
    assert "CAP_SETFCAP" in doctor.stdout
    run = subprocess.run(
        [*words, "run", "--", "true"], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 125
    assert "CAP_SETFCAP" in run.stderr
