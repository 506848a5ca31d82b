"""The socket of a running network: where it is, and how a message of it looks.

`guestnet up --name lab` listens on it, and guests join by it (`join_server`). It is a unix socket of
type SOCK_SEQPACKET with mode 0600. A message is one JSON object; the descriptor of a TAP device travels with
it. The commands that join import this module, so it imports little.
"""

from __future__ import annotations

import array as _array  # noqa: F401 - for socket.send_fds in a process that may become another user
import contextlib
import json
import os
import re
import socket
import stat
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from guestnet import errors
from guestnet.errors import ConfigError, GuestnetError

PROTOCOL = 1
"""Version of the messages; both sides must have the same."""
MESSAGE_BYTES = 65536
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_SUFFIX = ".sock"


def check_name(name: str) -> str:
    """Returns the name of a network, 1 to 32 letters, digits, dots, hyphens or underscores.

    Raises:
        ConfigError: the name is not one.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"The network name {name!r} is not 1 to 32 letters, digits, dots, hyphens or underscores, the "
            "first a letter or digit: write one such as lab."
        )
    return name


def directory() -> str:
    """The directory of the sockets of this user's networks; `make_directory` makes it."""
    if os.geteuid() == 0:
        return "/run/guestnet"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return f"{runtime}/guestnet" if runtime.startswith("/") else f"/tmp/guestnet-{os.geteuid()}"


def make_directory() -> str:
    """Makes the directory of the sockets, for this user alone, and returns it.

    Raises:
        GuestnetError: it cannot be made, or somebody else owns it.
    """
    path = directory()
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise GuestnetError(
            f"Cannot make the directory {path!r} ({error.strerror}): set XDG_RUNTIME_DIR to one of your own."
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise GuestnetError(
            f"{path!r} is not a directory that belongs to this user alone: remove it, or set XDG_RUNTIME_DIR "
            "to a directory of your own."
        )
    return path


def remove_directory() -> None:
    """Removes the directory of the sockets if it is empty."""
    with contextlib.suppress(OSError):  # others are in use, or it is somebody else's
        os.rmdir(directory())


def path_of(network: str) -> str:
    """The path of a network's socket; `network` is a name, or a path with a slash in it.

    >>> path_of("./lab.sock")
    './lab.sock'
    """
    return network if "/" in network else f"{directory()}/{check_name(network)}{_SUFFIX}"


def running() -> list[str]:
    """The names of this user's networks that have a socket, whether they run or have left it behind."""
    try:
        found = os.listdir(directory())
    except OSError:
        return []
    return sorted(name.removesuffix(_SUFFIX) for name in found if name.endswith(_SUFFIX))


def peer_user(sock: socket.socket) -> int:
    """The user id of the process at the other end (SO_PEERCRED, unix(7))."""
    _, user, _ = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def send(sock: socket.socket, message: Mapping[str, Any], fds: Iterable[int] = ()) -> None:
    """Sends one message, with descriptors. Raises OSError."""
    data = json.dumps(message).encode()
    passed = list(fds)
    if passed:
        socket.send_fds(sock, [data], passed)
    else:
        sock.send(data)


def refusal(error: Exception) -> dict[str, Any]:
    """An error as a message."""
    return {"ok": False, "error": str(error), "code": type(error).__name__}


def raise_refusal(message: Mapping[str, Any]) -> None:
    """Raises the error that a message carries as the exception of `guestnet.errors` that it was."""
    kind = getattr(errors, str(message.get("code")), GuestnetError)
    if not (isinstance(kind, type) and issubclass(kind, GuestnetError)):
        kind = GuestnetError
    raise kind(str(message.get("error") or "The network refused the request and gave no reason."))
