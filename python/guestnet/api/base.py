"""What every part of a network's interface uses: its state, and the way to the control thread.

`runtime.network.NatNetwork` sets the attributes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Coroutine
from functools import partial
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, TypeVar

from guestnet.control.event_hub import EventHub
from guestnet.control.portal import blocking, is_blocking, outcome
from guestnet.control.runtime import Runtime
from guestnet.errors import (
    GuestnetError,
    NotRunning,
)
from guestnet.model.handles import Ids
from guestnet.model.spec import NatConfig
from guestnet.model.stats import NetworkStats
from guestnet.runtime.attachments import (
    KeptAttachments,
)
from guestnet.runtime.registry import Registry
from guestnet.runtime.services.service_host import Services
from guestnet.runtime.session import Session

if TYPE_CHECKING:
    from guestnet.runtime.policy.denial_log import DenialLog
    from guestnet.runtime.policy.limits import LimitBook
    from guestnet.runtime.policy.policy_control import PolicyBook

_T = TypeVar("_T")


class NetworkBase:
    """State of a network, and how its methods reach the control thread."""

    _config: NatConfig
    _name: str
    _runtime: Runtime
    _registry: Registry
    _services: Services
    _session: Session | None
    _kept: KeptAttachments
    """Attachments of this run, by port."""
    _ids: Ids
    _events: EventHub
    _policies: PolicyBook
    _limits: LimitBook
    _denials: DenialLog
    _last_stats: NetworkStats
    """Those of the last run."""
    _process: int
    """The process that it runs in."""

    @property
    def config(self) -> NatConfig:
        """The configuration."""
        return self._config

    @property
    def name(self) -> str:
        """The name, unique in this process unless the program gave the same one twice."""
        return self._name

    @property
    def runtime(self) -> Runtime:
        """The threads that it shares with other networks."""
        return self._runtime

    @property
    def gateway(self) -> IPv4Address:
        """The address of the gateway."""
        return self._config.gateway

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped, in this process."""
        return self._session is not None and not self._is_fork

    @property
    def services(self) -> Services:
        """What the gateway serves: `services.dns`, `services.dhcp`, `services.pcp`."""
        return self._services

    def _ask_for_flows(self, on: bool) -> None:
        """Says to the packet threads whether events of flows are wanted."""
        session = self._running()
        if session is not None:
            control = session.control
            denials = on or not self._policies.is_empty
            tell = partial(control.plane.tell_flows, on, denials=denials)
            if not control.post(tell):
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    control.loop.call_soon_threadsafe(control.ensure, tell)

    @property
    def _is_fork(self) -> bool:
        """Whether the network runs in the process that this one was forked from, and its threads with it."""
        return self._process != os.getpid()

    def _running(self) -> Session | None:
        """The session, when there is one in this process."""
        return None if self._is_fork else self._session

    def _here(self) -> Session | None:
        session = self._session
        if session is not None and self._is_fork:
            raise NotRunning(
                "The network runs in the process that this one was forked from: use it there, "
                "or start one here."
            )
        return session

    def _live(self) -> Session:
        session = self._here()
        if session is None:
            raise NotRunning("The network does not run: start it first.")
        return session

    async def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Does work in the control thread; here, when there is no such thread."""
        try:
            session = self._here()
        except NotRunning:
            work.close()
            raise
        if session is None:
            return _finish(work)
        if not session.control.is_own_thread:
            return await outcome(session.control.submit(work))
        if is_blocking():
            work.close()
            raise GuestnetError(
                "This was called in the control thread, which it would wait for: "
                "call it from another thread, or await its asynchronous counterpart in a task."
            )
        return await work

    _run = blocking(_do)


def _finish(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as done:
        value: _T = done.value
        return value
    work.close()
    raise NotRunning("The network does not run: start it first.")
