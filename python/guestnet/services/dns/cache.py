"""Answers of others, for as long as they said. Bounded in number and in bytes; the least used go first."""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass

from guestnet.services.dns.wire import TC, Answer, Rcode, Type, body_end

_UNSIGNED = struct.Struct("!I")
ENTRIES, BYTES, LARGEST = 2048, 2 << 20, 16384
"""The bounds of the whole, and bytes of one answer."""
TTL_LONGEST, NEGATIVE_LONGEST = 86400, 900
"""Seconds (RFC 8767 section 4 and RFC 2308 section 5 leave it to the server)."""

Key = tuple[bytes, int, bool, bool]
"""Name in lower case, type, DO, CD."""


@dataclass(frozen=True)
class Cached:
    """An answer and when it was heard."""

    data: bytes
    answer: Answer
    heard: float
    expires: float


class Cache:
    """Not for several threads."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Key, Cached] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self._bytes = 0

    def get(self, key: Key, now: float) -> Cached | None:
        """What is still good."""
        found = self._entries.get(key)
        if found is None:
            return None
        if found.expires <= now:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return found

    def put(self, key: Key, data: bytes, answer: Answer, now: float) -> None:
        """Keeps an answer, when it is one to be kept."""
        ttl = lifetime(data, answer)
        if ttl <= 0 or len(data) > LARGEST:
            return
        if key in self._entries:
            self._drop(key)
        self._entries[key] = Cached(data, answer, now, now + ttl)
        self._bytes += len(data)
        while len(self._entries) > ENTRIES or self._bytes > BYTES:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Key) -> None:
        self._bytes -= len(self._entries.pop(key).data)


def lifetime(data: bytes, answer: Answer) -> int:
    """Seconds that an answer is good for; 0: it is not to be kept."""
    if answer.flags & TC or answer.rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN) or not answer.records:
        return 0
    # A TTL with its highest bit set is none (RFC 2181 section 8).
    shortest = min(0 if record.ttl >> 31 else record.ttl for record in answer.records)
    said = answer.records[: answer.answers]
    kind = struct.unpack("!H", answer.question[-4:-2])[0]
    positive = answer.rcode == Rcode.NOERROR and any(kind in (r.type, Type.ANY) for r in said)
    if positive:
        return min(shortest, TTL_LONGEST)
    # RFC 2308 section 5: a negative answer is good for what its SOA says, and without one not at all.
    for record in answer.records[answer.answers : answer.answers + answer.authorities]:
        if record.type == Type.SOA and record.end - record.data_at >= 20:
            minimum: int = _UNSIGNED.unpack_from(data, record.end - 4)[0]
            return min(shortest, minimum, NEGATIVE_LONGEST)
    return 0


def aged(data: bytes, answer: Answer, seconds: int) -> bytes:
    """The header, question and records, each with its TTL less the time that went by."""
    body = bytearray(data[: body_end(answer)])
    if seconds > 0:
        for record in answer.records:
            _UNSIGNED.pack_into(body, record.ttl_at, max(0, record.ttl - seconds))
    return bytes(body)
