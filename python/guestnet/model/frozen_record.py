"""Frozen dataclasses that cost little to define.

`dataclasses.dataclass` compiles six methods for each class. There are many classes of events, and
`guestnet run` imports them before its command starts. Subclasses of `FrozenRecord` are dataclasses (for
`fields`, `replace` and type checkers too) whose methods are inherited. They take their fields by keyword.
"""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, dataclass
from typing import Any, dataclass_transform


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

    def __init_subclass__(cls) -> None:
        dataclass(init=False, repr=False, eq=False, match_args=False)(cls)

    def __init__(self, **values: Any) -> None:
        known: dict[str, Any] = getattr(self, "__dataclass_fields__", {})
        for name, field in known.items():
            if field._field_type.name != "_FIELD":  # a ClassVar
                continue
            if name in values:
                value = values[name]
            elif field.default is not MISSING:
                value = field.default
            else:
                raise TypeError(f"{type(self).__name__}() is missing the argument {name!r}")
            object.__setattr__(self, name, value)
        if unknown := values.keys() - known.keys():
            raise TypeError(f"{type(self).__name__}() got an unexpected argument {min(unknown)!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__qualname__}({shown})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))
