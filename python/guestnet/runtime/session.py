"""A network that runs: what happens in its control thread, from events of the worker to its commands.

A session begins with `start` and ends with `stop`; what outlives it (endpoints, callbacks) belongs to the
network. All methods but the constructor run in the control thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from guestnet.control.callbacks import CallbackQueue
from guestnet.control.channel import Control, Handlers
from guestnet.errors import (
    AddressInUse,
    AddressPoolExhausted,
    AttachError,
    ConfigError,
    EndpointNotFound,
    ForwardNotFound,
    UnsupportedError,
)
from guestnet.model.events import NetworkEvent
from guestnet.model.ipam import format_mac, parse_mac
from guestnet.model.spec import NetMode, Uplink
from guestnet.model.stats import ConnTrackStats, FlowRecord, NatStats, NetworkStats
from guestnet.runtime.attachments import Attachment, Listener, MemoryAttachment
from guestnet.runtime.endpoint import Endpoint
from guestnet.runtime.forwards import ForwardSpec
from guestnet.runtime.publishing import Forward, Publishing
from guestnet.runtime.registry import NOWHERE, Registry
from guestnet.runtime.service_host import ServiceHost, Services

if TYPE_CHECKING:
    from guestnet import _native
    from guestnet.control.runtime import Runtime
    from guestnet.model.spec import NatConfig
    from guestnet.runtime.network import NatNetwork
    from guestnet.runtime.tun_uplink import TunUplink

_log = logging.getLogger("guestnet")

FIRST_DYNAMIC = 0x8000_0000
_CAPTURE_SECONDS = 3.0
"""How long the rest of a capture may take to be written to a file."""
_PIPE_SECONDS = 0.5
"""To anything else: a reader of a pipe may have stopped reading."""
_END_SECONDS = 5.0


_PCAPNG = b"\x0a\x0d\x0d\x0a"


def _capture_file(path: str) -> int:
    """Opens the file for a capture. One that has other content than a capture is not overwritten."""
    directory, name = os.path.split(path)
    # Not to wait for who reads a named pipe: nothing could interrupt that.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    if not name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    parent = os.open(directory or ".", os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY))
    try:
        nofollow = os.O_NOFOLLOW if _is_shared(os.fstat(parent)) else 0
        try:
            fd = os.open(name, flags | nofollow, 0o600, dir_fd=parent)
        except OSError as error:
            if not nofollow or error.errno != errno.ELOOP:
                raise
            raise ConfigError(
                f"The capture file {path!r} is a symbolic link in a directory that other users can write: "
                "name the file that it leads to, or choose another."
            ) from None
        try:
            about = os.fstat(fd)
            if stat.S_ISREG(about.st_mode):
                if about.st_size and not _begins_as_capture(name, parent, about, nofollow):
                    raise ConfigError(
                        f"The capture file {path!r} exists and is not a pcapng capture: remove it, "
                        "or choose another."
                    )
                os.ftruncate(fd, 0)
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(parent)


def _is_shared(directory: os.stat_result) -> bool:
    """Whether other users than ourselves and root can put files there."""
    return bool(directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) or directory.st_uid not in (
        0,
        os.geteuid(),
    )


def _begins_as_capture(name: str, parent: int, about: os.stat_result, nofollow: int) -> bool:
    """Whether the file `about` begins as a capture; `name` may lead to another one by now."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | nofollow, dir_fd=parent)
    except OSError:
        return False
    try:
        return os.path.samestat(os.fstat(fd), about) and os.read(fd, len(_PCAPNG)) == _PCAPNG
    finally:
        os.close(fd)


