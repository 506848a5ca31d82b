"""Session: a network that runs, as its control side sees it.

Theory of operation:

- A session begins with `start` and ends with `stop`. What outlives it (endpoints, receivers of events)
  belongs to the network.
- Events of the data plane change the registry, move forwards and are emitted as typed events. Calls of the
  program become commands.
- All methods but the constructor run in the control thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import weakref
from collections.abc import Callable, Coroutine
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any

from guestnet._linux.host_addresses import has_ipv6
from guestnet.control.channel import Control, Handlers
from guestnet.control.event_hub import Emitter
from guestnet.errors import (
    AddressInUse,
    AddressPoolExhausted,
    AttachError,
    EndpointNotFound,
    ForwardNotFound,
    UnsupportedError,
)
from guestnet.model.events import (
    AddressChanged,
    AddressSeen,
    FlowClosed,
    FlowDenied,
    FlowOpened,
    GuestDown,
    GuestUp,
    LogMessage,
    NameDenied,
    NetworkFailed,
)
from guestnet.model.forward_spec import ForwardSpec
from guestnet.model.frozen_record import FrozenRecord
from guestnet.model.handles import Ids
from guestnet.model.ipam import format_mac, parse_mac
from guestnet.model.spec import NetMode, Uplink
from guestnet.model.stats import ConnTrackStats, FlowRecord, NatStats, NetworkStats
from guestnet.runtime.attachments import Attachment, KeptAttachments, Listener, MemoryAttachment
from guestnet.runtime.capture import Capture
from guestnet.runtime.endpoint import Endpoint
from guestnet.runtime.host_ipv6 import HostIpv6
from guestnet.runtime.policy.denial_log import DenialLog
from guestnet.runtime.policy.limits import LimitBook, LimitControl
from guestnet.runtime.policy.policy_control import PolicyBook, PolicyControl
from guestnet.runtime.port_table import PortTable
from guestnet.runtime.published.forward import Forward
from guestnet.runtime.published.publishing import Publishing
from guestnet.runtime.registry import Registry
from guestnet.runtime.rules import Rules
from guestnet.runtime.services.service_host import ServiceHost, Services

if TYPE_CHECKING:
    from guestnet import _native
    from guestnet.control.runtime import Runtime
    from guestnet.model.spec import NatConfig
    from guestnet.runtime.tun_uplink import TunUplink

_log = logging.getLogger("guestnet")

FIRST_DYNAMIC = 0x8000_0000
_END_SECONDS = 5.0
_QUERY_TYPES = {
    **{1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 10: "NULL", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA"},
    **{33: "SRV", 43: "DS", 48: "DNSKEY", 64: "SVCB", 65: "HTTPS", 255: "ANY"},
}


def _proxy(config: NatConfig) -> tuple[str, IPv4Address | IPv6Address, int, bytes, bytes] | None:
    if config.proxy is None:
        return None
    from guestnet.model.proxy import resolved

    return resolved(config.proxy)


def _make_plane(config: NatConfig, runtime: Runtime, upstream6: bool) -> _native.DataPlane:
    from guestnet._native import DataPlane

    return DataPlane(
        gateway=config.gateway,
        prefix=config.prefix_len,
        gateway_mac=parse_mac(config.gateway_mac),
        secret=os.urandom(32),
        mode=config.mode.value,
        host_loopback=config.loopback_address,
        isolated=config.isolated,
        reserved=[(ip, parse_mac(one.mac)) for one in config.static_leases for ip in one.addresses],
        filtering=config.filtering.value,
        limits=dict(config.limits),
        timeouts=dict(config.timeouts),
        strategy=config.polling.value,
        batch_size=config.batch_size,
        max_spins=config.max_spins,
        workers=config.workers,
        io_uring=config.io_uring,
        source=config.source,
        proxy=_proxy(config),
        runtime=runtime.planes(),
        gateway6=config.gateway6,
        search=config.search,
        upstream6=upstream6,
    )


class Doors(FrozenRecord):
    """What objects of a session call when the program closes them. None of it holds the network."""

    close_forward: Callable[[Forward], Coroutine[Any, Any, None]]
    close_listener: Callable[[Listener], Coroutine[Any, Any, None]]


class SessionParts(FrozenRecord):
    """What a session is given by its network. The control thread holds the session, so none of it may hold
    the network: a network that the program drops is to end."""

    config: NatConfig
    registry: Registry
    services: Services
    runtime: Runtime
    emit: Emitter
    ids: Ids
    run: int
    """Counts the starts of the network."""
    doors: Doors
    policies: PolicyBook
    limits: LimitBook
    denials: DenialLog
    name: str
    kept: KeptAttachments
    """Held weakly."""


class Session:
    """The control side of one running network."""

    def __init__(self, parts: SessionParts) -> None:
        config, registry = parts.config, parts.registry
        self.config, self.registry, self.emit, self._ids = config, registry, parts.emit, parts.ids
        self._run = parts.run
        self._doors = parts.doors
        self._kept = weakref.ref(parts.kept)
        runtime = self._runtime = parts.runtime
        # Not the parts: one of them leads to the network.
        has6 = config.gateway6 is not None and has_ipv6()
        control = self.control = Control(lambda: _make_plane(config, runtime, has6), self._handlers, runtime)
        self._host6 = None if config.gateway6 is None else HostIpv6(control, has6)
        self.publishing = Publishing(control, registry, parts.ids, parts.doors.close_forward)
        self.capture = Capture(control)
        self._ports = PortTable(lambda port, name: control.plane.name_port(port, name))  # noqa: PLW0108
        self._arrivals: dict[int, int] = {}
        """Ports of guests that came to a listener and have not shown their MAC yet, with the listener."""
        self._early6: dict[int, _native.AddressSeen] = {}
        """IPv6 addresses of guests that are no endpoints yet."""
        self._turned_away: set[int] = set()
        """Those of them that cannot be served; reported once."""
        self._listeners: dict[int, Listener] = {}
        self._next_listener = 1
        self.uplink: TunUplink | None = None
        """The device of the uplink 'tun'."""
        self._segment_port: int | None = None
        """Leads to the segment that is joined in the mode "bridged"."""
        self._services = ServiceHost(
            parts.services, config, registry, control, self.publishing, self._ports, parts.emit
        )
        self.rules = Rules(config, control, self._ports, self._services.mode_changed)
        self._denials = parts.denials
        self._has_policy = not parts.policies.is_empty
        self.policy = PolicyControl(
            parts.policies,
            config.mode,
            control,
            self._ports,
            self._policy_in_force,
            config.gateway,
            parts.denials,
            parts.name,
        )

        self.limits = LimitControl(parts.limits, config.mode, control, self._ports)

    # --- beginning and end ---

    async def open(self) -> None:
        """Makes the network that the configuration describes."""
        control = self.control
        wanted = self.emit.wants_flows
        await control.do(control.plane.tell_flows, wanted, denials=wanted or self._has_policy)
        # Before the first guest has a port.
        await self.policy.open()
        await self.limits.open()
        if self.config.uplink is Uplink.TUN:
            await self._open_uplink()
        if self.config.mode is NetMode.BRIDGED:
            await self._join_segment()
        if self.config.capture is not None:
            await self.capture.start(self.config.capture)
        self.registry.moved = self._moved
        for endpoint in self.registry.all():
            self.registry.set_attachment(endpoint.id, None)
            await self._add_port(endpoint)
        await self._services.open()
        if self._host6 is not None:
            self._host6.open()

    def _policy_in_force(self, on: bool) -> None:
        if on != self._has_policy:
            self._has_policy, flows = on, self.emit.wants_flows
            self.control.ensure(self.control.plane.tell_flows, flows, denials=flows or on)

    async def _join_segment(self) -> None:
        from guestnet._linux.segment import join

        assert self.config.bridge is not None
        segment = join(self.config.bridge)
        plane, port = self.control.plane, self._ports.number()
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
        self.publishing.external = uplink.external
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
        if self._host6 is not None:
            self._host6.close()
        for listener in self._listeners.values():
            listener.unlink()
        self.policy.close()
        if self.capture.is_running:
            await self.capture.stop()
        await asyncio.wait_for(self._services.close(), _END_SECONDS)

    def closed(self) -> None:
        """After the end: guests of listeners are gone, others stay for the next start."""
        self.policy.close()
        if self.uplink is not None:
            self.uplink.close()
        self.registry.moved = lambda _endpoint, _old: None
        for port in list(self._kept() or ()):
            self._end_attachment(port)
        for endpoint in self.registry.all():
            self.registry.set_attachment(endpoint.id, None)
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
            self.limits.port_added(port, endpoint.id)
        except BaseException:
            # The worker may have it already, when only the waiting was given up; its address is to be free.
            self._forget_port(port)
            self.control.ensure(plane.remove_port, port)
            raise

    def _new_port(self, endpoint: Endpoint) -> tuple[int, dict[str, Any]]:
        """A port, and what it is. Known before the worker is told, so that it can be removed meanwhile."""
        port = self._ports.number()
        self._ports.add(port, endpoint.id)
        self.rules.port_added(endpoint.id)
        self.policy.port_added(endpoint.id)
        mac = None if self.registry.is_proposed(endpoint.id) else parse_mac(endpoint.mac)
        known = (
            () if self.config.mode is NetMode.BRIDGED else (endpoint.ip, *self._services.leased6(endpoint.id))
        )
        addresses = list(known)
        return port, {"mac": mac, "addresses": addresses, "mtu": self.config.mtu}

    async def remove_endpoint(self, id: str) -> None:
        port, endpoint = self._ports.port(id), self.registry.get(id)
        self._remove(id)
        if endpoint is not None and endpoint.attachment is not None:
            self.emit(GuestDown, id, mac=endpoint.mac, ip=endpoint.ip, reason="it was removed")
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

    def _end_attachment(self, port: int) -> None:
        kept = self._kept()
        attachment = None if kept is None else kept.pop(port, None)
        if isinstance(attachment, MemoryAttachment):
            attachment.end()

    def maintain(self) -> None:
        """Ends leases and mappings that are over, and frees what was declined long ago."""
        self._services.expire()
        self.registry.tidy()

    def _forget_port(self, port: int) -> None:
        self._end_attachment(port)
        self._arrivals.pop(port, None)
        self._early6.pop(port, None)
        self._turned_away.discard(port)
        self._ports.remove(port)

    def _moved(self, endpoint: Endpoint, old: IPv4Address) -> None:
        port = self._ports.port(endpoint.id)
        if port is None:
            return
        plane = self.control.plane
        self._services.address_left(old)
        self.control.ensure(plane.unbind_address, old)
        self.control.ensure(plane.bind_address, port, endpoint.ip, parse_mac(endpoint.mac))
        self.publishing.refresh()
        self.emit(AddressChanged, endpoint.id, ip=endpoint.ip, old=old)

    # --- attachments ---

    async def attach(
        self,
        id: str,
        kind: str,
        fd: int | None,
        on_frame: Callable[[bytes], object] | None,
    ) -> Attachment:
        endpoint, port, kept = self.registry.get(id), self._ports.port(id), self._kept()
        if endpoint is None or port is None:
            raise EndpointNotFound(f"There is no endpoint {id!r}: create it first.")
        if endpoint.attachment is not None:
            raise AttachError(
                f"Endpoint {id!r} is attached already ({endpoint.attachment}): remove the endpoint first."
            )
        plane, number = self.control.plane, self._ids.next("attachment")
        attachment = Attachment(number, id, kind)
        if fd is None:
            attachment = MemoryAttachment(number, id, self.control, port, on_frame, self._runtime.callbacks)
            work = self.control.do(plane.attach_memory, port)
        else:
            command = {
                "tap": plane.attach_tap,
                "stream": plane.attach_stream,
                "dgram": plane.attach_dgram,
                "vhost-user": plane.attach_vhost_user,
            }[kind]
            work = self.control.do(command, port, fd)
        # Known before the worker is told, so that no frame comes too early.
        self.registry.set_attachment(id, kind)
        if kept is not None:
            kept[port] = attachment
        del kept
        try:
            await work
        except BaseException as error:
            self.registry.set_attachment(id, None)
            self._end_attachment(port)
            if isinstance(error, asyncio.CancelledError) and self._ports.port(id) == port:
                # The worker may have attached it all the same: the endpoint begins anew, with another port.
                self._forget_port(port)
                self.control.ensure(plane.remove_port, port)
                port, config = self._new_port(endpoint)
                self.control.ensure(plane.add_port, port, **config)
            if isinstance(error, AttachError):
                raise AttachError(f"Endpoint {id!r} cannot be attached as {kind!r}: {error}.") from None
            raise
        self._emit_up(endpoint, attachment=kind)
        return attachment

    def attachments(self) -> list[Attachment]:
        """Those that the program made, oldest first."""
        return list((self._kept() or {}).values())

    def listeners(self) -> list[Listener]:
        """All listeners, oldest first."""
        return list(self._listeners.values())

    async def listen(self, kind: str, path: str, sock: socket.socket) -> Listener:
        number, self._next_listener = self._next_listener, self._next_listener + 1
        listener = Listener(self._ids.next("listener"), number, kind, path, self._doors.close_listener)
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
            return await self.publishing.add_external(spec)
        return await self.publishing.add(spec, sockets)

    async def nat_stats(self) -> tuple[NatStats, ConnTrackStats]:
        """What the uplink's engine did, and what it holds."""
        stats, holds = await self.control.do(self.control.plane.nat_stats)
        return NatStats(**stats), ConnTrackStats(**holds)

    async def unpublish(self, forward: Forward) -> None:
        if not await self.publishing.remove(forward):
            raise ForwardNotFound(f"{forward} is not published (any more): `forwards` lists those that are.")
        self._services.unpublished(forward)

    # --- looking ---

    async def flows(self) -> list[FlowRecord]:
        names = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp"}
        return [
            FlowRecord(
                id=self._flow_id(flow.port, flow.flow),
                endpoint=self._ports.endpoint(flow.port),
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
            name: NetworkStats.from_native(info.counters)
            for info in found
            if (name := self._ports.endpoint(info.port)) is not None
        }

    def _flow_id(self, port: int, flow: tuple[int, int]) -> str:
        # Each worker counts for itself, and anew with each start; a port is of one worker.
        return f"flow-{self._run}-{port}-{flow[0]}-{flow[1]}"

    # --- events ---

    def _emit_up(
        self, endpoint: Endpoint, *, attachment: str | None = None, listener: str | None = None
    ) -> None:
        self.emit(
            GuestUp,
            endpoint.id,
            mac=endpoint.mac,
            ip=endpoint.ip,
            hostname=endpoint.hostname,
            attachment=attachment,
            listener=listener,
        )

    def _handlers(self) -> Handlers:
        from guestnet import _native

        return {
            _native.Datagram: self._on_datagram,
            _native.DnsQuestion: self._services.dns_question,
            _native.NameServer: self._services.name_server,
            _native.AddressSeen: self._on_address,
            _native.PortUp: self._on_port_up,
            _native.PortDown: self._on_port_down,
            _native.Frame: self._on_frame,
            _native.Log: self._on_log,
            _native.Failed: self._on_failed,
            _native.FlowOpened: self._on_flow_opened,
            _native.FlowClosed: self._on_flow_closed,
            _native.FlowDenied: self._on_flow_denied,
            _native.NameDenied: self._on_name_denied,
            _native.PolicyAsk: self.policy.on_ask,
            _native.PolicyAskEnded: self.policy.on_ask_ended,
        }

    def _on_datagram(self, event: _native.Datagram) -> None:
        endpoint = self._endpoint_at(event.port, event.mac)
        if endpoint is not None:
            self._services.datagram(event, endpoint)

    def _on_address(self, event: _native.AddressSeen) -> None:
        seen = event.address if isinstance(event.address, IPv4Address) else None
        if seen is None and self._ports.endpoint(event.port) is None:
            # A guest that came to a listener keeps the IPv4 address that it shows first: this waits for it.
            if event.port in self._arrivals:
                self._early6[event.port] = event
            return
        endpoint = self._endpoint_at(event.port, event.mac, seen)
        if endpoint is not None and self.registry.note_address(endpoint.id, event.address):
            self.emit(AddressSeen, endpoint.id, ip=event.address, mac=format_mac(event.mac))

    def _endpoint_at(self, port: int, mac: bytes, seen: IPv4Address | None = None) -> Endpoint | None:
        """Whose port it is. A guest that came to a listener becomes an endpoint here, when its MAC shows."""
        name = self._ports.endpoint(port)
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
                self.emit(LogMessage, level="warning", message=message)
            return None
        del self._arrivals[port]
        self.registry.set_attachment(endpoint.id, listener.kind)
        self._ports.add(port, endpoint.id)
        self.rules.port_added(endpoint.id)
        self.policy.port_added(endpoint.id)
        self.limits.port_added(port, endpoint.id)
        if self.config.mode is not NetMode.BRIDGED:
            self.control.ensure(self.control.plane.bind_address, port, endpoint.ip, mac)
        self.publishing.refresh()
        self._emit_up(endpoint, listener=listener.path)
        if (early := self._early6.pop(port, None)) is not None:
            self._on_address(early)
        return endpoint

    def _on_port_up(self, event: _native.PortUp) -> None:
        self._arrivals[event.port] = event.listener

    def _on_port_down(self, event: _native.PortDown) -> None:
        if event.port == self._segment_port:
            message = f"{self.config.bridge} is gone: {event.reason}"
            _log.error("%s", message)
            self.emit(LogMessage, level="error", message=message)
        name = self._ports.endpoint(event.port)
        endpoint = None if name is None else self.registry.get(name)
        if event.port >= FIRST_DYNAMIC:
            self._forget_port(event.port)
        else:
            self._end_attachment(event.port)
        if endpoint is None:
            return
        self.registry.set_attachment(endpoint.id, None)
        if event.port >= FIRST_DYNAMIC:
            self._remove(endpoint.id)
            self.publishing.refresh()
        self.emit(GuestDown, endpoint.id, mac=endpoint.mac, ip=endpoint.ip, reason=event.reason)

    def _on_frame(self, event: _native.Frame) -> None:
        kept = self._kept()
        attachment = None if kept is None else kept.get(event.port)
        if isinstance(attachment, MemoryAttachment):
            attachment.deliver(event.frame)

    def _on_log(self, event: _native.Log) -> None:
        _log.log(event.level, "%s", event.message)
        self.emit(LogMessage, level=logging.getLevelName(event.level).lower(), message=event.message)

    def _on_failed(self, event: _native.Failed) -> None:
        _log.error("the packet thread failed: %s", event.message)
        self.control.fail(event.message)
        self.emit(NetworkFailed, reason=event.message)

    def _on_flow_opened(self, event: _native.FlowOpened) -> None:
        self.emit(
            FlowOpened,
            self._ports.endpoint(event.port),
            flow=self._flow_id(event.port, event.flow),
            protocol=event.proto,
            guest=event.guest,
            remote=event.remote,
            inbound=event.inbound,
            rule=event.rule,
            name=event.name or self._name_of(event.remote[0]),
        )

    def _on_flow_closed(self, event: _native.FlowClosed) -> None:
        self.emit(
            FlowClosed,
            self._ports.endpoint(event.port),
            flow=self._flow_id(event.port, event.flow),
            bytes_out=event.bytes_out,
            bytes_in=event.bytes_in,
            packets_out=event.packets_out,
            packets_in=event.packets_in,
            rule=event.rule,
            name=event.name,
            shown=event.shown,
        )

    def _on_flow_denied(self, event: _native.FlowDenied) -> None:
        denied = self.emit(
            FlowDenied,
            self._ports.endpoint(event.port),
            direction=event.direction,
            protocol=event.proto,
            guest=event.guest,
            remote=event.remote,
            name=event.name or self._name_of(event.remote[0]),
            shown=event.shown,
            rule=event.rule,
            reason=event.reason,
            unreported=event.unreported,
        )
        if denied is not None and self._has_policy:
            self._denials.note(denied)

    def _on_name_denied(self, event: _native.NameDenied) -> None:
        denied = self.emit(
            NameDenied,
            self._ports.endpoint(event.port),
            name=event.name,
            query_type=_QUERY_TYPES.get(event.kind, f"TYPE{event.kind}"),
            rule=event.rule,
            reason=event.reason,
            unreported=event.unreported,
        )
        if denied is not None:
            self._denials.note(denied)

    def _name_of(self, address: IPv4Address | IPv6Address) -> str | None:
        """The name of an address in the network's zone."""
        if self.config.mode is NetMode.BRIDGED:
            return None
        if address == self.config.loopback_address:
            return f"host.{self.config.zone}"
        name = self.registry.name_of(address)
        return None if name is None else f"{name}.{self.config.zone}"
