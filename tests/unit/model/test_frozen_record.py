"""Records: dataclasses for everybody who looks at them, without the time that those take to define."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import ClassVar

import pytest
from guestnet.model.frozen_record import FrozenRecord


class Base(FrozenRecord):
    """Has a field and a constant."""

    kind: ClassVar[str] = "base"
    name: str = "none"


class Child(Base):
    """Adds a field."""

    kind: ClassVar[str] = "child"
    size: int


class Pair(FrozenRecord, kw_only=False):
    """Fields by position, one of them checked."""

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        if self.left < 0:
            raise ValueError("left")
        object.__setattr__(self, "left", int(self.left))


def test_dataclasses_knows_the_fields_of_each_class() -> None:
    assert dataclasses.is_dataclass(Child)
    assert [f.name for f in dataclasses.fields(Base)] == ["name"]
    assert [(f.name, f.type) for f in dataclasses.fields(Child)] == [("name", "str"), ("size", "int")]
    assert dataclasses.fields(Child)[0].default == "none"
    one = Child(size=3)
    assert dataclasses.replace(one, name="x") == Child(size=3, name="x")
    assert dataclasses.asdict(one) == {"name": "none", "size": 3}


def test_values_by_position() -> None:
    assert (Pair(1, 2), Pair(1), Pair(1, right=2)) == (Pair(left=1, right=2), Pair(1, 0), Pair(1, 2))
    match Pair(4, 5):
        case Pair(4, right):
            assert right == 5
        case _:
            pytest.fail("it has no match_args")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Child, "missing the argument 'size'"),
        (lambda: Child(size=1, colour=2), "unexpected argument 'colour'"),
        (lambda: Child(3), "takes 0 positional arguments, not 1"),
        (lambda: Pair(1, 2, 3), "takes 2 positional arguments, not 3"),
        (lambda: Pair(1, left=2), "got the argument 'left' twice"),
    ],
)
def test_wrong_arguments_are_refused(make: object, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        make()  # type: ignore[operator]


def test_a_record_cannot_be_changed_and_is_a_value() -> None:
    one = Pair(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.left = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.left
    assert (hash(one), repr(one)) == (hash(Pair(1, 0)), "Pair(left=1, right=0)")
    assert one != Child(size=1)
    assert one.__eq__(1) is NotImplemented
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one


def test_post_init_checks() -> None:
    assert Pair(True).left == 1
    with pytest.raises(ValueError, match="left"):
        Pair(-1)


def test_defining_and_making_records_imports_no_dataclasses() -> None:
    program = (
        "import sys\n"
        "from guestnet.model.frozen_record import FrozenRecord\n"
        "class Point(FrozenRecord, kw_only=False):\n    x: int\n    y: int = 0\n"
        "assert Point(1) == Point(1, 0) and repr(Point(1)) and 'dataclasses' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
