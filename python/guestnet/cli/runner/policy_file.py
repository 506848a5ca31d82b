"""Follows the file of `--policy`: when it changes, the new policy is put in force.

Theory of operation: the file is looked at every two seconds, in a thread that exists only with `--policy`. A
file that is wrong changes nothing and is reported once for each of its contents.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from guestnet.cli.policy_options import policy_of
from guestnet.cli.runner import confined
from guestnet.errors import GuestnetError

if TYPE_CHECKING:
    from guestnet.runtime.network import NatNetwork

_LOOK_SECONDS = 2.0


class PolicyFile:
    """The file of a running command, until it is closed. `say` reports what came of a change."""

    def __init__(self, network: NatNetwork, options: argparse.Namespace, say: Callable[[str], None]) -> None:
        self._network, self._options, self._say = network, options, say
        self._path: str = options.policy
        self._seen = self._look()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guestnet-policy-file", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the watch."""
        self._ending.set()
        self._thread.join()

    def reload(self) -> None:
        """Reads the file, and puts its policy in force when it is right."""
        with self._lock:
            self._seen = self._look()
            try:
                cut = self._network.set_policy(policy_of(self._options))
            except GuestnetError as error:
                self._say(f"the policy stays as it was: {error}")
                return
            self._say(f"the policy {self._path} was read again, {cut} flows were cut")

    def _run(self) -> None:
        confined.settle_thread()
        while not self._ending.wait(_LOOK_SECONDS):
            if self._look() != self._seen:
                self.reload()

    def _look(self) -> tuple[int, int, int] | None:
        try:
            about = os.stat(self._path)
        except OSError:
            return None
        return about.st_ino, about.st_size, about.st_mtime_ns
