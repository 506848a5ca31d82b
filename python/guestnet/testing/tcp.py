"""TCP of the in-memory guest: enough to move data both ways over a network that loses little.

Segments are sent in order, without window scaling or selective acknowledgement. Data that is not acknowledged
in time is sent again from the first missing byte (go-back-N).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from guestnet.testing.frames import ACK, FIN, PSH, RST, SYN, Segment

Key = tuple[bytes, int, int]
"""The other host's address and port, and the own port."""

_WINDOW = 65535
_RESEND_SECONDS = 0.3
_PATIENCE_SECONDS = 10.0
_MODULUS = 1 << 32


def _after(a: int, b: int) -> int:
    """How far sequence number `a` is after `b`, negative when before."""
    return (a - b + (_MODULUS >> 1)) % _MODULUS - (_MODULUS >> 1)


class Connection:
    """One TCP connection.

    Every method that waits does so on `changed`. The network's thread takes the same lock.
    """

    def __init__(
        self, key: Key, mss: int, send: Callable[[Segment, int], None], changed: threading.Condition
    ) -> None:
        self.peer, self.peer_port, self.port = key
        self.established = False
        self.error = ""
        self._mss = mss
        self._send_segment = send
        self._changed = changed
        self._incoming = bytearray()
        self._outgoing = bytearray()
        """Sent or not, from the first byte that was not acknowledged."""
        self._first = int.from_bytes(os.urandom(4), "big")
        self._unacked = self._next = self._first
        self._expected = 0
        self._peer_window = mss
        self._closing = False
        self._fin_acked = False
        self._peer_closed = False

    @property
    def finished(self) -> bool:
        """Both sides are closed, or the connection was reset."""
        return bool(self.error) or (self._fin_acked and self._peer_closed)

    def open(self) -> None:
        """Sends the SYN."""
        self._emit(self._first, SYN)
        self._next = self._first + 1

    def send(self, data: bytes) -> None:
        """Sends all of `data`. Returns when the last of it was sent."""
        view = memoryview(data)
        with self._changed:
            while view:
                room = 2 * _WINDOW - len(self._outgoing)
                if room > 0:
                    self._outgoing += view[:room]
                    view = view[room:]
                    self._push()
                else:
                    self._wait(lambda: len(self._outgoing) < 2 * _WINDOW)

    def recv(self, count: int) -> bytes:
        """Returns up to `count` bytes, none when the other side has closed."""
        with self._changed:
            self._wait(lambda: bool(self._incoming) or self._peer_closed)
            was_small = len(self._incoming) > _WINDOW - 2 * self._mss
            data = bytes(self._incoming[:count])
            del self._incoming[:count]
            if was_small and data:
                self._emit(
                    self._next, ACK
                )  # the window has opened again, and the other side may wait for that
            return data

    def close(self) -> None:
        """Closes the sending side when everything is acknowledged. Receiving continues."""
        with self._changed:
            self._closing = True
            self._push()
            self._wait(lambda: self._fin_acked)

    def abort(self) -> None:
        """Resets the connection."""
        with self._changed:
            self.error = self.error or "connection aborted"
            self._emit(self._next, RST | ACK)

    def receive(self, segment: Segment) -> None:
        """Takes a segment from the network, in its thread."""
        if segment.flags & RST:
            self.error = "connection refused" if not self.established else "connection reset"
            return
        if segment.flags & SYN:
            self._expected = (segment.seq + 1) % _MODULUS
            if not segment.flags & ACK:
                self._emit(self._first, SYN | ACK)
                self._next = self._first + 1
                return
        if not segment.flags & ACK:
            return
        self._acknowledge(segment)
        fresh = -_after(segment.seq, self._expected)
        if (segment.payload or segment.flags & (FIN | SYN)) and fresh >= 0:
            payload = segment.payload[fresh:]
            self._incoming += payload
            self._expected = (self._expected + len(payload)) % _MODULUS
            if segment.flags & FIN and fresh <= len(segment.payload) and not self._peer_closed:
                self._peer_closed = True
                self._expected = (self._expected + 1) % _MODULUS
        if segment.payload or segment.flags & (FIN | SYN):
            self._emit(self._next, ACK)
        self._push()

    def _acknowledge(self, segment: Segment) -> None:
        advance = _after(segment.ack, self._unacked)
        self._peer_window = segment.window
        if not self.established:
            self.established = True
            self._unacked = self._next = (self._first + 1) % _MODULUS
            return
        if 0 < advance <= _after(self._next, self._unacked):
            self._fin_acked = self._closing and advance > len(self._outgoing)
            del self._outgoing[:advance]
            self._unacked = segment.ack

    def _push(self) -> None:
        """Sends what the window allows."""
        if not self.established or self._fin_acked:
            return
        while True:
            sent = _after(self._next, self._unacked)
            chunk = bytes(self._outgoing[sent : sent + min(self._mss, max(0, self._peer_window - sent))])
            if not chunk:
                break
            self._emit(self._next, ACK | PSH, chunk)
            self._next = (self._next + len(chunk)) % _MODULUS
        if self._closing and sent == len(self._outgoing):
            self._emit(self._next, ACK | FIN)
            self._next = (self._next + 1) % _MODULUS

    def _emit(self, seq: int, flags: int, payload: bytes = b"") -> None:
        window = max(0, _WINDOW - len(self._incoming))
        ack = self._expected if flags & ACK else 0
        segment = Segment(self.port, self.peer_port, seq % _MODULUS, ack, flags, window, payload)
        self._send_segment(segment, self._mss if flags & SYN else 0)

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not done():
            if self.error:
                raise ConnectionResetError(self.error)
            if time.monotonic() > deadline:
                raise TimeoutError("the other side does not answer")
            before = self._unacked
            if not self._changed.wait(_RESEND_SECONDS) and self._unacked == before:
                self._resend()

    def _resend(self) -> None:
        if not self.established or self._unacked == self._next:
            return
        self._next = self._unacked
        self._peer_window = max(self._peer_window, 1)  # probes a window that was closed
        self._push()
