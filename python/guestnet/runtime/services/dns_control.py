"""Keeps the DNS forwarder of a running network up to date, and answers its questions.

The authority is `DnsServer`. Down go the names that it may know something of, the name servers, and every
change of these, so that what was true before a change is not said after it. Up come questions for names that
may be the network's own. About once a second a question also comes for another name: the name servers are
looked at whenever one is asked, so another resolv.conf is followed within a second, and nothing runs while
nobody asks.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from ipaddress import ip_address
from threading import Lock
from typing import TYPE_CHECKING

from guestnet.errors import BusyError, GuestnetError
from guestnet.services.dns.labels import Rcode

if TYPE_CHECKING:
    from guestnet import _native
    from guestnet.control.channel import Control
    from guestnet.runtime.registry import Registry
    from guestnet.services.dns import DnsServer
    from guestnet.services.dns.resolvers import Resolvers

_log = logging.getLogger("guestnet")

_LOOK_SECONDS = 0.5
"""For so long the name servers are not looked at again."""
_REPEAT_SECONDS = 25.0
"""Each packet thread reports a silent name server every 30 s; only the first report is logged."""


class DnsControl:
    """Of one session; `close` when it ends. Changes may come from any thread."""

    def __init__(
        self, control: Control, dns: DnsServer, registry: Registry, service: int, *, proxied: bool = False
    ) -> None:
        self._proxied = proxied
        """Name servers are asked through a proxy: over TCP, and none that would ask around it."""
        self._control, self._dns, self._registry, self._service = control, dns, registry, service
        self._lock = Lock()
        self._generation = 0
        """Counts the changes. An answer is cached with what this was before it was looked up."""
        self._told: Resolvers | None = None
        self._looked_at = 0.0
        self._silent: dict[tuple[object, int], tuple[str, float]] = {}

    def open(self) -> None:
        """Tells what there is, and from now on what changes."""
        self._dns.changed = self._records_changed
        self._registry.renamed = self._guests_changed
        self._records_changed()
        self._look()

    def close(self) -> None:
        """Tells nothing any more."""
        self._dns.changed = lambda: None
        self._registry.renamed = lambda: None

    def name_servers_changed(self) -> None:
        """Others are asked from now on, or none."""
        self._looked_at = 0.0
        self._look()

    def question(self, event: _native.DnsQuestion) -> None:
        """Answers a question of the forwarder."""
        self._look()
        plane, generation = self._control.plane, self._generation
        try:
            answer = self._dns.lookup(event.name, event.kind)
        except Exception:
            # A defect here must not take names from a guest for longer than one question.
            _log.exception("a DNS query failed")
            self._control.post(plane.answer_dns, event.port, event.ticket, generation, Rcode.SERVFAIL, [], [])
            return
        if answer is None:
            self._control.post(plane.forward_dns, event.port, event.ticket, generation)
            return
        self._control.post(
            plane.answer_dns,
            event.port,
            event.ticket,
            generation,
            answer.rcode,
            answer.answers,
            answer.authority,
            answer.searched,
            answer.target,
        )

    def name_server(self, event: _native.NameServer) -> None:
        """Logs that a name server does not respond, or does so again; once for all packet threads."""
        server, trouble = event.server, event.trouble
        if trouble is None:
            if self._silent.pop(server, None) is not None:
                _log.info("the name server %s answers again", server[0])
            return
        now = time.monotonic()
        before, at = self._silent.get(server, ("", 0.0))
        if before != trouble or now - at >= _REPEAT_SECONDS:
            self._silent[server] = trouble, now
            _log.info("the name server %s does not answer: %s", server[0], trouble)

    def _look(self) -> None:
        """Tells the forwarder of the name servers, when there are others."""
        now = time.monotonic()
        if self._told is not None and now - self._looked_at < _LOOK_SECONDS:
            return
        found = self._dns.name_servers()
        self._looked_at = now
        if found is self._told:
            return
        servers = []
        for server in found.servers:
            text = server.text()
            if text is None:
                _log.warning("the name server %s is left out: its interface is not there", server.host)
            elif self._proxied and ip_address(server.host).is_loopback:
                _log.warning(
                    "the name server %s is left out: it would ask around the proxy; choose another (--dns)",
                    server.host,
                )
            else:
                servers.append(text)
        told = self._control.post(
            self._control.plane.set_name_servers,
            servers,
            timeout=found.timeout,
            attempts=found.attempts,
            rotate=found.rotate,
            use_tcp=found.use_tcp or self._proxied,
        )
        self._told = found if told else None
        self._silent.clear()

    def _records_changed(self) -> None:
        with self._lock:
            self._generation += 1
            self._tell(self._set)

    def _guests_changed(self) -> None:
        with self._lock:
            self._generation += 1
            self._tell(lambda: self._control.plane.forget_guest_names(self._generation))

    def _set(self) -> int:
        own = self._dns.own_names()
        return self._control.plane.set_dns_zones(self._service, self._generation, own)

    def _tell(self, command: Callable[[], int]) -> None:
        try:
            command()
        except BusyError:
            # Later, and then of everything: what came before may be missing too.
            with contextlib.suppress(RuntimeError):
                self._control.loop.call_soon_threadsafe(self._control.ensure, self._set)
        except GuestnetError:
            pass  # the network ends
