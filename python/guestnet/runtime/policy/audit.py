"""The audit log: one JSON line for each flow at its end, for each refused flow, and for each refused name.

Theory of operation:

- Events come through a bounded queue in a thread for callbacks, so a slow disk delays no packet. Events that
  find no room there are lost; the log says how many (`"event": "lost"`).
- A flow's line has what was known at its start (addresses, rule, name) and at its end (counters). The starts
  of open flows are remembered, up to a limit; a flow beyond it has a line without them.
- The file is appended to, created with mode 0600, and never reached through a symbolic link in a directory
  that others can write. When it exceeds a size, it becomes FILE.1, FILE.1 becomes FILE.2, and so on.
- A write that fails is reported once, and tried again with the next line. Lines are counted as lost until
  one is written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from guestnet.errors import ConfigError
from guestnet.model.events import (
    EventsLost,
    FlowClosed,
    FlowDenied,
    FlowOpened,
    NameDenied,
    NetworkEvent,
    Side,
)

SIZE_MOST = 64 << 20
"""Bytes after which a file is rotated."""
FILES_KEPT = 4
"""Older files that are kept."""
_FLOWS_MOST = 1 << 20
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp"}


def open_log(path: str) -> int:
    """Opens an audit file for appending.

    Args:
        path: The path of the file.

    Returns:
        The descriptor.

    Raises:
        ConfigError: The file cannot be written, or is not a regular file, a pipe or a terminal's device.
    """
    directory, name = os.path.split(path)
    try:
        if not name:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        parent = os.open(directory or ".", os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            shared = os.fstat(parent).st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(name, flags | (os.O_NOFOLLOW if shared else 0), 0o600, dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as error:
        if error.errno == errno.ELOOP:
            remedy = "it is a symbolic link in a directory that other users can write: name its target"
        elif error.errno == errno.ENXIO:
            remedy = "nobody reads the pipe: start its reader first"
        else:
            remedy = f"{(error.strerror or 'unknown error').lower()}: choose another file"
        raise ConfigError(f"The audit file {path!r} cannot be written: {remedy}.") from error
    os.set_blocking(fd, True)
    return fd


class AuditLog:
    """Writes the audit log of one network.

    Args:
        path: The file.
        starts: Says of which flows a line is written at their start too.
        size: Bytes after which the file is rotated.
        kept: How many older files are kept.

    Raises:
        ConfigError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     log = AuditLog(f"{directory}/audit.jsonl")
        ...     log.note(EventsLost(network="lab", time=0.0, count=3))
        ...     log.close()
        ...     with open(f"{directory}/audit.jsonl") as file:
        ...         print(file.read(), end="")
        {"time": "1970-01-01T00:00:00.000Z", "network": "lab", "event": "lost", "count": 3}
    """

    TYPES: tuple[type[NetworkEvent], ...] = (FlowOpened, FlowClosed, FlowDenied, NameDenied, EventsLost)
    """The events that it wants."""

    def __init__(
        self,
        path: str,
        *,
        starts: Callable[[FlowOpened], bool] = lambda _event: False,
        size: int = SIZE_MOST,
        kept: int = FILES_KEPT,
    ) -> None:
        self._path, self._starts = os.path.abspath(path), starts
        self.failed: Callable[[str | None], object] = lambda _reason: None
        """Called with a reason when lines cannot be written, and with None when they can again."""
        self._size_most, self._kept = size, kept
        self._fd: int | None = open_log(path)
        about = os.fstat(self._fd)
        self._rotates = stat.S_ISREG(about.st_mode)
        self._size = about.st_size if self._rotates else 0
        self._open: dict[str, FlowOpened] = {}
        self._lost_now = 0
        self._reason: str | None = None
        self.lost = 0
        """Lines that could not be written."""

    def note(self, event: NetworkEvent) -> None:
        """Writes the lines of an event.

        Args:
            event: An event of one of the classes in `TYPES`; others are ignored.
        """
        if isinstance(event, FlowOpened):
            if len(self._open) < _FLOWS_MOST:
                self._open[event.flow] = event
            if self._starts(event):
                self._write(_line(event, "start", _start(event)))
        elif isinstance(event, FlowClosed):
            began = self._open.pop(event.flow, None)
            self._write(_line(event, "end", _end(began, event)))
        elif isinstance(event, FlowDenied):
            self._write(_line(event, "denied", _denied(event)))
        elif isinstance(event, EventsLost):
            self._write(_line(event, "lost", {"count": event.count}))
        elif isinstance(event, NameDenied):
            self._write(_line(event, "name_denied", event.details()))

    def close(self) -> None:
        """Closes the file."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _write(self, line: dict[str, Any]) -> None:
        if self._lost_now:
            line = {**line, "lost_before": self._lost_now}
        data = json.dumps(line, ensure_ascii=True).encode() + b"\n"
        try:
            if self._fd is None:
                self._reopen()
            elif self._rotates and self._size and self._size + len(data) > self._size_most:
                self._rotate()
            assert self._fd is not None
            written = os.write(self._fd, data)
            if written != len(data):
                # A disk that became full: the part of a line is taken back.
                if self._rotates:
                    os.ftruncate(self._fd, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, ConfigError) as error:
            self.lost += 1
            self._lost_now += 1
            self._report(error.strerror or str(error) if isinstance(error, OSError) else str(error))
            return
        self._size += written
        self._lost_now = 0
        self._report(None)

    def _report(self, reason: str | None) -> None:
        if (reason is None) != (self._reason is None):
            self.failed(reason)
        self._reason = reason

    def _reopen(self) -> None:
        self._fd = open_log(self._path)
        self._size = os.fstat(self._fd).st_size if self._rotates else 0

    def _rotate(self) -> None:
        for number in range(self._kept, 0, -1):
            older = f"{self._path}.{number - 1}" if number > 1 else self._path
            with contextlib.suppress(FileNotFoundError):
                os.replace(older, f"{self._path}.{number}")
        if not self._kept:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
        self._reopen()


