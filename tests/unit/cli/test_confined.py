"""What guestnet gives up once it runs, as the kernel tells it, thread by thread."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guestnet.cli import checks

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which has something to give up")
_GUESTNET = [sys.executable, "-m", "guestnet"]
_DAC_OVERRIDE, _NET_BIND_SERVICE, _NET_ADMIN, _NET_RAW = 1 << 1, 1 << 10, 1 << 12, 1 << 13


@contextmanager
def up(path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`guestnet up` in a network namespace of its own, if root starts it."""
    prefix = ["unshare", "-n"] if os.geteuid() == 0 else []
    words = [*prefix, *_GUESTNET, "up", "-v", "--stream", str(path), *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)


def until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            return line
    raise AssertionError("".join(said))


def threads(pid: int) -> list[dict[str, str]]:
    return [
        {
            name: value.strip()
            for name, _, value in (line.partition(":") for line in file.read_text().splitlines())
        }
        for file in Path(f"/proc/{pid}/task").glob("*/status")
    ]


def capabilities(pid: int) -> tuple[int, int]:
    """What threads hold: those under a filter, and the others."""
    held = {"0": 0, "2": 0}
    for thread in threads(pid):
        held[thread["Seccomp"]] |= int(thread["CapPrm"], 16)
    return held["2"], held["0"]


def test_no_thread_gains_rights_and_packet_threads_have_a_filter(tmp_path: Path) -> None:
    with up(tmp_path / "net.sock", "--workers", "3") as process:
        assert "3 threads under a seccomp filter" in until(process, "confined")
        until(process, "is up")
        seen = threads(process.pid)
        assert {thread["NoNewPrivs"] for thread in seen} == {"1"}
        assert [thread["Seccomp"] for thread in seen].count("2") == 3
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)


@_ROOT
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((), 0),
        (("-p", "80:vm1:80"), 0),
        (("--pcp", "80-81"), _NET_BIND_SERVICE),
        (("--pcp", "40000-40001"), 0),
        (("--uplink", "tun"), 0),
        (("--uplink", "tun", "--forwarding"), _NET_ADMIN),
    ],
)
def test_root_keeps_only_what_is_still_needed(options: tuple[str, ...], kept: int, tmp_path: Path) -> None:
    with up(tmp_path / "net.sock", *options) as process:
        until(process, "is up")
        packet, others = capabilities(process.pid)
        assert others == kept
        assert packet & ~_NET_RAW == 0, "where ping sockets are closed, packet threads have raw ones"


@_ROOT
def test_root_removes_its_socket_from_another_users_directory(tmp_path: Path) -> None:
    directory = tmp_path / "theirs"
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    path = directory / "net.sock"
    with up(path) as process:
        until(process, "is up")
        assert capabilities(process.pid)[1] == _DAC_OVERRIDE
        assert path.exists()
    assert not path.exists()


@_ROOT
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_root_ends_a_machine_that_became_another_user() -> None:
    machine = "echo ready; exec setpriv --reuid 65534 --clear-groups sleep 600"
    words = ["unshare", "-n", *_GUESTNET, "vm", "--", "sh", "-c", machine]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.skipif(
    checks.check_namespaces().state != checks.OK or checks.check_tun().state != checks.OK,
    reason="no namespaces or no /dev/net/tun here: `guestnet doctor` says how to get them",
)
def test_the_command_of_run_is_not_confined_with_guestnet() -> None:
    script = "grep NoNewPrivs /proc/self/status; grep CapEff /proc/self/status; ulimit -c"
    limit = subprocess.run(
        ["sh", "-c", "ulimit -c"], capture_output=True, text=True, check=True
    ).stdout.strip()
    done = subprocess.run(
        [*_GUESTNET, "run", "--", "sh", "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    rights, capabilities_held, core = done.stdout.splitlines()
    assert rights.split()[1] == "0"
    assert int(capabilities_held.split()[1], 16) & _NET_ADMIN
    assert core == limit


def test_processes_of_the_same_user_cannot_trace_it() -> None:
    code = (
        "import ctypes; from guestnet._linux import confinement; confinement.begin(); "
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "0\n"
