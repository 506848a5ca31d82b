"""Policies in files: TOML and JSON, and where in the file an error is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Callable
from datetime import datetime
from typing import Any

from guestnet.errors import PolicyError
from guestnet.policy.destination import _short

BYTES_MOST = 256 << 20
_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*(?:rule|'rule'|\"rule\")[ \t]*\]\]", re.MULTILINE)


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The keys of a TOML file. Raises PolicyError."""
    if not isinstance(text, str):
        raise PolicyError(f"{name} is not text: write TOML.")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise PolicyError(f"{name} is nested too deeply: write tables [[rule]] with plain values.") from None
    except (tomllib.TOMLDecodeError, ValueError, OverflowError) as error:
        raise PolicyError(f"{name} is no TOML: {error}.") from None


def located(text: str, name: str, rule: int | None, error: PolicyError) -> PolicyError:
    """The error with the place in the TOML file that it is about.

    Args:
        text: The content of the file.
        name: What errors call it.
        rule: The number of the rule, from 1; None when the error is about none.
        error: The error.

    Returns:
        An error that names the place.
    """
    line = _line_of_key(text, str(error)) if rule is None else line_of_rule(text, rule)
    return PolicyError(f"{name}{line}: {error}")


def line_of_rule(text: str, number: int) -> str:
    """Where a rule is in a TOML file, as text behind its name; empty when it is not found.

    >>> line_of_rule("default = 'deny'\\n[[rule]]\\naction = 'allow'\\n", 1)
    ', line 2'
    """
    for at, found in enumerate(_HEADER.finditer(text), 1):
        if at == number:
            return f", line {text.count(chr(10), 0, found.start()) + 1}"
    return ""


def _line_of_key(text: str, message: str) -> str:
    for key in re.findall(r"[A-Za-z_]+", message)[:12]:
        found = re.search(rf"^[ \t]*{re.escape(key)}[ \t]*=", text, re.MULTILINE)
        if found:
            return f", line {text.count(chr(10), 0, found.start()) + 1}"
    return ""


def parse_json(text: str, name: str) -> Any:
    """The content of a JSON file. Raises PolicyError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise PolicyError(f"{name} is nested too deeply: write a list of rules with plain values.") from None
    except (ValueError, TypeError) as error:
        raise PolicyError(f"{name} is no JSON: {error}.") from None


def read_file(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The path of a policy file and its text. Raises PolicyError."""
    name = _path(path)
    try:
        with open(name, "rb") as file:
            data = file.read(BYTES_MOST + 1)
    except OSError as error:
        why = (error.strerror or "unknown error").lower()
        raise PolicyError(f"The policy file {name!r} cannot be read: {why}.") from error
    if len(data) > BYTES_MOST:
        raise PolicyError(
            f"The policy file {name!r} is over {BYTES_MOST >> 20} MiB: split or merge its rules."
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PolicyError(
            f"The policy file {name!r} is not UTF-8 at byte {error.start}: save it as UTF-8."
        ) from None
    return name, text


def write_file(path: str | os.PathLike[str], as_toml: Callable[[], str], as_json: Callable[[], str]) -> None:
    """Writes a file as a whole: a reader sees the old content or the new one. Raises PolicyError."""
    name = _path(path)
    text = as_json() + "\n" if name.endswith(".json") else as_toml()
    directory = os.path.dirname(name) or "."
    try:
        fd, temporary = tempfile.mkstemp(prefix=".guestnet-policy-", dir=directory)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o600)
            os.replace(temporary, name)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        why = (error.strerror or "unknown error").lower()
        raise PolicyError(f"The policy file {name!r} cannot be written: {why}.") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises PolicyError when a file cannot be written there later."""
    name = _path(path)
    directory = os.path.dirname(name) or "."
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK) or os.path.isdir(name):
        raise PolicyError(f"The policy file {name!r} cannot be written: name a file in a directory of yours.")


def _path(path: str | os.PathLike[str]) -> str:
    name: object = path
    if isinstance(path, os.PathLike):
        name = os.fspath(path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise PolicyError(f"The policy file {_short(path)} is no path: write one such as 'policy.toml'.")
    return name


def dump_toml(values: dict[str, Any]) -> str:
    """The keys of a policy file as TOML."""
    values = dict(values)
    rules = values.pop("rule", [])
    blocks = ["".join(f"{key} = {_value(value)}\n" for key, value in values.items())]
    for rule in rules:
        lines = "".join(f"{key} = {_value(value)}\n" for key, value in rule.items())
        blocks.append(f"[[rule]]\n{lines}")
    return "\n".join(blocks)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)
