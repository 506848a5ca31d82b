"""Output of guestnet: messages on stderr, apart from the guest's output; requested output on stdout."""

from __future__ import annotations

import sys


class OutputError(Exception):
    """stdout cannot be written. The message says why."""


def answer(text: str) -> None:
    """Prints an answer on stdout. Raises OutputError, or BrokenPipeError if the reader is gone."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"Cannot write to stdout ({error.strerror}): lead it elsewhere.") from error


_LONGEST = 1000


def complain(text: str) -> None:
    """Prints one sentence on stderr, on one line. A very long one is shortened in the middle."""
    line = " ".join(text.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    _write(f"guestnet: {line}\n")


def say(text: str) -> None:
    """Prints a line on stderr."""
    _write(f"{text}\n")


def tell_log(*, quiet: bool, verbose: bool = False) -> None:
    """Prints the log of the network as messages of guestnet: warnings, or more, or errors only."""
    import logging

    class Stderr(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            complain(record.getMessage() + (f" ({type(error).__name__}: {error})" if error else ""))

    logger = logging.getLogger("guestnet")
    logger.addHandler(Stderr())
    logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # no stderr to say it on: the exit status still tells
