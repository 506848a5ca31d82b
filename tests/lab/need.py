"""What a test needs from the system. Without it the test is skipped, and with CI=true it fails."""

from __future__ import annotations

import glob
import os
import shutil
import stat
from pathlib import Path

import pytest

PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def missing(why: str) -> None:
    """Skips the test that runs, or fails it under CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{why} (with CI=true nothing may be skipped)", pytrace=False)
    pytest.skip(why)


def program(name: str, package: str | None = None) -> str:
    """The path of a program."""
    found = shutil.which(name, path=PATH)
    if found is None:
        missing(f"needs {name} (Debian package {package or name})")
        raise AssertionError("not reached")
    return found


def root() -> None:
    if os.geteuid() != 0:
        missing("needs root, to make network namespaces")


def tun() -> None:
    """/dev/net/tun, which a new machine may keep from ordinary users."""
    path = Path("/dev/net/tun")
    try:
        if not stat.S_ISCHR(path.stat().st_mode):
            raise FileNotFoundError
    except FileNotFoundError:
        missing("needs /dev/net/tun (modprobe tun)")
        return
    if os.geteuid() == 0:
        path.chmod(0o666)


def cloud_kernel() -> str:
    """The release of Debian's cloud kernel, newest installed."""
    images = sorted(glob.glob("/boot/vmlinuz-*-cloud-*"))
    releases = [i.removeprefix("/boot/vmlinuz-") for i in images]
    usable = [r for r in releases if os.path.isdir(f"/lib/modules/{r}")]
    if not usable:
        missing("needs Debian's cloud kernel (Debian package linux-image-cloud-amd64)")
        raise AssertionError("not reached")
    return usable[-1]
