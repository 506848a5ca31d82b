"""The event log: a line for people on stderr, or a JSON line for programs on stdout.

Theory of operation: guests can cause events, so a slow reader must not block the network. A thread of its own
writes the lines from a bounded queue. A line that does not fit is dropped and counted. The lines of one guest
take no more of the queue than its share.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import threading
import time
from collections import Counter
from typing import Any

from guestnet.cli.runner import confined
from guestnet.model.events import LogMessage, NetworkEvent
from guestnet.model.shares import fair_share

STDOUT, STDERR = 1, 2
WAITING = 1024
"""How many lines wait for the reader at most."""
_CLOSING_SECONDS = 1.0
"""How long `close` waits for the last lines."""
_STALLED_SECONDS = 0.5
"""A reader that takes nothing for so long is given up."""

# Events that are printed without --verbose.
_SAID = {
    "guest_up": "came",
    "guest_down": "left",
    "lease": "has an address",
    "failed": "failed: end guestnet and start it again",
}


class Teller:
    """Writes events. Any thread may use it. No method waits, except `close`, which waits a second at most."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._json = options.json
        self._quiet = options.quiet
        self._verbose = options.verbose
        self._lines: queue.Queue[tuple[int, str, str | None] | None] = queue.Queue(WAITING)
        self._lost = 0
        self._taken = 0
        """Lines that were written, or whose reader is gone."""
        self._waiting: Counter[str] = Counter()
        """Waiting lines by the endpoint that caused them."""
        self._counting = threading.Lock()
        self._thread = threading.Thread(target=self._write_all, name="guestnet-teller", daemon=True)
        self._thread.start()

    def tell(self, event: str, text: str, **details: Any) -> None:
        """Reports one event: `text` for people, `details` for programs."""
        if self._json:
            self._put(STDOUT, json.dumps({"event": event, **details}), details.get("endpoint"))
        elif not self._quiet:
            self._put(STDERR, f"guestnet: {text}", details.get("endpoint"))

    def say(self, line: str) -> None:
        """Prints a line for people."""
        self._put(STDERR, line)

    def event(self, event: NetworkEvent) -> None:
        """Reports an event of the network."""
        if isinstance(event, LogMessage) and not self._json:
            return  # on stderr already
        text = _SAID.get(event.kind)
        if text is None and not self._verbose and not self._json:
            return
        who = event.endpoint or "the network"
        fields = event.details()
        details = ", ".join(f"{key} {value}" for key, value in fields.items() if value is not None)
        said = f"{who} {text or event.kind.replace('_', ' ')}" + (f" ({details})" if details else "")
        self.tell(event.kind, said, endpoint=event.endpoint, **fields)

    def close(self) -> None:
        """Ends the thread when all lines are written, or the reader does not read."""
        deadline = time.monotonic() + _CLOSING_SECONDS
        asked = False
        while self._thread.is_alive() and time.monotonic() < deadline:
            taken = self._taken
            if not asked:
                with contextlib.suppress(queue.Full):
                    self._lines.put_nowait(None)
                    asked = True
            self._thread.join(_STALLED_SECONDS)
            if self._taken == taken:
                return

    def _put(self, fd: int, line: str, who: str | None = None) -> None:
        with self._counting:
            if who is not None and self._waiting[who] >= fair_share(WAITING, self._lines.qsize()):
                self._lost += 1
                return
            try:
                self._lines.put_nowait((fd, line, who))
            except queue.Full:
                self._lost += 1
                return
            if who is not None:
                self._waiting[who] += 1

    def _write_all(self) -> None:
        confined.settle_thread()
        while (item := self._lines.get()) is not None:
            fd, line, who = item
            _write(fd, line)
            self._taken += 1
            if who is not None:
                with self._counting:
                    self._waiting[who] -= 1
                    if not self._waiting[who]:
                        del self._waiting[who]
            if self._lost and self._lines.empty():
                with self._counting:
                    lost, self._lost = self._lost, 0
                said = json.dumps({"event": "lines_lost", "count": lost}) if self._json else None
                _write(fd, said or f"guestnet: {lost} lines were lost, because nobody read them in time")


def _write(fd: int, line: str) -> None:
    """Writes a line directly to the descriptor: at exit, Python would wait for its own buffer."""
    data = f"{line}\n".encode("utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        pass  # the reader has gone; guests have not
