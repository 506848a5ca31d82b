"""Imports asyncio without what a network of one command hardly ever uses: 4 ms of 14.

Theory of operation: asyncio and traceback import modules for TLS, for debugging and for connections by name,
and use them in few functions. An empty module stands for each of these until somebody uses it. Then it
imports the real module, and has its content. So nothing is missing, and whoever imports the module later gets
it as usual.
"""

from __future__ import annotations

import sys
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any

_LATE = ("inspect", "linecache", "ssl", "textwrap", "asyncio.sslproto", "asyncio.staggered")

_lock = Lock()


class LateModule(ModuleType):
    """Stands for a module that is imported when it is used."""

    def __getattr__(self, name: str) -> Any:
        own = self.__name__
        with _lock:
            if sys.modules.get(own) is self:
                del sys.modules[own]
        module = import_module(own)  # not under the lock: the import has locks of its own
        self.__dict__.update(vars(module))
        return getattr(module, name)


def import_asyncio() -> None:
    """Imports asyncio, with late modules in place of those that are not there yet."""
    if "asyncio" in sys.modules:
        return
    for name in _LATE:
        sys.modules.setdefault(name, LateModule(name))
    asyncio = import_module("asyncio")
    for name in _LATE:
        package, _, module = name.rpartition(".")
        if package:
            setattr(asyncio, module, sys.modules[name])  # as an import of it does