def is_capture(path: str) -> bool:
    """Whether a file begins as a pcapng capture does."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_PCAPNG)) == _PCAPNG
    except PermissionError:
        return False


def _make_plane(config: NatConfig) -> _native.DataPlane:
    from guestnet._native import DataPlane

    return DataPlane(
        gateway=config.gateway,
        prefix=config.prefix_len,
        gateway_mac=parse_mac(config.gateway_mac),
        secret=os.urandom(32),
        mode=config.mode.value,
        host_loopback=config.loopback_address,
        reserved=[(lease.ip, parse_mac(lease.mac)) for lease in config.static_leases],
        filtering=config.filtering.value,
        limits=dict(config.limits),
        timeouts=dict(config.timeouts),
        strategy=config.polling.value,
        batch_size=config.batch_size,
        max_spins=config.max_spins,
        workers=config.workers,
        io_uring=config.io_uring,
    )


class Session:
    """The control side of one running network."""

    def __init__(
        self,
        owner: Callable[[], NatNetwork | None],
        config: NatConfig,
        registry: Registry,
        services: Services,
        runtime: Runtime,
    ) -> None:
        self._owner = owner
        """The network, while anybody holds it. The control thread holds this session, so a strong reference
        would keep a network running that nobody holds."""
        self.config = config
        self.registry = registry
        self.callbacks = CallbackQueue(runtime.callbacks)
        self._runtime = runtime
        self.control = Control(lambda: _make_plane(config), self._handlers, runtime)
        self.publishing = Publishing(self.control, registry, owner)
        self._ports: dict[int, str] = {}
        self._port_of: dict[str, int] = {}
        self._arrivals: dict[int, int] = {}
        """Ports of guests that came to a listener and have not shown their MAC yet, with the listener."""
        self._turned_away: set[int] = set()
        """Those of them that cannot be served; said once."""
        self._listeners: dict[int, Listener] = {}
        self._memory: WeakValueDictionary[int, MemoryAttachment] = WeakValueDictionary()
        """Held by the network: their callbacks may hold it in turn."""
        self._next_port = 1
        self._next_listener = 1
        self._capturing = False
        self._capture_seconds = _CAPTURE_SECONDS
        self.uplink: TunUplink | None = None
        """The device of the uplink 'tun'."""
        self._segment_port: int | None = None
        """Leads to the segment that is joined in the mode "bridged"."""
        self._services = ServiceHost(self, services)

    # --- beginning and end ---

    async def open(self) -> None:
        """Makes the network that the configuration describes."""
        control = self.control
        await control.do(control.plane.tell_flows, self._tells_flows)
        if self.config.uplink is Uplink.TUN:
            await self._open_uplink()
        if self.config.mode is NetMode.BRIDGED:
            await self._join_segment()
        if self.config.capture is not None:
            await self.start_capture(self.config.capture)
        self.registry.moved = self._moved
        for endpoint in self.registry.all():
            endpoint._attached = None
            await self._add_port(endpoint)
        await self._services.open()

    async def _join_segment(self) -> None:
        from guestnet._linux.segment import join

        assert self.config.bridge is not None
        segment = join(self.config.bridge)
        plane, port = self.control.plane, self._next_port
        self._next_port += 1
        try:
            plane.name_port(port, self.config.bridge)
            await self.control.do(plane.add_port, port, mtu=segment.mtu, uplink=True)
            await self.control.do(plane.attach_tap, port, segment.fd)
        finally:
            os.close(segment.fd)
        self._segment_port = port

    async def _open_uplink(self) -> None:
        from guestnet.runtime.tun_uplink import TunUplink

        uplink = self.uplink = TunUplink(self.config)
        try:
            await self.control.do(
                self.control.plane.attach_tun,
                uplink.fd,
                external=uplink.external,
                ports=self.config.port_range,
                mtu=self.config.mtu,
            )
        finally:
            uplink.release()

    async def close(self) -> None:
        """Ends what has an end: the capture is written, services are closed, sockets are removed."""
        for listener in self._listeners.values():
            listener.unlink()
        if self._capturing:
            await self.stop_capture()
        await asyncio.wait_for(self._services.close(), _END_SECONDS)

    def closed(self) -> None:
        """After the end: guests of listeners are gone, others stay for the next start."""
        if self.uplink is not None:
            self.uplink.close()
        self.registry.moved = lambda _endpoint, _old: None
        for port in list(self._memory):
            self._end_memory(port)
        for endpoint in self.registry.all():
            endpoint._attached = None
            if endpoint.listener is not None:
                self._remove(endpoint.id)

    # --- endpoints ---

    async def create_endpoint(
        self, id: str, mac: str | bytes | None, ip: str | IPv4Address | None, hostname: str | None
    ) -> Endpoint:
        endpoint = self.registry.create(id, mac, ip, hostname)
        try:
            await self._add_port(endpoint)
        except BaseException:
            if self.registry.get(endpoint.id) is endpoint:
                self.registry.remove(endpoint.id)
            raise
        self.publishing.refresh()
        return endpoint

    async def _add_port(self, endpoint: Endpoint) -> None:
        port, config = self._new_port(endpoint)
        plane = self.control.plane
        try:
            await self.control.do(plane.add_port, port, **config)
        except BaseException:
            # The worker may have it already, when only the waiting was given up; its address is to be free.
            self._forget_port(port)
            self.control.ensure(plane.remove_port, port)
            raise

    def _new_port(self, endpoint: Endpoint) -> tuple[int, dict[str, Any]]:
        """A port, and what it is. Known before the worker is told, so that it can be removed meanwhile."""
        port, self._next_port = self._next_port, self._next_port + 1
        self._name_port(port, endpoint.id)
        mac = None if self.registry.is_proposed(endpoint.id) else parse_mac(endpoint.mac)
        addresses = [] if self.config.mode is NetMode.BRIDGED else [endpoint.ip]
        return port, {"mac": mac, "addresses": addresses, "mtu": self.config.mtu}

    def _name_port(self, port: int, endpoint_id: str) -> None:
        self._ports[port] = endpoint_id
        self._port_of[endpoint_id] = port
        self.control.plane.name_port(port, endpoint_id)

    async def remove_endpoint(self, id: str) -> None:
        port = self._port_of.get(id)
        self._remove(id)
        self.publishing.refresh()
        if port is not None:
            self._forget_port(port)
            await self._give(self.control.plane.remove_port, port)

    async def _give(self, command: Callable[..., int], *arguments: Any) -> None:
        """A command that takes something back: it is given also when nobody waits for it any more."""
        try:
            await self.control.do(command, *arguments)
        except asyncio.CancelledError:
            self.control.ensure(command, *arguments)  # perhaps a second time, which changes nothing
            raise

    def _remove(self, id: str) -> None:
        self._services.forget(id)
        self.registry.remove(id)

    def _end_memory(self, port: int) -> None:
        if (attachment := self._memory.pop(port, None)) is not None:
            attachment.end()
        if (owner := self._owner()) is not None:
            owner._memory.pop(port, None)

    @property
    def _tells_flows(self) -> bool:
        owner = self._owner()
        return owner is not None and owner._tells_flows

    def maintain(self) -> None:
        """Ends leases and mappings that are over, and frees what was declined long ago."""
        self._services.expire()
        self.registry.tidy()

    def _forget_port(self, port: int) -> str | None:
        self._end_memory(port)
        self._arrivals.pop(port, None)
        self._turned_away.discard(port)
        name = self._ports.pop(port, None)
        self.control.plane.name_port(port, None)
        if name is not None:
            self._port_of.pop(name, None)
        return name

    def _moved(self, endpoint: Endpoint, old: IPv4Address) -> None:
        port = self._port_of.get(endpoint.id)
        if port is None:
            return
        plane = self.control.plane
        self._services.address_left(old)
        self.control.ensure(plane.unbind_address, old)
        self.control.ensure(plane.bind_address, port, endpoint.ip, parse_mac(endpoint.mac))
        self.publishing.refresh()
        self.emit("address_changed", endpoint.id, ip=str(endpoint.ip), old=str(old))

    # --- attachments ---

    async def attach(
        self,
        id: str,
        kind: str,
        fd: int | None,
        on_frame: Callable[[bytes], object] | None,
    ) -> Attachment:
        endpoint, port = self.registry.get(id), self._port_of.get(id)
        if endpoint is None or port is None:
            raise EndpointNotFound(f"There is no endpoint {id!r}: create it first.")
        if endpoint._attached is not None:
            raise AttachError(
                f"Endpoint {id!r} is attached already ({endpoint._attached}): remove the endpoint first."
            )
        plane = self.control.plane
        attachment = Attachment(id, kind)
        if fd is None:
            # Known before the worker is told, so that no frame comes too early.
            attachment = self._memory[port] = MemoryAttachment(
                id, self.control, port, on_frame, self._runtime.callbacks
            )
            if (owner := self._owner()) is not None:
                owner._memory[port] = attachment
            work = self.control.do(plane.attach_memory, port)
        else:
            command = {
                "tap": plane.attach_tap,
                "stream": plane.attach_stream,
                "dgram": plane.attach_dgram,
                "vhost-user": plane.attach_vhost_user,
            }[kind]
            work = self.control.do(command, port, fd)
        endpoint._attached = kind
        try:
            await work
        except BaseException as error:
            endpoint._attached = None
            self._end_memory(port)
            if isinstance(error, asyncio.CancelledError) and self._port_of.get(id) == port:
                # The worker may have attached it all the same: the endpoint begins anew, with another port.
                self._forget_port(port)
                self.control.ensure(plane.remove_port, port)
                port, config = self._new_port(endpoint)
                self.control.ensure(plane.add_port, port, **config)
            if isinstance(error, AttachError):
                raise AttachError(f"Endpoint {id!r} cannot be attached as {kind!r}: {error}.") from None
            raise
        self._tell_up(endpoint, attachment=kind)
        return attachment

    async def listen(self, kind: str, path: str, sock: socket.socket) -> Listener:
        number, self._next_listener = self._next_listener, self._next_listener + 1
        listener = Listener(self._owner, number, kind, path)
        self._listeners[number] = listener
        try:
            await self.control.do(
                self.control.plane.listen,
                number,
                kind,
                sock.fileno(),
                mtu=self.config.mtu,
                lax_offload=kind == "unixgram",
            )
        except BaseException:
            del self._listeners[number]
            listener.unlink()
            self.control.ensure(self.control.plane.stop_listening, number)
            raise
        return listener

    async def stop_listening(self, listener: Listener) -> None:
        if self._listeners.get(listener.number) is not listener:
            return
        listener.unlink()
        try:
            await self._give(self.control.plane.stop_listening, listener.number)
        finally:
            self._listeners.pop(listener.number, None)

    # --- published ports ---

    async def publish(self, spec: ForwardSpec, sockets: list[list[socket.socket]]) -> Forward:
        if self.config.mode is NetMode.BRIDGED:
            raise UnsupportedError(
                "With `mode='bridged'` guests have addresses of their own: there is nothing to publish."
            )
        self.publishing.check(spec, self.config)
        if not sockets:
            return await self.publishing.add_external(spec, self.outside(spec))
        return await self.publishing.add(spec, sockets)

    def needs_sockets(self, spec: ForwardSpec) -> bool:
        """False for ports of the external addresses: those have no sockets."""
        return self.uplink is None or (spec.host_ip is not None and spec.host_ip not in self.uplink.external)

    def outside(self, spec: ForwardSpec) -> IPv4Address:
        """The external address of the uplink that a forward without sockets is of."""
        assert self.uplink is not None
        return spec.host_ip if isinstance(spec.host_ip, IPv4Address) else self.uplink.external[0]

    async def nat_stats(self) -> tuple[NatStats, ConnTrackStats]:
        """What the uplink's engine did, and what it holds."""
        stats, holds = await self.control.do(self.control.plane.nat_stats)
        return NatStats(**stats), ConnTrackStats(**holds)

    async def unpublish(self, forward: Forward) -> None:
        if not await self.publishing.remove(forward):
            raise ForwardNotFound(f"{forward} is not published (any more): `forwards` lists those that are.")
        self._services.unpublished(forward)

    # --- what services tell ---

    def leased(self, id: str, mac: bytes, ip: IPv4Address, hostname: str | None) -> None:
        """A guest has taken an address."""
        endpoint, port = self.registry.get(id), self._port_of.get(id)
        if endpoint is None or port is None:
            return
        self.registry.note_hostname(endpoint, mac, hostname)
        # Also an address besides the endpoint's own, for what is bridged behind it.
        self.control.ensure(self.control.plane.bind_address, port, ip, mac)
        self.emit("lease", id, mac=format_mac(mac), ip=str(ip), hostname=endpoint.hostname)

    def released(self, id: str, mac: bytes, ip: IPv4Address) -> None:
        """A guest gave an address back. The endpoint's own stays reserved for it."""
        self._services.address_left(ip)
        endpoint = self.registry.get(id)
        if endpoint is not None and endpoint.ip != ip and self.registry.owner(ip) is None:
            self.control.ensure(self.control.plane.unbind_address, ip)
        self.emit("release", id, mac=format_mac(mac), ip=str(ip))

    # --- looking ---

    async def flows(self) -> list[FlowRecord]:
        names = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp"}
        return [
            FlowRecord(
                endpoint=self._ports.get(flow.port),
                protocol=names.get(flow.proto, str(flow.proto)),
                guest=flow.guest,
                remote=flow.remote,
                inbound=flow.inbound,
                state=flow.state,
                bytes_out=flow.bytes_out,
                bytes_in=flow.bytes_in,
                age=flow.age_ms / 1000,
                idle=flow.idle_ms / 1000,
            )
            for flow in await self.control.do(self.control.plane.list_flows)
        ]

    async def endpoint_stats(self) -> dict[str, NetworkStats]:
        found = await self.control.do(self.control.plane.port_stats)
        return {
            self._ports[info.port]: NetworkStats.from_native(info.counters)
            for info in found
            if info.port in self._ports
        }

    async def tell_flows(self, on: bool) -> None:
        await self.control.do(self.control.plane.tell_flows, on)

    async def start_capture(self, path: str | int) -> None:
        try:
            fd = os.dup(path) if isinstance(path, int) else _capture_file(path)
        except OSError as error:
            remedy = "choose another one" if error.errno != errno.ENXIO else "start who reads the pipe first"
            raise ConfigError(
                f"The capture file {path!r} cannot be written ({error.strerror}): {remedy}."
            ) from error
        self._capture_seconds = _CAPTURE_SECONDS if stat.S_ISREG(os.fstat(fd).st_mode) else _PIPE_SECONDS
        self._capturing = True  # also when it is given up: one that does not run can be stopped too
        try:
            await self.control.do(self.control.plane.start_capture, fd)
        finally:
            os.close(fd)

    async def stop_capture(self) -> None:
        self._capturing = False
        # A pipe that nobody reads must not keep the network from ending.
        work = self.control.do(self.control.plane.stop_capture)
        try:
            await asyncio.wait_for(work, self._capture_seconds)
        except TimeoutError:
            _log.warning("the capture could not be written to its end")

    # --- events ---

    def emit(self, kind: str, endpoint: str | None = None, **details: Any) -> None:
        """Tells the network's owner."""
        if (owner := self._owner()) is not None:
            owner._tell(NetworkEvent(kind, endpoint, details), self.callbacks)

    def _tell_up(self, endpoint: Endpoint, **more: Any) -> None:
        self.emit(
            "guest_up", endpoint.id, mac=endpoint.mac, ip=str(endpoint.ip), hostname=endpoint.hostname, **more
        )

    def _handlers(self) -> Handlers:
        from guestnet import _native

        return {
            _native.Datagram: self._on_datagram,
            _native.AddressSeen: self._on_address,
            _native.PortUp: self._on_port_up,
            _native.PortDown: self._on_port_down,
            _native.Frame: self._on_frame,
            _native.Log: self._on_log,
            _native.Failed: self._on_failed,
            _native.FlowOpened: self._on_flow_opened,
            _native.FlowClosed: self._on_flow_closed,
            _native.Denied: self._on_denied,
        }

    def _on_datagram(self, event: _native.Datagram) -> None:
        endpoint = self._endpoint_at(event.port, event.mac)
        if endpoint is not None:
            self._services.datagram(event, endpoint)

    def _on_address(self, event: _native.AddressSeen) -> None:
        if not isinstance(event.address, IPv4Address):
            return
        endpoint = self._endpoint_at(event.port, event.mac, event.address)
        if endpoint is not None and self.config.mode is NetMode.BRIDGED:
            if event.address == NOWHERE:
                return
            if endpoint.ip == NOWHERE:
                endpoint._ip = event.address
                self.emit("address_seen", endpoint.id, ip=str(event.address), mac=format_mac(event.mac))
        if endpoint is None or event.address in endpoint.addresses:
            return
        while len(endpoint._seen) >= 16:
            endpoint._seen.pop(next(iter(endpoint._seen)))
        endpoint._seen[event.address] = None
        self.emit("address_seen", endpoint.id, ip=str(event.address), mac=format_mac(event.mac))

    def _endpoint_at(self, port: int, mac: bytes, seen: IPv4Address | None = None) -> Endpoint | None:
        """Whose port it is. A guest that came to a listener becomes an endpoint here, when its MAC shows."""
        name = self._ports.get(port)
        if name is not None:
            return self.registry.get(name)
        number = self._arrivals.get(port)
        listener = None if number is None else self._listeners.get(number)
        if listener is None:
            return None
        try:
            endpoint = self.registry.arrive(mac, listener.path, seen)
        except (AddressPoolExhausted, AddressInUse) as error:
            if port not in self._turned_away:
                self._turned_away.add(port)
                message = f"A guest cannot be served: {error}"
                _log.warning("%s", message)
                self.emit("log", None, level="warning", message=message)
            return None
        del self._arrivals[port]
        endpoint._attached = listener.kind
        self._name_port(port, endpoint.id)
        if self.config.mode is not NetMode.BRIDGED:
            self.control.ensure(self.control.plane.bind_address, port, endpoint.ip, mac)
        self.publishing.refresh()
        self._tell_up(endpoint, listener=listener.path)
        return endpoint

    def _on_port_up(self, event: _native.PortUp) -> None:
        self._arrivals[event.port] = event.listener

    def _on_port_down(self, event: _native.PortDown) -> None:
        if event.port == self._segment_port:
            message = f"{self.config.bridge} is gone: {event.reason}"
            _log.error("%s", message)
            self.emit("log", None, level="error", message=message)
        name = self._ports.get(event.port)
        endpoint = None if name is None else self.registry.get(name)
        if event.port >= FIRST_DYNAMIC:
            self._forget_port(event.port)
        if endpoint is None:
            return
        endpoint._attached = None
        if event.port >= FIRST_DYNAMIC:
            self._remove(endpoint.id)
            self.publishing.refresh()
        self.emit("guest_down", endpoint.id, mac=endpoint.mac, ip=str(endpoint.ip), reason=event.reason)

    def _on_frame(self, event: _native.Frame) -> None:
        attachment = self._memory.get(event.port)
        if attachment is not None:
            attachment.deliver(event.frame)

    def _on_log(self, event: _native.Log) -> None:
        _log.log(event.level, "%s", event.message)
        self.emit("log", None, level=logging.getLevelName(event.level).lower(), message=event.message)

    def _on_failed(self, event: _native.Failed) -> None:
        _log.error("the packet thread failed: %s", event.message)
        self.control.fail(event.message)
        self.emit("failed", None, reason=event.message)

    def _on_flow_opened(self, event: _native.FlowOpened) -> None:
        self._tell_flow("flow_opened", event, flow=list(event.flow), inbound=event.inbound)

    def _on_denied(self, event: _native.Denied) -> None:
        self._tell_flow("denied", event, reason=event.reason)

    def _tell_flow(self, kind: str, event: _native.FlowOpened | _native.Denied, **more: Any) -> None:
        (guest, guest_port), (remote, remote_port) = event.guest, event.remote
        self.emit(
            kind,
            self._ports.get(event.port),
            protocol=event.proto,
            guest=[str(guest), guest_port],
            remote=[str(remote), remote_port],
            **more,
        )

    def _on_flow_closed(self, event: _native.FlowClosed) -> None:
        self.emit(
            "flow_closed",
            self._ports.get(event.port),
            flow=list(event.flow),
            bytes_out=event.bytes_out,
            bytes_in=event.bytes_in,
        )
