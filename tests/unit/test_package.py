"""The package's front door: every public name is there, and importing it is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

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
