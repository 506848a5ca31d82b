"""Lists of objects that have ids: forwards, listeners, attachments."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Protocol, SupportsIndex, TypeVar, overload


class HasId(Protocol):
    """Something with an id."""

    @property
    def id(self) -> str: ...


_T = TypeVar("_T", bound=HasId)


class Handles(list[_T]):
    """A list whose items can also be found by id.

    Example:
        >>> from guestnet import NatNetwork
        >>> with NatNetwork() as network:
        ...     forward = network.publish("127.0.0.1:0:vm1:80")
        ...     network.forwards[forward.id] is forward is network.forwards[0]
        True
    """

    def __init__(self, items: Iterable[_T], what: str, missing: type[Exception] = LookupError) -> None:
        super().__init__(items)
        self._what, self._missing = what, missing

    @overload
    def __getitem__(self, key: SupportsIndex) -> _T: ...
    @overload
    def __getitem__(self, key: slice) -> list[_T]: ...
    @overload
    def __getitem__(self, key: str) -> _T: ...

    def __getitem__(self, key: SupportsIndex | slice | str) -> _T | list[_T]:
        if not isinstance(key, str):
            return super().__getitem__(key)
        found = self.find(key)
        if found is None:
            known = ", ".join(item.id for item in self[:8]) or "none"
            raise self._missing(f"There is no {self._what} {key!r} (any more). Known ids: {known}.")
        return found

    def find(self, id: str) -> _T | None:
        """Finds an item.

        Args:
            id: The id of the item.

        Returns:
            The item, None when there is none with this id.
        """
        return next((item for item in self if item.id == id), None)


class Ids:
    """Gives ids that are unique for the life of a network: forward-1, forward-2, listener-1."""

    def __init__(self) -> None:
        self._counts: dict[str, itertools.count[int]] = {}

    def next(self, what: str) -> str:
        """The next id of a kind of object."""
        return f"{what}-{next(self._counts.setdefault(what, itertools.count(1)))}"
