"""NatNetwork: a network for guests, for synchronous and for asyncio programs.

A control thread does the work, so guests are served whatever the program does. Each method that changes
something waits until the change is done. Its counterpart with an `a` in front (`acreate_endpoint`) does the
same for asyncio.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from ipaddress import IPv4Address
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from guestnet.control.event_hub import Emitter, EventHub, EventStream
from guestnet.control.portal import blocking, in_thread, is_blocking, outcome
from guestnet.control.runtime import Runtime, implicit_runtime
from guestnet.errors import (
    AlreadyRunning,
    ConfigError,
    EndpointNotFound,
    ForwardNotFound,
    GuestnetError,
    NotRunning,
)
from guestnet.model.events import NetworkEvent
from guestnet.model.handles import Handles, Ids
from guestnet.model.spec import NatConfig, whole_number
from guestnet.model.spec import path as checked_path
from guestnet.model.stats import ConnTrackStats, FlowRecord, NatStats, NetworkStats
from guestnet.runtime.attachments import (
    Attachment,
    KeptAttachments,
    Listener,
    MemoryAttachment,
    listening_socket,
    release_descriptor,
    taken_descriptor,
)
from guestnet.runtime.endpoint import Endpoint
from guestnet.runtime.forward import Forward
from guestnet.runtime.forwards import ForwardSpec, close_sockets, open_sockets
from guestnet.runtime.registry import Registry
from guestnet.runtime.service_host import Services
from guestnet.runtime.session import Doors, Session, SessionParts
from guestnet.runtime.session_end import began, claim, end, end_unheld

if TYPE_CHECKING:
    from guestnet.datapath.network_datapath import NetworkDatapath
    from guestnet.nat.engine import NatResult, PacketPool, Ring

_T = TypeVar("_T")
_E = TypeVar("_E", bound=NetworkEvent)

_numbers = itertools.count(1)
"""Of networks without a name."""


class NatNetwork:
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
        self._changing = threading.Lock()
        self._ids = Ids()
        self._runs = 0
        this = weakref.ref(self)  # nothing that the network holds, or gives away, is to hold it
        self._events = EventHub(self._name, partial(_tell_flows, this))
        self._doors = Doors(partial(_close_forward, this), partial(_close_listener, this))
        self._last_stats = NetworkStats()
        self._datapath: NetworkDatapath | None = None
        self._process = os.getpid()

    @classmethod
    def with_defaults(cls) -> Self:
        """Makes a network with the default configuration.

        Returns:
            The network.
        """
        return cls(NatConfig())

    # --- what it is ---

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

    def __repr__(self) -> str:
        state, connections = ("running", self.stats().connections) if self.is_running else ("stopped", 0)
        return (
            f"<NatNetwork {self._config.subnet} {self._config.mode} gateway={self.gateway} "
            f"endpoints={self.endpoint_count} connections={connections} {state}>"
        )

    # --- life ---

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
                    self._config,
                    self._registry,
                    self._services,
                    self._runtime,
                    Emitter(self._events),
                    self._ids,
                    self._runs,
                    self._doors,
                    self._kept,
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

    # --- endpoints ---

    @property
    def endpoints(self) -> list[Endpoint]:
        """All endpoints, oldest first."""
        return self._registry.all()

    def endpoint_at(self, address: IPv4Address | str) -> Endpoint | None:
        """Finds the endpoint with an address.

        Args:
            address: The address that the network gave it.

        Returns:
            The endpoint, None when there is none.
        """
        return self._registry.owner(IPv4Address(address))

    @property
    def endpoint_count(self) -> int:
        """How many endpoints there are."""
        return len(self._registry)

    def get_endpoint(self, id: str) -> Endpoint | None:
        """Finds an endpoint.

        Args:
            id: Its id.

        Returns:
            The endpoint, None when there is none.
        """
        return self._registry.get(id)

    def __getitem__(self, id: str) -> Endpoint:
        """Returns the endpoint with this id.

        Raises:
            EndpointNotFound: There is none. It is a LookupError too.
        """
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

    async def acreate_endpoint(
        self,
        id: str,
        *,
        mac: str | bytes | None = None,
        ip: str | IPv4Address | None = None,
        hostname: str | None = None,
    ) -> Endpoint:
        """Creates an endpoint.

        Args:
            id: Its name, also in DNS.
            mac: Its MAC address; generated by default.
            ip: Its address; the next free one by default.
            hostname: Another name for DNS.

        Returns:
            The endpoint.

        Raises:
            EndpointExists: There is an endpoint with this id.
            AddressPoolExhausted: No address is free.
            AddressInUse: The address belongs to another endpoint.
            ConfigError: A value is wrong in itself.
        """
        return await self._do(self._create(id, mac, ip, hostname))

    create_endpoint = blocking(acreate_endpoint)

    async def _create(
        self, id: str, mac: str | bytes | None, ip: str | IPv4Address | None, hostname: str | None
    ) -> Endpoint:
        if self._session is not None:
            return await self._session.create_endpoint(id, mac, ip, hostname)
        return self._registry.create(id, mac, ip, hostname)

    async def aremove_endpoint(self, id: str) -> None:
        """Removes an endpoint. Its flows end, and its address becomes free.

        Args:
            id: Its id.

        Raises:
            EndpointNotFound: There is none.
        """
        await self._do(self._remove(id))

    remove_endpoint = blocking(aremove_endpoint)

    async def _remove(self, id: str) -> None:
        if self._session is not None:
            await self._session.remove_endpoint(id)
        else:
            self._registry.remove(id)

    def recall_guest(self, mac: str | bytes, id: str, ip: str | IPv4Address | None = None) -> None:
        """Decides which endpoint a guest becomes when it comes to a listener.

        Otherwise, ids depend on the order of arrival. A static lease of the MAC takes precedence.

        Args:
            mac: The MAC address of the guest.
            id: The id of its endpoint.
            ip: The address of its endpoint, if it is free then.

        Raises:
            ConfigError: A value is wrong.

        Example:
            >>> network = NatNetwork()
            >>> network.recall_guest("52:54:00:12:34:56", "vm1", "192.168.64.7")
        """
        self._registry.recall(mac, id, ip)

    # --- attachments ---

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
        """Attaches an endpoint: from now on its frames enter and leave.

        The kinds are:

        - "tap": a TAP device, with virtio headers (IFF_VNET_HDR) or without.
        - "stream": a connected stream socket that carries each frame with its length in front, as QEMU's
          `-netdev stream`.
        - "dgram": a connected datagram socket, one frame for each datagram.
        - "vhost-user": a connection of a front-end, or a listening socket where it may connect and connect
          again.
        - "memory": this process is the guest.

        Args:
            endpoint_id: The endpoint.
            kind: One of the kinds above.
            fd: The descriptor. It belongs to the network afterwards; after an error it stays yours.
            sock: The socket, instead of `fd`.
            on_frame: For "memory": takes each frame for the guest, in a thread for callbacks, one at a time
                and in order.

        Returns:
            The attachment.

        Raises:
            EndpointNotFound: There is no such endpoint.
            AttachError: The descriptor does not suit the kind.
            ConfigError: There is no such kind, or an argument does not belong to it.
            NotRunning: The network does not run.
        """
        number = taken_descriptor(kind, fd, sock, on_frame)
        made = await self._do(self._live().attach(endpoint_id, kind, number, on_frame))
        release_descriptor(fd, sock)
        return made

    attach = blocking(aattach)

    async def alisten(self, kind: str, path: str | os.PathLike[str]) -> Listener:
        """Creates a socket where guests arrive.

        Each guest that comes becomes an endpoint as soon as its MAC is seen. Its static lease names it;
        otherwise it is vm1, vm2 and so on. A guest that leaves is removed.

        Args:
            kind: "stream" (QEMU), "dgram", "unixgram" (vfkit, libkrun) or "vhost-user".
            path: The path of the socket.

        Returns:
            The listener.

        Raises:
            AttachError: The socket cannot be created there.
            ConfigError: There is no such kind, or the path is wrong.
            NotRunning: The network does not run.
        """
        session = self._live()
        with listening_socket(kind, path) as sock:
            return await self._do(session.listen(kind, os.fspath(path), sock))

    listen = blocking(alisten)

    # --- published ports ---

    @property
    def forwards(self) -> Handles[Forward]:
        """All published ports, oldest first, with those that guests opened. `forwards[id]` finds one."""
        session = self._session
        found = [] if session is None else session.publishing.all()
        return Handles(found, "published port", ForwardNotFound)

    @property
    def listeners(self) -> Handles[Listener]:
        """All sockets where guests arrive. `listeners[id]` finds one."""
        session = self._session
        return Handles([] if session is None else session.listeners(), "listener")

    @property
    def attachments(self) -> Handles[Attachment]:
        """All attachments that the program made. `attachments[id]` finds one."""
        session = self._session
        return Handles([] if session is None else session.attachments(), "attachment")

    async def apublish(self, spec: str | ForwardSpec) -> Forward:
        """Publishes ports of a guest on the host.

        With the uplink "tun", a port without `host_ip` belongs to the external address and leads to the guest
        by translation. A port with an address of the host is a socket there, as with the uplink "sockets".

        Args:
            spec: `[host_ip:]port[-end]:[guest:]port[-end][/tcp|/udp]`, or a `ForwardSpec`. The guest is an
                endpoint's id, host name or address; it need not exist yet. Without a guest, the only one is
                meant.

        Returns:
            The published ports. All ports of a range are published, or none.

        Raises:
            PortInUse: A port of the host is in use.
            ConfigError: The text is wrong, or does not say which of several guests is meant.
            TooManyFiles: The process can open no more descriptors.
            NotRunning: The network does not run.
        """
        wanted = ForwardSpec.of(spec)
        session = self._live()
        sockets = open_sockets(wanted) if session.publishing.needs_sockets(wanted) else []
        try:
            return await self._do(session.publish(wanted, sockets))
        finally:
            close_sockets(sockets)

    publish = blocking(apublish)

    async def aunpublish(self, forward: Forward | str) -> None:
        """Closes published ports. Connections stay open.

        Args:
            forward: What `publish` returned, or its id.

        Raises:
            ForwardNotFound: It is not published.
            TypeError: It is not a `Forward`, nor an id.
        """
        session = self._live()
        if isinstance(forward, str):
            forward = self.forwards[forward]
        elif not isinstance(forward, Forward):
            raise TypeError(f"{forward!r} is not a Forward: give one that `publish` returned, or its id.")
        await self._do(session.unpublish(forward))

    unpublish = blocking(aunpublish)

    # --- looking ---

    def stats(self) -> NetworkStats:
        """Returns the counters since the start, at most some 10 milliseconds old. It never waits.

        Returns:
            The counters; after `stop`, those of the last run.
        """
        session = self._running()
        if session is None:
            return self._last_stats
        return NetworkStats.from_native(session.control.plane.stats())

    def worker_stats(self) -> list[NetworkStats]:
        """Returns the counters of each worker (`NatConfig.workers`).

        Returns:
            One snapshot for each worker, none while the network does not run.
        """
        session = self._running()
        if session is None:
            return []
        return [NetworkStats.from_native(one) for one in session.control.plane.worker_stats()]

    # --- packet by packet ---

    @property
    def datapath(self) -> NetworkDatapath:
        """The pool and the rings by which this program sends and receives as its guests.

        `DatapathPoller.poll_once(network)` polls it.
        """
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
        """Buffers with frames for guests. Whoever takes one frees it."""
        return self.datapath.rx_ring

    def process_tx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a frame from a guest in place, by the engine of `datapath`.

        Args:
            frame: A writable buffer.
            now: The time in seconds. None asks the clock.

        Returns:
            What became of the packet.
        """
        return self.datapath.process_tx_packet(frame, now=now)

    def process_rx_packet(self, frame: Any, *, now: float | None = None) -> NatResult:
        """Translates a frame for a guest in place, by the engine of `datapath`.

        Args:
            frame: A writable buffer.
            now: The time in seconds. None asks the clock.

        Returns:
            What became of the packet.
        """
        return self.datapath.process_rx_packet(frame, now=now)

    def nat_stats(self) -> NatStats:
        """Returns what the engine did.

        It is the engine of the uplink "tun" while the network runs, else the one of `datapath`.

        Returns:
            The counters.
        """
        if self._has_engine:
            return self._run(self._live().nat_stats())[0]
        return self.datapath.nat_stats()

    def conntrack_stats(self) -> ConnTrackStats:
        """Returns what the engine holds.

        It is the engine of the uplink "tun" while the network runs, else the one of `datapath`.

        Returns:
            The counters.
        """
        if self._has_engine:
            return self._run(self._live().nat_stats())[1]
        return self.datapath.conntrack_stats()

    @property
    def connection_count(self) -> int:
        """How many connections are tracked now, by the network and by the engine of `datapath`."""
        by_hand = 0 if self._datapath is None else self._datapath.connection_count
        if self._has_engine:
            return self.conntrack_stats().connections + by_hand
        return by_hand + (self.stats().connections if self.is_running else 0)

    def expire_connections(self) -> int:
        """Ends connections of the engine of `datapath` whose timeout has passed.

        Those of a running network end by themselves.

        Returns:
            How many ended.
        """
        return 0 if self._datapath is None else self._datapath.expire_connections()

    @property
    def _has_engine(self) -> bool:
        session = self._session
        return session is not None and session.uplink is not None

    async def aendpoint_stats(self) -> dict[str, NetworkStats]:
        """Returns the counters of each endpoint.

        Returns:
            The counters by id.

        Raises:
            NotRunning: The network does not run.
        """
        return await self._do(self._live().endpoint_stats())

    endpoint_stats = blocking(aendpoint_stats)

    @property
    def external(self) -> tuple[IPv4Address, ...]:
        """The external addresses of the guests while it runs with the uplink "tun", else none."""
        session = self._session
        return () if session is None or session.uplink is None else session.uplink.external

    @property
    def uplink_device(self) -> str | None:
        """The name of the TUN device while it runs with the uplink "tun"."""
        session = self._session
        return None if session is None or session.uplink is None else session.uplink.device

    async def aflows(self) -> list[FlowRecord]:
        """Lists the flows that the network carries now.

        Returns:
            One record for each.

        Raises:
            NotRunning: The network does not run.
        """
        return await self._do(self._live().flows())

    flows = blocking(aflows)

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

    async def astart_capture(self, file: str | os.PathLike[str] | int) -> None:
        """Writes every frame to a file in the pcapng format. It replaces a capture that is being written.

        An earlier capture at that path is replaced. A file with other content is not.

        Args:
            file: A path, or a descriptor, which stays yours.

        Raises:
            ConfigError: The file cannot be written, or has other content.
            NotRunning: The network does not run.
        """
        await self._do(self._live().capture.start(_capture_target(file)))

    start_capture = blocking(astart_capture)

    async def astop_capture(self) -> None:
        """Ends the capture. Its file is complete then.

        Raises:
            NotRunning: The network does not run.
        """
        await self._do(self._live().capture.stop())

    stop_capture = blocking(astop_capture)

    @overload
    def on_event(self, callback: Callable[[NetworkEvent], object]) -> Callable[[], None]: ...
    @overload
    def on_event(
        self, callback: Callable[[_E], object], first: type[_E], /, *more: type[_E]
    ) -> Callable[[], None]: ...

    def on_event(self, callback: Callable[[Any], object], *types: type[NetworkEvent]) -> Callable[[], None]:
        """Calls a function for every event, one at a time and in order, in a thread for callbacks.

        The function may use the network. While it has not returned, up to 4096 later events wait, of which
        each guest has a share; further ones are lost and counted (`events_lost`, and an `EventsLost`).

        Args:
            callback: Takes an event.
            *types: The classes of events to deliver. By default all but `FlowEvent`, of which guests cause
                as many as they like.

        Returns:
            A function that ends the delivery.

        Raises:
            TypeError: The callback cannot be called, or a type is no class of events.

        Example:
            >>> from guestnet import GuestUp
            >>> network, came = NatNetwork(), []
            >>> stop_listening = network.on_event(lambda event: came.append(event.endpoint), GuestUp)
            >>> with network:
            ...     vm = network.create_endpoint("vm1")
            ...     guest = network.attach("vm1", "memory")
            >>> came
            ['vm1']
        """
        if not callable(callback):
            raise TypeError(f"{callback!r} cannot be called: give a function that takes a NetworkEvent.")
        return self._events.add_callback(callback, types)

    @overload
    def events(self, *, most: int = 4096) -> EventStream[NetworkEvent]: ...
    @overload
    def events(self, first: type[_E], /, *more: type[_E], most: int = 4096) -> EventStream[_E]: ...

    def events(self, *types: type[NetworkEvent], most: int = 4096) -> EventStream[Any]:
        """The events from now on, for `async for`. Ends when the network stops.

        Args:
            *types: The classes of events, as of `on_event`.
            most: How many events wait for a task that has not taken them; each guest has a share. Further
                ones are lost and counted (`EventStream.lost`, and an `EventsLost`).

        Returns:
            The iterator. `close` ends it, and so does the end of its `with` block.

        Example:
            >>> import asyncio
            >>> from guestnet import GuestUp
            >>> async def first_guest():
            ...     async with NatNetwork() as network:
            ...         with network.events(GuestUp) as events:
            ...             await network.acreate_endpoint("vm1")
            ...             await network.aattach("vm1", "memory")
            ...             async for event in events:
            ...                 return event.endpoint
            >>> asyncio.run(first_guest())
            'vm1'
        """
        return self._events.add_stream(types, whole_number("most", most, 1, 1_000_000))

    @property
    def events_lost(self) -> int:
        """How many events receivers missed, because they had not taken earlier ones."""
        return self._events.lost

    # --- inside ---

    def _ask_for_flows(self, on: bool) -> None:
        """Says to the packet threads whether events of flows are wanted."""
        session = self._running()
        if session is not None:
            control = session.control
            if not control.post(control.plane.tell_flows, on):
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    control.loop.call_soon_threadsafe(control.ensure, control.plane.tell_flows, on)

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


def _capture_target(value: object) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return whole_number("The capture descriptor", value, 0, 0x7FFFFFFF)
    return checked_path("The capture file", value)


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


def _finish(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine that has nothing to wait for."""
    try:
        work.send(None)
    except StopIteration as done:
        value: _T = done.value
        return value
    work.close()
    raise NotRunning("The network does not run: start it first.")
