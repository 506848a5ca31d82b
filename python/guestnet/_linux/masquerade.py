"""Forwarding and masquerading for a TUN device, and how they are undone after a process was killed.

Theory of operation:

- Each run that changes something has a file with a lock, which ends with the process. A file without a lock
  belongs to a dead run. The next start undoes what the file records, and nothing else.
- Rules are in a table of their own, named after the device. Its first chain has a random word that is also in
  the file, so a table of another program is left alone.
- The last run that needs forwarding turns it off again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from guestnet._linux import links
from guestnet.errors import UnsupportedError

_FORWARD = "net/ipv4/ip_forward"
_SECONDS = 20


class Masquerade:
    """The changes for one device. `close` undoes them, and may be called again."""

    def __init__(self, device: str, external: Sequence[IPv4Address], *, masquerade: bool) -> None:
        """Turns forwarding on, and with `masquerade` gives packets from the external addresses the host's own
        address.

        Raises UnsupportedError if this process may not, or if nft is missing.
        """
        if masquerade and shutil.which("nft") is None:
            raise UnsupportedError(
                "Masquerading needs the program nft, which is not in PATH: install nftables, or write the "
                "rule yourself and leave the option out."
            )
        self._file: Any = None
        self._device = device
        self._word = f"owner_{secrets.token_hex(8)}"
        with _registry() as place:
            sweep(place)
            path = place / f"{_namespace()}-{device}.json"
            self._file = path.open("w", encoding="ascii")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            json.dump(
                {"device": device, "word": self._word, "boot": _boot(), "rules": masquerade}, self._file
            )
            self._file.flush()
            try:
                _switch_on(place)
                if masquerade:
                    _nft(_rules(device, self._word, external))
            except BaseException:
                self._undo(place)
                raise

    def close(self) -> None:
        """Undoes the changes."""
        if self._file is not None:
            with _registry() as place:
                self._undo(place)

    def _undo(self, place: Path) -> None:
        file, self._file = self._file, None
        _remove_table(self._device, self._word)
        path = Path(file.name)
        path.unlink(missing_ok=True)
        file.close()
        _switch_back(place)


def sweep_dead() -> None:
    """Undoes what dead runs left in this namespace."""
    if _place().is_dir():
        with _registry() as place:
            sweep(place)


def sweep(place: Path) -> None:
    """The same as `sweep_dead`, while the registry is locked."""
    swept = False
    for path in place.glob(f"{_namespace()}-*.json"):
        with path.open(encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # it lives
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.load(file)
                if said["boot"] == _boot() and said["rules"]:
                    _remove_table(str(said["device"]), str(said["word"]))
            path.unlink(missing_ok=True)
            swept = True
    if swept:
        _switch_back(place)


# --- the switch ---


def _prior(place: Path) -> Path:
    return place / f"{_namespace()}-ip_forward"


def _switch_on(place: Path) -> None:
    now = links.read_sysctl(_FORWARD)
    if now == "1":
        return
    _prior(place).write_text(json.dumps({"boot": _boot(), "value": now}), encoding="ascii")
    if not links.write_sysctl(_FORWARD, "1"):
        _prior(place).unlink(missing_ok=True)
        raise UnsupportedError(
            "Forwarding cannot be turned on (net.ipv4.ip_forward cannot be written here): have it turned on, "
            "and leave the option out."
        )


def _switch_back(place: Path) -> None:
    """Turns forwarding off when no run needs it any more."""
    prior = _prior(place)
    if not prior.exists() or any(place.glob(f"{_namespace()}-*.json")):
        return
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(prior.read_text(encoding="ascii"))
        if said["boot"] == _boot() and links.read_sysctl(_FORWARD) == "1":
            links.write_sysctl(_FORWARD, str(said["value"]))
    prior.unlink(missing_ok=True)


# --- the rules ---


def _table(device: str) -> str:
    return f"guestnet_{''.join(c if c.isalnum() else '_' for c in device)}"


def _rules(device: str, word: str, external: Sequence[IPv4Address]) -> str:
    sources = ", ".join(map(str, external))
    return f"""
table ip {_table(device)} {{
  chain {word} {{ }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {{ {sources} }} oifname != "{device}" masquerade
  }}
}}
"""


def _remove_table(device: str, word: str) -> None:
    """Removes the table of this device, if it has the word."""
    table = _table(device)
    if shutil.which("nft") is None:
        return
    # One transaction: the chain is deleted only if it is there, and then the table with it.
    with contextlib.suppress(UnsupportedError):
        _nft(f"delete chain ip {table} {word}\ndelete table ip {table}\n")


def _nft(text: str) -> None:
    try:
        done = subprocess.run(
            ["nft", "-f", "-"], input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else f"no end within {_SECONDS} s"
        raise UnsupportedError(f"nft did not do its work ({why}): is nftables installed right?") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[:300]
        raise UnsupportedError(
            f"nft refused the rules for masquerading ({said}): it needs CAP_NET_ADMIN and a kernel with "
            "nf_tables."
        )


# --- where runs are noted ---


def _place() -> Path:
    base = Path("/run")
    if not os.access(base, os.W_OK):
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/guestnet-{os.getuid()}")
    return base / "guestnet-uplinks"


def _is_closed_to_others(path: Path, owners: tuple[int, ...], shared: int) -> bool:
    """Whether it is a directory of one of these users that no other user can write to.

    With a bit of `shared` others may write to it, but not to files in it.
    """
    status = path.lstat()
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid in owners
        and (not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or bool(status.st_mode & shared))
    )


@contextmanager
def _registry() -> Iterator[Path]:
    """The directory of the runs, locked."""
    place = _place()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        us = os.geteuid()
        for path, owners, shared in ((place.parent, (0, us), stat.S_ISVTX), (place, (us,), 0)):
            if not _is_closed_to_others(path, owners, shared):
                raise UnsupportedError(f"{path} is another user's, or open to others: remove it.")
        lock = (place / "lock").open("w", encoding="ascii")
    except OSError as error:
        raise UnsupportedError(
            f"What is changed for the uplink cannot be noted in {place} ({error.strerror}): make it writable."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield place


def _namespace() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
