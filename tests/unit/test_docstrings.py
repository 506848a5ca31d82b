"""The docstrings of the package: examples run, and public names say what they take, return and raise."""

from __future__ import annotations

import ast
import doctest
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import guestnet
import pytest
from guestnet import _native, errors

MODULES = ["guestnet"] + [
    found.name
    for found in pkgutil.walk_packages(guestnet.__path__, "guestnet.")
    if found.name
    not in (
        "guestnet.__main__",
        "guestnet._native",
    )
]
PUBLIC = {name: getattr(guestnet, name) for name in guestnet.__all__}
ERRORS = {name for name, value in vars(errors).items() if inspect.isclass(value)}
KINDS = {
    name
    for name, value in PUBLIC.items()
    if inspect.isclass(value) and issubclass(value, guestnet.NetworkEvent | guestnet.Change)
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed


@pytest.mark.parametrize("name", ["PacketPool", "Ring"])
def test_examples_of_native_classes_run(name: str) -> None:
    found = doctest.DocTestFinder().find(getattr(_native, name), name, module=False, globs=vars(_native))
    runner = doctest.DocTestRunner()
    for one in found:
        runner.run(one)
    assert runner.tries
    assert not runner.failures


BASES = {"GuestnetError", "NetworkEvent", "Change"}


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - ERRORS - KINDS | BASES))
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>> " in (PUBLIC[name].__doc__ or ""), f"{name} has no example"


SERVICE = {"owns", "own_names"}
"""Methods of `DnsServer` that only the network calls."""


def members() -> Iterator[tuple[str, Any]]:
    """Public functions and methods, and those that asyncio has in their place."""
    for name, value in PUBLIC.items():
        if inspect.isclass(value) and name not in ERRORS:
            bases = [base for base in inspect.getmro(value) if base.__module__.startswith("guestnet.")]
            for attribute, member in {
                k: v for base in reversed(bases) for k, v in vars(base).items()
            }.items():
                internal = attribute.startswith("_") or (name == "DnsServer" and attribute in SERVICE)
                if not internal:
                    yield f"{name}.{attribute}", member
        elif callable(value) and not inspect.isclass(value):
            yield name, value


@pytest.mark.parametrize(("name", "member"), [pytest.param(*one, id=one[0]) for one in members()])
def test_public_members_say_what_they_take_return_and_raise(name: str, member: Any) -> None:
    function = getattr(member, "__func__", member)
    if isinstance(member, property):
        assert member.__doc__, f"{name} has no docstring"
        return
    if not inspect.isfunction(function):
        return
    text = inspect.getdoc(function) or ""
    assert text, f"{name} has no docstring"
    sections = dict(zip(*[iter(["", *split(text)])] * 2, strict=False))
    signature = inspect.signature(function)
    for parameter in list(signature.parameters.values())[name.count(".") :]:
        assert f"{parameter.name}:" in sections.get("Args", ""), f"{name} does not explain {parameter.name}"
    if signature.return_annotation not in ("None", None, "Self", inspect.Signature.empty):
        assert "Returns" in sections, f"{name} does not say what it returns"
    for error in raised(function):
        assert error in sections.get("Raises", ""), f"{name} does not say that it raises {error}"


def split(text: str) -> list[str]:
    """The headings of a docstring, each followed by its text; before them what has no heading."""
    parts: list[str] = [""]
    for line in text.splitlines():
        if line in ("Args:", "Returns:", "Raises:", "Example:"):
            parts += [line[:-1], ""]
        else:
            parts[-1] += f"{line}\n"
    return parts


def raised(function: Any) -> set[str]:
    """The errors that the body of a function itself raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    names = {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
    return {name for name in names if name[0].isupper()}
