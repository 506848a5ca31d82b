"""Modules that asyncio is imported without are there when somebody uses them."""

from __future__ import annotations

import subprocess
import sys

import pytest

_START = """
import sys
from guestnet.cli.runner.late_modules import _LATE, LateModule, import_asyncio
import_asyncio()
late = {name for name in _LATE if isinstance(sys.modules[name], LateModule)}
"""


def _run(program: str) -> None:
    subprocess.run([sys.executable, "-c", _START + program], check=True, timeout=60)


def test_asyncio_is_imported_without_them_and_works() -> None:
    """Where Python itself imports one of them at its start, that one is no gain, and no loss."""
    _run("assert {'inspect', 'ssl', 'asyncio.sslproto', 'asyncio.staggered'} <= late, late")
    _run("import asyncio; assert asyncio.run(asyncio.sleep(0, 5)) == 5")
    _run("assert len(late) > 3; import_asyncio(); assert all(sys.modules[name] for name in late)")


@pytest.mark.parametrize(
    "use",
    [
        "import inspect; assert inspect.isfunction(import_asyncio)",
        "from inspect import isfunction; assert isfunction(import_asyncio)",
        "import ssl; assert ssl.create_default_context() is not None",
        "import asyncio.sslproto; assert asyncio.sslproto.SSLProtocol.__name__ == 'SSLProtocol'",
        "import asyncio; assert asyncio.iscoroutinefunction(asyncio.sleep)",
        "import asyncio.base_events; assert asyncio.base_events.staggered.staggered_race",
        "import traceback; assert 'y' in traceback.format_list([('x', 1, 'f', 'y')])[0]",
        "import linecache; assert linecache.getline(linecache.__file__, 1)",
        "import dataclasses; assert dataclasses.make_dataclass('A', ['a'])(1).a == 1",
    ],
)
def test_each_is_there_when_it_is_used(use: str) -> None:
    _run(use)


def test_a_used_module_is_the_real_one() -> None:
    _run(
        "import inspect as early; early.isclass; import inspect\n"
        "assert not isinstance(inspect, LateModule) and inspect.isclass is early.isclass\n"
        "assert inspect.__file__ == early.__file__"
    )


def test_what_a_module_does_not_have_is_still_missing() -> None:
    _run("import inspect; assert not hasattr(inspect, 'nothing') and hasattr(inspect, 'isclass')")


def test_many_threads_may_use_one_first() -> None:
    _run(
        "import asyncio.coroutines, threading\n"
        "found, gate = [], threading.Barrier(8)\n"
        "def use():\n"
        "    gate.wait(); found.append(asyncio.coroutines.inspect.isclass(int))\n"
        "threads = [threading.Thread(target=use) for _ in range(8)]\n"
        "for one in threads: one.start()\n"
        "for one in threads: one.join()\n"
        "assert found == [True] * 8, found"
    )


def test_a_module_that_cannot_be_imported_now_can_be_later() -> None:
    _run(
        "import asyncio.coroutines, builtins\n"
        "kept, sys.path[:] = list(sys.path), []\n"
        "finders, sys.meta_path[:] = list(sys.meta_path), []\n"
        "try: asyncio.coroutines.inspect.isclass; raise SystemExit('imported')\n"
        "except ImportError: pass\n"
        "sys.path[:], sys.meta_path[:] = kept, finders\n"
        "assert asyncio.coroutines.inspect.isclass(int)"
    )
