"""NatNetwork: a network for guests, for synchronous and for asyncio programs.

A control thread does the work, so guests are served whatever the program does. Each method that changes
something waits until the change is done. Its counterpart with an `a` in front (`acreate_endpoint`) does the
same for asyncio.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from guestnet.api.description import DescriptionMethods
from guestnet.api.monitoring import MonitoringMethods
from guestnet.api.rings import RingMethods
from guestnet.control.event_hub import Emitter, EventHub
from guestnet.control.portal import blocking, in_thread
from guestnet.control.runtime import Runtime, implicit_runtime
from guestnet.errors import AlreadyRunning, ConfigError, ForwardNotFound, GuestnetError
from guestnet.model.handles import Ids
from guestnet.model.spec import NatConfig
from guestnet.model.stats import NetworkStats
from guestnet.runtime.attachments import KeptAttachments, Listener
from guestnet.runtime.policy.denial_log import DenialLog
from guestnet.runtime.policy.limits import LimitBook
from guestnet.runtime.policy.policy_control import PolicyBook
from guestnet.runtime.published.forward import Forward
from guestnet.runtime.registry import Registry
from guestnet.runtime.services.service_host import Services
from guestnet.runtime.session import Doors, Session, SessionParts
from guestnet.runtime.session_end import began, claim, end, end_unheld

if TYPE_CHECKING:
    from guestnet.model.network_state import NetworkState

_numbers = itertools.count(1)
"""Of networks without a name."""


class NatNetwork(DescriptionMethods, MonitoringMethods, RingMethods):
    """A network: one virtual segment with a gateway, its services, and a way out.

    `NatNetwork(subnet="10.9.0.0/24")` is short for `NatNetwork(NatConfig(subnet="10.9.0.0/24"))`: every
    setting of `NatConfig` is accepted.

    `with` and `async with` start it and stop it. It can be started again. Endpoints that were created stay;
    attachments, listeners and forwards end with `stop`. A running network that nobody refers to is stopped,
    with a ResourceWarning. What it returned (endpoints, forwards, listeners) does not keep it.

    Args:
        config: The configuration.
        name: What its events call it; by default network-1, network-2 and so on.
        runtime: The threads to use; by default those that all networks of the process share.
        **settings: Settings of a `NatConfig`, instead of `config`.

    Raises:
        ConfigError: A setting is wrong, or there are settings beside a `config`.
        TypeError: `runtime` is not a `Runtime`.

    Example:
        >>> with NatNetwork(NatConfig(dns_records={"db.example": "192.0.2.5"})) as network:
        ...     vm = network.create_endpoint("vm1", hostname="web")
        ...     guest = network.attach("vm1", "memory")
        ...     forward = network.publish("127.0.0.1:0:web:80")
        ...     len(network), network["vm1"].attachment, str(forward.target)
        (1, 'memory', '192.168.64.2')
        >>> network.is_running
        False
    """

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], *, name: str | None = None, runtime: Runtime | None = None
    ) -> Self:
        """Makes a network as it was when `state` was called.

        Endpoints, guests of listeners, leases and records are there at once. Ports are published, and
        listeners listen, when the network starts; when one of them cannot, it does not start.

        Args:
            state: What `state` returned.
            name: As of `NatNetwork`.
            runtime: As of `NatNetwork`.

        Returns:
            The network, which does not run.

        Raises:
            ConfigError: The state is damaged, or of another version.

        Example:
            >>> from guestnet import NatNetwork
            >>> with NatNetwork(subnet="10.9.0.0/24") as network:
            ...     forward = network.publish("127.0.0.1:0:vm1:80")
            ...     state = network.state()
            >>> with NatNetwork.from_state(state) as again:
            ...     again.config == network.config, again.forwards[0].host_port == forward.host_port
            (True, True)
        """
        from guestnet.model.network_state import NetworkState

        known = NetworkState.from_dict(state)
        made = cls(known.config, name=name, runtime=runtime)
        made._take_over(known)
        made._on_start = known
        return made

    def __init__(
        self,
        config: NatConfig | None = None,
        *,
        name: str | None = None,
        runtime: Runtime | None = None,
        **settings: Any,
    ) -> None:
        if config is None:
            config = NatConfig(**settings)
        elif not isinstance(config, NatConfig):
            raise ConfigError(f"{config!r} is not a NatConfig: make one with NatConfig(subnet=...).")
        elif settings:
            raise ConfigError(
                f"{', '.join(settings)} cannot be given beside a NatConfig: give all settings to NatConfig."
            )
        if runtime is not None and not isinstance(runtime, Runtime):
            raise TypeError(f"{runtime!r} is not a Runtime: make one with Runtime(), or leave it out.")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name {name!r} is not text: give one such as 'lab'.")
        self._name = name or f"network-{next(_numbers)}"
        self._config = config
        self._runtime = runtime or implicit_runtime()
        self._registry = Registry(self._config)
        self._registry.network = weakref.ref(self)
        self._kept = KeptAttachments()
        self._finalizer: weakref.finalize[[Session], NatNetwork] | None = None
        self._services = Services(self._config, self._registry)
        self._session: Session | None = None
        self._policies = PolicyBook(self._config.policy)
        self._limits = LimitBook(self._config.limit, self._config.guest_limit)
        self._denials = DenialLog()
        self._changing = threading.Lock()
        self._ids = Ids()
        self._runs = 0
        this = weakref.ref(self)  # nothing that the network holds, or gives away, is to hold it
        self._events = EventHub(self._name, partial(_tell_flows, this))
        self._doors = Doors(
            close_forward=partial(_close_forward, this), close_listener=partial(_close_listener, this)
        )
        self._last_stats = NetworkStats()
        self._datapath = None
        self._on_start: NetworkState | None = None
        """What is to be opened with the next start."""
        self._process = os.getpid()

    @classmethod
    def with_defaults(cls) -> Self:
        """Makes a network with the default configuration.

        Returns:
            The network.
        """
        return cls(NatConfig())

    def __repr__(self) -> str:
        state, connections = ("running", self.stats().connections) if self.is_running else ("stopped", 0)
        return (
            f"<NatNetwork {self._config.subnet} {self._config.mode} gateway={self.gateway} "
            f"endpoints={self.endpoint_count} connections={connections} {state}>"
        )

    async def astart(self) -> None:
        """Starts the network. When `astart` is cancelled, the network does not run.

        Raises:
            AlreadyRunning: It runs already.
            DataPlaneError: The system does not allow it.
        """
        await in_thread(self._start, self._stop)

    start = blocking(astart)

    async def aclose(self) -> None:
        """Stops the network. Flows end, and guests lose their network. Nothing happens when it does not run.

        Raises:
            GuestnetError: It was called in the control thread, which it would wait for.
        """
        await in_thread(self._stop)

    astop = aclose
    close = blocking(aclose)
    stop = blocking(aclose)

    def _start(self) -> None:
        self._leave_parent()
        with self._changing:
            if self._session is not None:
                raise AlreadyRunning("The network runs already: stop it before you start it again.")
            self._runs += 1
            session = Session(
                SessionParts(
                    config=self._config,
                    registry=self._registry,
                    services=self._services,
                    runtime=self._runtime,
                    emit=Emitter(self._events),
                    ids=self._ids,
                    run=self._runs,
                    doors=self._doors,
                    policies=self._policies,
                    limits=self._limits,
                    denials=self._denials,
                    name=self._name,
                    kept=self._kept,
                )
            )
            self._events.open(self._runtime.callbacks)
            session.control.start()
            try:
                session.control.wait(session.open())
            except BaseException:
                self._end(session)
                raise
            self._session = session
            began(session)
            self._finalizer = weakref.finalize(self, end_unheld, session)
            self._finalizer.atexit = False
        if self._on_start is not None:
            try:
                for forward in self._on_start.forwards:
                    self.publish(forward)
                for kind, path in self._on_start.listeners:
                    self.listen(kind, path)
            except BaseException:
                self._stop()
                raise
            self._on_start = None

    def _stop(self) -> None:
        self._leave_parent()
        with self._changing:
            session = self._session
            if session is None:
                return
            if session.control.is_own_thread:
                raise GuestnetError(
                    "stop() was called in the control thread, which it would wait for: "
                    "call it from another thread."
                )
            self._session = None
            if self._finalizer is not None:
                self._finalizer.detach()
            if claim(session):
                self._end(session)
        self._events.close()

    def _leave_parent(self) -> None:
        """In a process that was forked from the one with the network: what runs there does not run here."""
        if self._is_fork:
            # A thread that is not here may hold the old one.
            self._changing = threading.Lock()
            self._session = None
            self._process = os.getpid()

    def _end(self, session: Session) -> None:
        try:
            end(session)
        finally:
            self._last_stats = NetworkStats.from_native(session.control.plane.stats())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        await self.astart()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def amaintenance(self) -> None:
        """Ends leases that are over and frees addresses that were declined, now and not some time later.

        Flows expire without it.
        """
        await self._do(self._maintain())

    maintenance = blocking(amaintenance)

    async def _maintain(self) -> None:
        if self._session is not None:
            self._session.maintain()
        else:
            self._registry.tidy()
        if self._datapath is not None:
            self._datapath.maintenance()


def _tell_flows(this: weakref.ref[NatNetwork], on: bool) -> None:
    if (network := this()) is not None:
        network._ask_for_flows(on)


async def _close_forward(this: weakref.ref[NatNetwork], forward: Forward) -> None:
    if (network := this()) is not None and network._running() is not None:
        with contextlib.suppress(ForwardNotFound):
            await network.aunpublish(forward)


async def _close_listener(this: weakref.ref[NatNetwork], listener: Listener) -> None:
    if (network := this()) is not None and (session := network._running()) is not None:
        await network._do(session.stop_listening(listener))
