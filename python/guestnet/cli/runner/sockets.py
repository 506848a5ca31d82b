"""Socket files for guests: a stale one is replaced, a live one is refused, and our own goes when we go."""

from __future__ import annotations

import errno
import os
import socket
import stat

from guestnet.cli import UsageError
from guestnet.errors import GuestnetError

# sun_path of Linux is 108 bytes with its final zero; macOS has 104.
LONGEST_PATH = 107


def check_path(path: str) -> str:
    """A path that a unix socket can have."""
    if not path or path == "-" or "\0" in path:
        raise UsageError(f"{path!r} is not the path of a socket: write one such as /tmp/net.sock.")
    from guestnet.cli import hints

    if (hint := hints.socket_path(path)) is not None:
        raise UsageError(f"{path!r} is not the path of a socket: {hint}.")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise UsageError(
            f"The socket path {path!r} has more than {LONGEST_PATH} bytes, the most that a unix socket can "
            "have: choose a shorter one."
        )
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"The directory of the socket {path!r} does not exist: make it first.")
    if os.path.isdir(path):
        raise UsageError(
            f"{path!r} is a directory: write the path of a socket in it, such as {path.rstrip('/')}/net.sock."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"No socket can be made in {folder!r}, which this user may not write to: choose another path."
        )
    return path


def remove_stale(path: str) -> bool:
    """Removes the socket file that a dead process left; True when there was one.

    Refuses what is no socket, and a socket that somebody listens on.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise GuestnetError(f"Cannot look at {path!r} ({error.strerror}): choose another path.") from error
    if not stat.S_ISSOCK(mode):
        raise GuestnetError(
            f"{path!r} exists and is not a socket: choose another path, or move that file away."
        )
    if _is_live(path):
        raise GuestnetError(f"Another process listens on {path!r}: stop it, or choose another path.")
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise GuestnetError(
            f"Cannot remove the stale socket {path!r} ({error.strerror}): remove it by hand."
        ) from error
    return True


def _is_live(path: str) -> bool:
    """Whether a process holds the socket. Connecting says so without sending anything."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            number = probe.connect_ex(path)
        if number == errno.EPROTOTYPE:
            continue  # a socket of another type: ask again with that one
        # A dead one refuses; anything else (a full backlog, no permission) means that somebody is there.
        return number not in (errno.ECONNREFUSED, errno.ENOENT)
    return True
