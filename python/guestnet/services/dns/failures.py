"""Names that could not be resolved a moment ago.

A stub resolver tries a name as it is, and after a failure with each search domain behind it. glibc and Go
report the outcome of the last try. Were `www.example.org.guestnet.internal` NXDOMAIN while `www.example.org`
could not be resolved, the guest would take a temporary failure for a permanent one. So the server remembers
failures for as long as a stub resolver may take to get to its search list, and answers SERVFAIL to both.

Bounds: `PER_ASKER` names of one guest, `MOST` in all; beyond, the guest that has the most loses its oldest.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

SECONDS = 15.0
"""Longer than the retries of one name take (resolv.conf(5): two of 5 s each)."""
PER_ASKER = 64
MOST = 4096


class TemporaryFailures:
    """Not for several threads. `name` is in wire format and lower case; `now` in seconds."""

    def __init__(self) -> None:
        self._of: dict[object, OrderedDict[bytes, tuple[float, bool]]] = {}
        self._shared: Counter[bytes] = Counter()
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def add(self, name: bytes, asker: object, now: float, *, shared: bool) -> None:
        """A question of `asker` failed. `shared`: it fails for every guest, not for this one alone."""
        names = self._of.setdefault(asker, OrderedDict())
        if name in names:
            self._drop(asker, name)
            names = self._of.setdefault(asker, names)
        names[name] = (now + SECONDS, shared)
        self._total += 1
        if shared:
            self._shared[name] += 1
        while names and (len(names) > PER_ASKER or next(iter(names.values()))[0] <= now):
            self._drop(asker, next(iter(names)))
        if self._total > MOST:
            most = max(self._of, key=lambda one: len(self._of[one]))
            self._drop(most, next(iter(self._of[most])))

    def has(self, name: bytes, asker: object, now: float) -> bool:
        """Whether the name failed for this guest, or for all, within the last `SECONDS`."""
        own = self._of.get(asker, OrderedDict()).get(name)
        if own is not None and own[0] > now:
            return True
        if name not in self._shared:
            return False
        entries = (names.get(name) for names in self._of.values())
        return any(entry is not None and entry[1] and entry[0] > now for entry in entries)

    def remove(self, name: bytes) -> None:
        """The name has an answer, perhaps that there is none."""
        if name in self._shared:
            for asker in [one for one, names in self._of.items() if name in names]:
                self._drop(asker, name)

    def clear(self) -> None:
        """Forgets everything: there are other name servers now."""
        self._of.clear()
        self._shared.clear()
        self._total = 0

    def _drop(self, asker: object, name: bytes) -> None:
        names = self._of[asker]
        _, shared = names.pop(name)
        self._total -= 1
        if shared:
            self._shared[name] -= 1
            if not self._shared[name]:
                del self._shared[name]
        if not names:
            del self._of[asker]
