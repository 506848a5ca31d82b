"""Names that the packet threads answer by themselves: what they may say, kept up from here.

The DNS service is the authority. It sends along which names may be the network's own, allows for a while to
ask a name server for all others, and gives answers that may be given again. A change of records, guests or
name servers gets the next number and is told at once; what was found before it is not taken after it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING

from guestnet.errors import BusyError, GuestnetError

if TYPE_CHECKING:
    from guestnet import _native
    from guestnet.control.channel import Control
    from guestnet.runtime.registry import Registry
    from guestnet.services.dns import DnsServer
    from guestnet.services.dns.server import Reply

_RENEW_SECONDS = 0.5
"""A permission that is younger is not renewed; the packet threads have theirs looked at after a second."""


class Names:
    """Of one session; `close` when it ends. Changes may come from any thread."""

    def __init__(self, control: Control, dns: DnsServer, registry: Registry, service: int) -> None:
        self._control, self._dns, self._registry, self._service = control, dns, registry, service
        self._lock = Lock()
        self._allowed = 0
        self._allowed_at = 0.0
        self.generation = 0
        """Of the changes. An answer is kept with what this was before it was looked for."""

    def open(self) -> None:
        """Tells what there is, and from now on what changes."""
        self._dns.changed = self._records_changed
        self._registry.renamed = self._guests_changed
        self._records_changed()

    def close(self) -> None:
        """Tells nothing any more."""
        self._dns.changed = lambda: None
        self._registry.renamed = lambda: None

    def renew(self) -> None:
        """A query has come: allows to go on asking others, where that is due."""
        now = time.monotonic()
        if self._allowed == self.generation and now - self._allowed_at < _RENEW_SECONDS:
            return
        server = self._dns.server()  # it may find that they have changed
        generation = self.generation
        if self._control.post(self._control.plane.allow_names, generation, server):
            self._allowed, self._allowed_at = generation, now

    def keep(self, event: _native.Datagram, reply: Reply, generation: int) -> None:
        """What was replied may be replied again."""
        if reply.keep is not None and generation == self.generation:
            keep = self._control.plane.keep_name
            self._control.post(keep, event.port, generation, reply.own, event.payload, reply.keep)

    def _records_changed(self) -> None:
        with self._lock:
            self.generation += 1
            self._tell(self._set)

    def _guests_changed(self) -> None:
        with self._lock:
            self.generation += 1
            self._tell(lambda: self._control.plane.forget_guest_names(self.generation))

    def _set(self) -> int:
        own = self._dns.own_names()
        return self._control.plane.set_names(self._service, self.generation, own)

    def _tell(self, command: Callable[[], int]) -> None:
        try:
            command()
        except BusyError:
            # Later, and then of everything: what came before may be missing too.
            with contextlib.suppress(RuntimeError):
                self._control.loop.call_soon_threadsafe(self._control.ensure, self._set)
        except GuestnetError:
            pass  # the network ends
