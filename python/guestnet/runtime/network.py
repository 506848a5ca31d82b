"""NatNetwork: a network for guests, from synchronous and from asyncio programs.

The work is done in a control thread of its own (`runtime.control`), so guests are served whatever the
program does. Each method that changes something waits until it is done; its twin with an `a` in front
(`acreate_endpoint`) is the same for asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from ipaddress import IPv4Address
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from guestnet.control.callbacks import CallbackQueue
from guestnet.control.in_thread import in_thread
from guestnet.control.runtime import Runtime, implicit_runtime
from guestnet.errors import (
    AlreadyRunning,
    ConfigError,
    EndpointNotFound,
    GuestnetError,
    NotRunning,
)
from guestnet.model.events import EventCallback, NetworkEvent
from guestnet.model.spec import NatConfig, whole_number
from guestnet.model.spec import path as checked_path
from guestnet.model.stats import ConnTrackStats, FlowRecord, NatStats, NetworkStats
from guestnet.runtime.attachments import (
    Attachment,
    Listener,
    MemoryAttachment,
    listening_socket,
    release_descriptor,
    taken_descriptor,
)
from guestnet.runtime.endpoint import Endpoint
from guestnet.runtime.forwards import ForwardSpec, close_sockets, open_sockets
from guestnet.runtime.publishing import Forward
from guestnet.runtime.registry import Registry
from guestnet.runtime.service_host import Services
from guestnet.runtime.session import Session
from guestnet.runtime.session_end import began, claim, end, end_unheld

if TYPE_CHECKING:
    from guestnet.datapath.network_datapath import NetworkDatapath
    from guestnet.nat.engine import NatResult, PacketPool, Ring

_T = TypeVar("_T")


class NatNetwork:
    """A network: one virtual segment with a gateway, its services, and a way out.

    >>> with NatNetwork(NatConfig()) as network:
    ...     vm = network.create_endpoint("vm1")
    ...     network.attach("vm1", "stream", sock=ours)       # QEMU has the other end
    ...     network.publish("8080:80")

    `NatNetwork(subnet="10.9.0.0/24")` is short for `NatNetwork(NatConfig(subnet="10.9.0.0/24"))`: every
    setting of `NatConfig` can be given. Raises ConfigError for a wrong one.

    `with` and `async with` start it and stop it. It can be started again: endpoints that were created stay,
    while attachments, listeners and forwards end with `stop`. A network that runs and that nobody holds any
    more is stopped, with a ResourceWarning; what it handed out (endpoints, forwards, listeners) does not
    hold it.
    """

    def __init__(
        self, config: NatConfig | None = None, *, runtime: Runtime | None = None, **settings: Any
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
        self._config = config
        self._runtime = runtime or implicit_runtime()
        self._registry = Registry(self._config)
        self._registry.network = weakref.ref(self)
        self._memory: dict[int, MemoryAttachment] = {}
        self._finalizer: weakref.finalize[[Session], NatNetwork] | None = None
        self._services = Services(self._config, self._registry)
        self._session: Session | None = None
        self._changing = threading.Lock()
        self._callbacks: list[tuple[EventCallback, bool]] = []
        self._last_stats = NetworkStats()
        self._datapath: NetworkDatapath | None = None
        self._process = os.getpid()

    @classmethod
    def with_defaults(cls) -> Self:
        """A network with the default configuration."""
        return cls(NatConfig())

    # --- what it is ---

    @property
    def config(self) -> NatConfig:
        """The configuration."""
        return self._config

    @property
    def runtime(self) -> Runtime:
        """The threads that it shares with other networks."""
        return self._runtime

    @property
    def gateway(self) -> IPv4Address:
        """The gateway's address."""
        return self._config.gateway

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped, in this process."""
        return self._session is not None and not self._is_fork

    @property
    def services(self) -> Services:
        """What the gateway serves: `services.dns`, `services.dhcp`."""
        return self._services

    def __repr__(self) -> str:
        state, connections = ("running", self.stats().connections) if self.is_running else ("stopped", 0)
        return (
            f"<NatNetwork {self._config.subnet} {self._config.mode} gateway={self.gateway} "
            f"endpoints={self.endpoint_count} connections={connections} {state}>"
        )

    # --- life ---

    def start(self) -> None:
        """Starts it. Raises AlreadyRunning when it runs, DataPlaneError when the system does not let it."""
        self._leave_parent()
        with self._changing:
            if self._session is not None:
                raise AlreadyRunning("The network runs already: stop it before you start it again.")
            session = Session(weakref.ref(self), self._config, self._registry, self._services, self._runtime)
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

    def stop(self) -> None:
        """Stops it; nothing happens when it does not run. Flows end, and guests lose their network."""
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
        session.callbacks.wait()

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

    async def astart(self) -> None:
        """As `start`. When it is cancelled, the network does not run."""
        await in_thread(self.start, self.stop)

    async def aclose(self) -> None:
        """As `stop`."""
        await asyncio.to_thread(self.stop)

    astop = aclose

    def close(self) -> None:
        """As `stop`."""
        self.stop()

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

    # --- endpoints ---

    @property
    def endpoints(self) -> list[Endpoint]:
        """All endpoints, oldest first."""
        return self._registry.all()

    @property
    def endpoint_count(self) -> int:
        """How many endpoints there are."""
        return len(self._registry)

    def get_endpoint(self, id: str) -> Endpoint | None:
        """The endpoint with this id, None when there is none."""
        return self._registry.get(id)

    def __getitem__(self, id: str) -> Endpoint:
        """The endpoint with this id. Raises EndpointNotFound, which is a LookupError."""
        endpoint = self._registry.get(id) if isinstance(id, str) else None
        if endpoint is None:
            raise EndpointNotFound(f"There is no endpoint {id!r}: `endpoints` lists those that are there.")
        return endpoint

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._registry.all())

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self._registry.get(id) is not None

    def __len__(self) -> int:
        return len(self._registry)

    def __bool__(self) -> bool:
        return True  # also without endpoints

    def create_endpoint(
        self,
        id: str,
        *,
        mac: str | bytes | None = None,
        ip: str | IPv4Address | None = None,
        hostname: str | None = None,
    ) -> Endpoint:
        """A new endpoint. Its address is the next free one, or `ip`; its MAC is generated, or `mac`.

        `hostname` is another name for DNS. Raises EndpointExists, AddressPoolExhausted, AddressInUse, or
        ConfigError for a value that is wrong in itself.
        """
        return self._run(self._create(id, mac, ip, hostname))

    async def acreate_endpoint(
        self,
        id: str,
        *,
        mac: str | bytes | None = None,
        ip: str | IPv4Address | None = None,
        hostname: str | None = None,
    ) -> Endpoint:
        """As `create_endpoint`."""
        return await self._arun(self._create(id, mac, ip, hostname))

    async def _create(
        self, id: str, mac: str | bytes | None, ip: str | IPv4Address | None, hostname: str | None
    ) -> Endpoint:
        if self._session is not None:
            return await self._session.create_endpoint(id, mac, ip, hostname)
        return self._registry.create(id, mac, ip, hostname)

    def remove_endpoint(self, id: str) -> None:
        """Removes an endpoint: its flows end, its address is free. Raises EndpointNotFound."""
        self._run(self._remove(id))

    async def aremove_endpoint(self, id: str) -> None:
        """As `remove_endpoint`."""
        await self._arun(self._remove(id))

    async def _remove(self, id: str) -> None:
        if self._session is not None:
            await self._session.remove_endpoint(id)
        else:
            self._registry.remove(id)

    def recall_guest(self, mac: str | bytes, id: str, ip: str | IPv4Address | None = None) -> None:
        """Makes the guest with this MAC the endpoint `id` when it comes to a listener, with the address `ip`
        where that is free. Without it ids go by order of arrival. A static lease of the MAC counts more.
        Raises ConfigError for a value that is wrong.

        >>> network = NatNetwork()
        >>> network.recall_guest("52:54:00:12:34:56", "vm1", "192.168.64.7")
        """
        self._registry.recall(mac, id, ip)

    # --- attachments ---

    @overload
    def attach(
        self, endpoint_id: str, kind: Literal["memory"], *, on_frame: Callable[[bytes], object] | None = None
    ) -> MemoryAttachment: ...
    @overload
    def attach(
        self,
        endpoint_id: str,
        kind: str,
        *,
        fd: int | None = None,
        sock: socket.socket | None = None,
        on_frame: Callable[[bytes], object] | None = None,
    ) -> Attachment: ...

    def attach(
        self,
        endpoint_id: str,
        kind: str,
        *,
        fd: int | None = None,
        sock: socket.socket | None = None,
        on_frame: Callable[[bytes], object] | None = None,
    ) -> Attachment:
        """Joins a guest: `kind` is "tap" (a TAP device), "stream" (QEMU's framing), "dgram" (a frame per
        packet), "vhost-user" (the guest's own memory; a connected socket, or a listening one where the
        front-end may come, go and come again) or "memory" (frames of this process).

        `fd` or `sock` belongs to the network from then on; when it cannot be used (AttachError) it stays
        yours. `on_frame` is called in a thread for callbacks, one frame at a time and in order.
        """
        number = taken_descriptor(kind, fd, sock, on_frame)
        made = self._run(self._live().attach(endpoint_id, kind, number, on_frame))
        release_descriptor(fd, sock)
        return made

    @overload
    async def aattach(
        self, endpoint_id: str, kind: Literal["memory"], *, on_frame: Callable[[bytes], object] | None = None
    ) -> MemoryAttachment: ...
    @overload
    async def aattach(
        self,
        endpoint_id: str,
        kind: str,
        *,
        fd: int | None = None,
        sock: socket.socket | None = None,
        on_frame: Callable[[bytes], object] | None = None,
    ) -> Attachment: ...

    async def aattach(
        self,
        endpoint_id: str,
        kind: str,
        *,
        fd: int | None = None,
        sock: socket.socket | None = None,
        on_frame: Callable[[bytes], object] | None = None,
    ) -> Attachment:
        """As `attach`."""
        number = taken_descriptor(kind, fd, sock, on_frame)
        made = await self._arun(self._live().attach(endpoint_id, kind, number, on_frame))
        release_descriptor(fd, sock)
        return made

    def listen(self, kind: str, path: str | os.PathLike[str]) -> Listener:
        """Makes a socket where guests arrive: "stream" (QEMU), "dgram", "unixgram" (vfkit), or "vhost-user".

        Each guest that comes is an endpoint of its own, as soon as its MAC shows: named by its static lease,
        else vm1, vm2 and so on. A guest that leaves is removed.
        """
        session = self._live()
        with listening_socket(kind, path) as sock:
            return self._run(session.listen(kind, os.fspath(path), sock))

    async def alisten(self, kind: str, path: str | os.PathLike[str]) -> Listener:
        """As `listen`."""
        session = self._live()
        with listening_socket(kind, path) as sock:
            return await self._arun(session.listen(kind, os.fspath(path), sock))

    # --- published ports ---

    @property
    def forwards(self) -> list[Forward]:
        """All published ports."""
        session = self._session
        return [] if session is None else session.publishing.all()

    def publish(self, spec: str | ForwardSpec) -> Forward:
        """Publishes ports of a guest on the host: `[host_ip:]port[-end]:[guest:]port[-end][/tcp|/udp]`.

        The guest is an endpoint's id, its host name or its address; it need not be there yet. Without one
        the only guest is meant. All ports of a range are published or none. Raises PortInUse.

        With the uplink "tun" a port without `host_ip` is one of the external address, and is led to the guest
        by translation; one with an address of the host's own is a socket there, as with the uplink "sockets".
        """
        wanted = ForwardSpec.of(spec)
        session = self._live()
        sockets = open_sockets(wanted) if session.needs_sockets(wanted) else []
        try:
            return self._run(session.publish(wanted, sockets))
        finally:
            close_sockets(sockets)

    async def apublish(self, spec: str | ForwardSpec) -> Forward:
        """As `publish`."""
        wanted = ForwardSpec.of(spec)
        session = self._live()
        sockets = open_sockets(wanted) if session.needs_sockets(wanted) else []
        try:
            return await self._arun(session.publish(wanted, sockets))
        finally:
            close_sockets(sockets)

    def unpublish(self, forward: Forward) -> None:
        """Takes published ports back; connections that run live on. Raises ForwardNotFound, or TypeError for
        what is no Forward."""
        self._run(self._live().unpublish(_checked_forward(forward)))

    async def aunpublish(self, forward: Forward) -> None:
        """As `unpublish`."""
        await self._arun(self._live().unpublish(_checked_forward(forward)))

    # --- looking ---

    def stats(self) -> NetworkStats:
        """All counters since the start, of at most some 10 milliseconds ago; never waits. After `stop`, those
        of the last run."""
        session = self._running()
        if session is None:
            return self._last_stats
        return NetworkStats.from_native(session.control.plane.stats())

    def worker_stats(self) -> list[NetworkStats]:
        """The counters of each worker (`NatConfig.workers`), as `stats`; empty while it does not run."""
        session = self._running()
        if session is None:
            return []
        return [NetworkStats.from_native(one) for one in session.control.plane.worker_stats()]

    # --- packet by packet ---

    @property
    def datapath(self) -> NetworkDatapath:
        """Pool and rings, to send and receive as guests of this program: `DatapathPoller.poll_once(network)`
        polls them."""
        if self._datapath is None:
            from guestnet.datapath.network_datapath import NetworkDatapath

            self._datapath = NetworkDatapath(self)
        return self._datapath

    @property
    def packet_pool(self) -> PacketPool:
        """The buffers of `tx_ring` and `rx_ring`."""
        return self.datapath.packet_pool

    @property
    def tx_ring(self) -> Ring:
        """Buffers with frames from guests: what is put here leaves by the uplink."""
        return self.datapath.tx_ring

    @property
    def rx_ring(self) -> Ring:
        """Buffers with frames to guests; who takes one frees it."""
        return self.datapath.rx_ring

    def process_tx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a guest's frame in place, in any writable buffer, by the datapath's own engine."""
        return self.datapath.process_tx_packet(frame, now=now)

    def process_rx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a frame for a guest in place, in any writable buffer, by the datapath's own engine."""
        return self.datapath.process_rx_packet(frame, now=now)

    def nat_stats(self) -> NatStats:
        """What the engine did: that of the uplink "tun" while the network runs, else the datapath's own."""
        if self._has_engine:
            return self._run(self._live().nat_stats())[0]
        return self.datapath.nat_stats()

    def conntrack_stats(self) -> ConnTrackStats:
        """What the engine holds: that of the uplink "tun" while the network runs, else the datapath's own."""
        if self._has_engine:
            return self._run(self._live().nat_stats())[1]
        return self.datapath.conntrack_stats()

    @property
    def connection_count(self) -> int:
        """Connections tracked now: of the network while it runs, and of the datapath's own engine."""
        by_hand = 0 if self._datapath is None else self._datapath.connection_count
        if self._has_engine:
            return self.conntrack_stats().connections + by_hand
        return by_hand + (self.stats().connections if self.is_running else 0)

    def expire_connections(self) -> int:
        """Ends connections of the datapath's own engine whose time is over; returns how many. Those of a
        network that runs end by themselves."""
        return 0 if self._datapath is None else self._datapath.expire_connections()

    @property
    def _has_engine(self) -> bool:
        session = self._session
        return session is not None and session.uplink is not None

    def endpoint_stats(self) -> dict[str, NetworkStats]:
        """The counters of each endpoint."""
        return self._run(self._live().endpoint_stats())

    async def aendpoint_stats(self) -> dict[str, NetworkStats]:
        """As `endpoint_stats`."""
        return await self._arun(self._live().endpoint_stats())

    @property
    def external(self) -> tuple[IPv4Address, ...]:
        """The addresses that guests have outside while it runs with the uplink "tun"; else none."""
        session = self._session
        return () if session is None or session.uplink is None else session.uplink.external

    @property
    def uplink_device(self) -> str | None:
        """The name of the TUN device while it runs with the uplink "tun"."""
        session = self._session
        return None if session is None or session.uplink is None else session.uplink.device

    def flows(self) -> list[FlowRecord]:
        """The conversations that the network carries now."""
        return self._run(self._live().flows())

    async def aflows(self) -> list[FlowRecord]:
        """As `flows`."""
        return await self._arun(self._live().flows())

    def maintenance(self) -> None:
        """Does now what is done some time by itself: leases that are over end, and addresses that were
        declined become free. Flows expire without it."""
        self._run(self._maintain())

    async def amaintenance(self) -> None:
        """As `maintenance`."""
        await self._arun(self._maintain())

    async def _maintain(self) -> None:
        if self._session is not None:
            self._session.maintain()
        else:
            self._registry.tidy()
        if self._datapath is not None:
            self._datapath.maintenance()

    def start_capture(self, file: str | os.PathLike[str] | int) -> None:
        """Writes every frame to a file (pcapng), in place of one that is being written.

        `file` is a path, or a descriptor, which stays yours. An earlier capture at that path is replaced; a
        file with other content is not: it raises ConfigError.
        """
        self._run(self._live().start_capture(_capture_target(file)))

    async def astart_capture(self, file: str | os.PathLike[str] | int) -> None:
        """As `start_capture`."""
        await self._arun(self._live().start_capture(_capture_target(file)))

    def stop_capture(self) -> None:
        """Ends the capture; its file is complete then."""
        self._run(self._live().stop_capture())

    async def astop_capture(self) -> None:
        """As `stop_capture`."""
        await self._arun(self._live().stop_capture())

    def on_event(self, callback: EventCallback, *, flows: bool = False) -> Callable[[], None]:
        """Calls `callback` for every NetworkEvent, one at a time and in order, in a thread for callbacks.
        With `flows` also for each flow. Returns a function that ends it.

        A callback may use the network. While it has not returned, up to 4096 later events wait; further ones
        are lost and counted (`events_lost`). Raises TypeError for what cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"{callback!r} cannot be called: give a function that takes a NetworkEvent.")
        entry = (callback, flows)
        self._callbacks = [*self._callbacks, entry]
        self._flows_wanted()

        def end() -> None:
            self._callbacks = [one for one in self._callbacks if one is not entry]
            self._flows_wanted()

        return end

    @property
    def events_lost(self) -> int:
        """Events that callbacks did not get in this run, because they had not returned from earlier ones."""
        session = self._running()
        return 0 if session is None else session.callbacks.lost

    # --- inside ---

    @property
    def _tells_flows(self) -> bool:
        return any(flows for _, flows in self._callbacks)

    def _flows_wanted(self) -> None:
        session = self._session
        if session is not None:
            control, tells = session.control, self._tells_flows
            if not control.post(control.plane.tell_flows, tells):
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    control.loop.call_soon_threadsafe(control.ensure, control.plane.tell_flows, tells)

    def _tell(self, event: NetworkEvent, calls: CallbackQueue) -> None:
        of_flow = event.kind in ("flow_opened", "flow_closed", "denied")
        for callback, flows in self._callbacks:
            if flows or not of_flow:
                calls.put(partial(callback, event))

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

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Does work in the control thread and waits; here, when there is no such thread."""
        try:
            session = self._here()
        except NotRunning:
            work.close()
            raise
        if session is None:
            return _finish(work)
        if session.control.is_own_thread:
            work.close()
            raise GuestnetError(
                "This was called in the control thread, which it would wait for: "
                "call it from another thread, or await its twin for asyncio in a task."
            )
        return session.control.wait(work)

    async def _arun(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            session = self._here()
        except NotRunning:
            work.close()
            raise
        if session is None:
            return _finish(work)
        if session.control.is_own_thread:
            return await work
        future = session.control.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise NotRunning("The network was stopped meanwhile: start it again.") from None


def _capture_target(value: object) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return whole_number("The capture descriptor", value, 0, 0x7FFFFFFF)
    return checked_path("The capture file", value)


def _checked_forward(value: object) -> Forward:
    if not isinstance(value, Forward):
        raise TypeError(f"{value!r} is not a Forward: give one that `publish` returned.")
    return value


def _finish(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as done:
        value: _T = done.value
        return value
    work.close()
    raise NotRunning("The network does not run: start it first.")
