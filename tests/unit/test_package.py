"""The package's front door: every public name is there, and importing it is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import get_args, get_type_hints

import guestnet
import pytest
from guestnet import errors


def test_every_public_name_is_importable() -> None:
    for name in guestnet.__all__:
        value = getattr(guestnet, name)
        assert value is getattr(import_module(guestnet._MODULE_OF[name]), name)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = guestnet.nothing_like_it


def test_the_type_checker_sees_the_same_names() -> None:
    tree = ast.parse(Path(guestnet.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {(n.module, a.name) for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == {(module, name) for name, module in guestnet._MODULE_OF.items()} | {
        ("typing", "Any") for _ in ()
    }


def returned_by(owner: type) -> set[type]:
    """The classes of guestnet that public methods and properties of a class give."""
    found: set[type] = set()
    for name, member in vars(owner).items():
        if name.startswith("_"):
            continue
        function = member.fget if isinstance(member, property) else member
        if not callable(function):
            continue
        home = vars(import_module(owner.__module__))
        names = {**vars(guestnet), **{n: getattr(guestnet, n) for n in guestnet.__all__}, **home}
        hint = get_type_hints(function, names).get("return")
        found |= {
            one for one in flatten(hint) if isinstance(one, type) and one.__module__.startswith("guestnet")
        }
    return found


def flatten(hint: object) -> list[object]:
    arguments = hint if isinstance(hint, list) else get_args(hint)
    return [hint, *(inner for argument in arguments for inner in flatten(argument))]


@pytest.mark.parametrize(
    "owner", ["NatNetwork", "Services", "Endpoint", "NatEngine", "DhcpServer", "Dhcp6Server", "PcpServer"]
)
def test_what_public_methods_return_is_public(owner: str) -> None:
    found = returned_by(getattr(guestnet, owner))
    missing = {one.__name__ for one in found} - set(guestnet.__all__)
    assert not missing - {"DhcpReply"}, "DhcpReply is between the server and the data plane"


def test_the_version_is_that_of_the_package() -> None:
    assert guestnet.__version__ == metadata.version("guestnet")
    assert "__version__" in dir(guestnet)


def test_every_error_is_public() -> None:
    classes = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert classes <= set(guestnet.__all__)
    assert all(issubclass(getattr(errors, n), errors.GuestnetError) for n in classes)
    assert all(getattr(errors, n).__doc__ for n in classes)


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import guestnet", {"asyncio", "pydantic", "rich", "dns", "dataclasses", "ipaddress", "socket"}),
        ("from guestnet import NatConfig, ForwardSpec", {"asyncio", "pydantic", "rich", "dns"}),
    ],
)
def test_importing_is_cheap(statement: str, unwanted: set[str]) -> None:
    code = f"import sys; old = set(sys.modules); {statement}; print(*set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not unwanted & set(done.stdout.split())
