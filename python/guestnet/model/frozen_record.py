"""Frozen dataclasses that cost nothing to define.

`dataclasses.dataclass` compiles six methods for each class, which takes 0.3 to 1 ms, and `guestnet run`
imports dozens of classes before its command starts. Subclasses of `FrozenRecord` inherit their methods. They
are dataclasses for type checkers and for `dataclasses` (`fields`, `replace`, `asdict`), which is imported
when somebody asks for that.

Fields are given by keyword, or also by position in a class with `kw_only=False`. A default is a value that
cannot be changed. `__post_init__` may check and replace values, with `object.__setattr__`.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, dataclass_transform

_FIELDS = "__dataclass_fields__"


class _Fields:
    """What `dataclasses` knows a class by, made when it is first looked at."""

    def __get__(self, record: object, owner: type[FrozenRecord]) -> dict[str, Any]:
        from dataclasses import dataclass

        kinds: dict[str, Any] = {}
        for base in reversed(owner.__mro__):
            kinds |= getattr(base, "__annotations__", {})
        body = {
            "__doc__": owner.__doc__ or owner.__name__,
            "__module__": owner.__module__,
            "__annotations__": {name: kinds[name] for name in owner._fields},
            **owner._field_defaults,
        }
        make = dataclass(init=False, repr=False, eq=False, match_args=False)
        fields: dict[str, Any] = getattr(make(type(owner.__name__, (), body)), _FIELDS)
        setattr(owner, _FIELDS, fields)
        return fields


@dataclass_transform(frozen_default=True, kw_only_default=True)
class FrozenRecord:
    """Base of frozen dataclasses.

    >>> class Point(FrozenRecord):
    ...     "A point."
    ...     x: int
    ...     y: int = 0
    >>> Point(x=3), Point(x=3) == Point(x=3, y=0)
    (Point(x=3, y=0), True)
    """

    _fields: ClassVar[tuple[str, ...]] = ()
    """The names of the fields, those of base classes first."""
    _field_defaults: ClassVar[dict[str, Any]] = {}
    _by_position: ClassVar[bool] = False

    def __init_subclass__(cls, *, kw_only: bool = True) -> None:
        names = [name for name, kind in cls.__annotations__.items() if not str(kind).startswith("ClassVar")]
        cls._fields = tuple(dict.fromkeys((*cls._fields, *names)))
        cls._field_defaults = cls._field_defaults | {
            name: cls.__dict__[name] for name in names if name in cls.__dict__
        }
        cls._by_position = not kw_only
        if not kw_only:
            cls.__match_args__ = cls._fields  # type: ignore[attr-defined,misc]
        setattr(cls, _FIELDS, _Fields())

    def __init__(self, *values: Any, **named: Any) -> None:
        if values:
            named = self._named(values, named)
        state, defaults = self.__dict__, self._field_defaults
        for name in self._fields:
            if name in named:
                state[name] = named[name]
            elif name in defaults:
                state[name] = defaults[name]
            else:
                raise TypeError(f"{type(self).__name__}() is missing the argument {name!r}")
        if unknown := named.keys() - state.keys():
            raise TypeError(f"{type(self).__name__}() got an unexpected argument {min(unknown)!r}")
        self.__post_init__()

    def __post_init__(self) -> None:
        """Called with all fields set."""

    def _named(self, values: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        if not self._by_position or len(values) > len(self._fields):
            most = len(self._fields) if self._by_position else 0
            raise TypeError(f"{type(self).__name__}() takes {most} positional arguments, not {len(values)}")
        given = dict(zip(self._fields, values, strict=False))
        if twice := given.keys() & named.keys():
            raise TypeError(f"{type(self).__name__}() got the argument {min(twice)!r} twice")
        return given | named

    def __setattr__(self, name: str, value: object) -> None:
        _refuse(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        _refuse(f"cannot delete field {name!r}")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__qualname__}({shown})"

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), *(getattr(self, name) for name in self._fields)))


def _refuse(what: str) -> NoReturn:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(what)
