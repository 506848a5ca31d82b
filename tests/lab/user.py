"""An ordinary user for tests that run as root, and a way to become it.

The checkout and its Python may be in a directory that only root may enter (/root). The processes of the user
get a mount namespace where such a directory is a tmpfs that contains only what they need. So no permissions
of the machine are changed.
"""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "guestnet-test"


@cache
def ordinary() -> tuple[int, int]:
    """uid and gid of the tests' own user; nobody's where useradd is not to be had."""
    try:
        entry = pwd.getpwnam(NAME)
    except KeyError:
        command = ["useradd", "--no-create-home", "--home-dir", "/tmp", "--shell", "/bin/sh", NAME]
        try:
            subprocess.run(command, check=True, capture_output=True)
            entry = pwd.getpwnam(NAME)
        except (OSError, subprocess.CalledProcessError, KeyError):
            return 65534, 65534
    return entry.pw_uid, entry.pw_gid


def _closed_parent(path: Path) -> Path | None:
    """The first directory on the way to `path` that others may not enter."""
    for parent in reversed(path.parents):
        if parent.stat().st_mode & 0o001 == 0:
            return parent
    return None


@cache
def _doors() -> str:
    """Shell lines that open the way to the checkout and to Python in a private mount namespace."""
    closed: dict[Path, list[Path]] = {}
    for wanted in {ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}:
        if parent := _closed_parent(wanted):
            closed.setdefault(parent, []).append(wanted)
    lines = ["mount --make-rprivate /"]
    for parent, paths in closed.items():
        lines.append("mount -t tmpfs -o mode=755 tmpfs /mnt")
        for i, path in enumerate(paths):
            lines += [f"mkdir /mnt/{i}", f"mount --bind {shlex.quote(str(path))} /mnt/{i}"]
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(parent))}")
        for i, path in enumerate(paths):
            quoted = shlex.quote(str(path))
            lines += [f"mkdir -p {quoted}", f"mount --bind /mnt/{i} {quoted}", f"umount /mnt/{i}"]
        lines.append("umount /mnt")
    return "\n".join(lines)


def become(command: list[str]) -> list[str]:
    """The command line that runs `command` as the ordinary user. To be run as root, in a mount namespace
    of its own (as `ip netns exec` makes one)."""
    uid, gid = ordinary()
    drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--inh-caps=-all", "--"]
    script = f'set -e\n{_doors()}\nexec {shlex.join(drop)} "$@"'
    return ["/bin/sh", "-c", script, "become", *command]


def environment(home: str) -> dict[str, str]:
    """What an ordinary user's shell would have, and nothing of the test run's own."""
    path = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    kept = ("LANG", "TERM", "CI", "RUST_BACKTRACE", "GUESTNET_TEST_RUN")
    keep = {k: v for k, v in os.environ.items() if k in kept}
    return {**keep, "PATH": path, "HOME": home, "USER": NAME, "LOGNAME": NAME, "TMPDIR": home}
