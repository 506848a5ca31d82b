"""`--ready-fd`: tells the program that started guestnet that guests have their network."""

from __future__ import annotations

import contextlib
import os

from guestnet.cli import UsageError, arguments


def descriptor(text: str) -> int:
    """Reads the number of a descriptor."""
    return arguments.number("--ready-fd", text, 0, 0x7FFFFFFF, "3, and redirect it, as in 3>ready")


def check(fd: int | None) -> None:
    """Raises UsageError if the descriptor is not open."""
    if fd is None:
        return
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        raise UsageError(f"--ready-fd {fd} is not open: redirect it, as in 3>ready.") from None


def announce(fd: int | None) -> None:
    """Writes a line to the descriptor and closes it, unless it is one of the standard ones."""
    if fd is None:
        return
    with contextlib.suppress(OSError):  # nobody waits for it any more
        os.write(fd, b"1\n")
        if fd > 2:
            os.close(fd)
