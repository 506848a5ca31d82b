"""What guestnet itself says on stderr: plain sentences, out of the way of the guest's own output."""

from __future__ import annotations

import sys


def complain(text: str) -> None:
    """One sentence on stderr, on one line."""
    _write(f"guestnet: {' '.join(text.split())}\n")


def say(text: str) -> None:
    """A line on stderr as it is."""
    _write(f"{text}\n")


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # no stderr to say it on: the exit status still tells
