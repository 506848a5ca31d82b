"""Captures: the file, and its beginning and end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
from typing import TYPE_CHECKING

from guestnet.errors import ConfigError

if TYPE_CHECKING:
    from guestnet.control.channel import Control

_log = logging.getLogger("guestnet")

_FILE_SECONDS = 3.0
"""How long the rest of a capture may take to be written to a file."""
_PIPE_SECONDS = 0.5
"""The same for anything else: a reader of a pipe may have stopped reading."""
_PCAPNG = b"\x0a\x0d\x0d\x0a"


def _capture_file(path: str) -> int:
    """Opens the file for a capture. One that has other content than a capture is not overwritten."""
    directory, name = os.path.split(path)
    # Not to wait for who reads a named pipe: nothing could interrupt that.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    if not name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    parent = os.open(directory or ".", os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY))
    try:
        nofollow = os.O_NOFOLLOW if _is_shared(os.fstat(parent)) else 0
        try:
            fd = os.open(name, flags | nofollow, 0o600, dir_fd=parent)
        except OSError as error:
            if not nofollow or error.errno != errno.ELOOP:
                raise
            raise ConfigError(
                f"The capture file {path!r} is a symbolic link in a directory that other users can write: "
                "name the file that it leads to, or choose another."
            ) from None
        try:
            about = os.fstat(fd)
            if stat.S_ISREG(about.st_mode):
                if about.st_size and not _begins_as_capture(name, parent, about, nofollow):
                    raise ConfigError(
                        f"The capture file {path!r} exists and is not a pcapng capture: remove it, "
                        "or choose another."
                    )
                os.ftruncate(fd, 0)
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(parent)


def _is_shared(directory: os.stat_result) -> bool:
    """Whether other users than ourselves and root can put files there."""
    return bool(directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) or directory.st_uid not in (
        0,
        os.geteuid(),
    )


def _begins_as_capture(name: str, parent: int, about: os.stat_result, nofollow: int) -> bool:
    """Whether the file `about` begins as a capture; `name` may lead to another one by now."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | nofollow, dir_fd=parent)
    except OSError:
        return False
    try:
        return os.path.samestat(os.fstat(fd), about) and os.read(fd, len(_PCAPNG)) == _PCAPNG
    finally:
        os.close(fd)


def is_capture(path: str) -> bool:
    """Whether a file begins as a pcapng capture does."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_PCAPNG)) == _PCAPNG
    except PermissionError:
        return False


class Capture:
    """The capture of a running network."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._seconds = _FILE_SECONDS
        self.is_running = False

    async def start(self, path: str | int) -> None:
        """Writes every frame to a file or descriptor, in place of an earlier one."""
        try:
            fd = os.dup(path) if isinstance(path, int) else _capture_file(path)
        except OSError as error:
            remedy = "choose another one" if error.errno != errno.ENXIO else "start who reads the pipe first"
            raise ConfigError(
                f"The capture file {path!r} cannot be written ({error.strerror}): {remedy}."
            ) from error
        self._seconds = _FILE_SECONDS if stat.S_ISREG(os.fstat(fd).st_mode) else _PIPE_SECONDS
        self.is_running = True  # also when it is given up: one that does not run can be stopped too
        try:
            await self._control.do(self._control.plane.start_capture, fd)
        finally:
            os.close(fd)

    async def stop(self) -> None:
        """Ends it; its file is complete then."""
        self.is_running = False
        # A pipe that nobody reads must not keep the network from ending.
        work = self._control.do(self._control.plane.stop_capture)
        try:
            await asyncio.wait_for(work, self._seconds)
        except TimeoutError:
            _log.warning("the capture could not be written to its end")