def _line(event: NetworkEvent, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line: dict[str, Any] = {"time": when, "network": event.network, "event": kind}
    if event.endpoint is not None:
        line["guest"] = event.endpoint
    return line | {name: value for name, value in fields.items() if value is not None}


def _text(side: Side) -> str:
    address, port = side
    if not port:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _start(event: FlowOpened) -> dict[str, Any]:
    return {
        "flow": event.flow,
        "protocol": _PROTOCOLS.get(event.protocol, str(event.protocol)),
        "direction": "inbound" if event.inbound else "outbound",
        "source": _text(event.remote if event.inbound else event.guest),
        "destination": _text(event.guest if event.inbound else event.remote),
        "name": event.name,
        "verdict": "allow",
        "rule": event.rule,
    }


def _end(began: FlowOpened | None, event: FlowClosed) -> dict[str, Any]:
    fields: dict[str, Any] = _start(began) if began is not None else {"flow": event.flow, "verdict": "allow"}
    for name in ("name", "rule", "shown"):
        if (value := getattr(event, name, None)) is not None:
            fields[name] = value
    fields |= {"bytes_out": event.bytes_out, "bytes_in": event.bytes_in}
    fields |= {name: getattr(event, name, None) for name in ("packets_out", "packets_in")}
    if began is not None:
        fields["seconds"] = round(max(0.0, event.time - began.time), 3)
    return fields


def _denied(event: FlowDenied) -> dict[str, Any]:
    inbound = event.direction == "inbound"
    return {
        "protocol": _PROTOCOLS.get(event.protocol, str(event.protocol)),
        "direction": event.direction,
        "source": _text(event.remote if inbound else event.guest),
        "destination": _text(event.guest if inbound else event.remote),
        "name": event.name,
        "shown": event.shown,
        "verdict": "deny",
        "rule": event.rule,
        "reason": event.reason,
        "unreported": event.unreported or None,
    }
