"""Where the gateway's services meet the network: datagrams in, answers out, names and addresses between.

The services know nothing of the data plane, and the data plane nothing of them. A UDP service gets each
datagram with the endpoint that it came from. DNS is served by the forwarder in Rust, over UDP and TCP; it
asks the DNS service for names that may be the network's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from threading import Lock
from typing import TYPE_CHECKING, Any

from guestnet.errors import ConfigError
from guestnet.model.events import LeaseReleased, LeaseTaken, PortClosed, PortOpened
from guestnet.model.ipam import format_mac, parse_mac
from guestnet.model.spec import NetMode
from guestnet.runtime.services.dns_control import DnsControl

if TYPE_CHECKING:
    import asyncio

    from guestnet import _native
    from guestnet.control.channel import Control
    from guestnet.control.event_hub import Emitter
    from guestnet.model.spec import NatConfig
    from guestnet.model.stats import LeaseRecord
    from guestnet.runtime.addresses6 import Addresses6
    from guestnet.runtime.endpoint import Endpoint
    from guestnet.runtime.port_table import PortTable
    from guestnet.runtime.published.forward import Forward
    from guestnet.runtime.published.publishing import Publishing
    from guestnet.runtime.registry import Registry
    from guestnet.services.dhcp import DhcpServer, Lease
    from guestnet.services.dhcp6 import Dhcp6Server
    from guestnet.services.dns import DnsServer
    from guestnet.services.pcp import Mapping, PcpServer

DHCP_PORT, DHCP6_PORT, DHCP6_CLIENT_PORT, DNS_PORT, PCP_PORT = 67, 547, 546, 53, 5351
_DHCP, _DNS_UDP, _DNS_TCP, _PCP, _DHCP6 = 1, 2, 3, 4, 5
"""Numbers of the services, for the data plane."""
_LINK_LOCAL = IPv6Address("fe80::1")
"""The gateway's address on the link."""
_MAPPINGS = 1024
_MAPPING = 16
"""PCP requests of an endpoint that wait or are being answered."""
_IDLE_SECONDS = 0.1
"""After the start. Then the DHCP server is made, if no guest has asked for an address yet: importing it takes
4 ms, which a network that ends at once is spared, and the first guest that asks later."""


def _mappings_most() -> int:
    """Ports that guests may have open together: each takes a descriptor, and they an eighth of all."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAPPINGS if hard == resource.RLIM_INFINITY else max(1, min(_MAPPINGS, hard // 8))


def _nobody_hears(_: object) -> None:
    pass


class Services:
    """The services of a gateway, for the owner of the network: `NatNetwork.services`.

    Example:
        >>> from guestnet import NatNetwork
        >>> services = NatNetwork().services
        >>> services.dns.add_record("later.example", "192.0.2.6")
        >>> services.dhcp.leases()
        []
        >>> services.pcp
        Traceback (most recent call last):
        guestnet.errors.ConfigError: Guests of this network open no ports: ...
    """

    def __init__(self, config: NatConfig, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self._making = Lock()
        self._dhcp: DhcpServer | None = None
        self.on_dhcp: Callable[[DhcpServer], object] = _nobody_hears
        """Called with the DHCP server when it is made, by the thread that needs it first."""
        self._addresses6: Addresses6 | None = None
        self._dhcp6: Dhcp6Server | None = None
        self.on_dhcp6: Callable[[Dhcp6Server], object] = _nobody_hears
        """As `on_dhcp`."""
        self._dns: DnsServer | None = None
        self._pcp: PcpServer | None = None

    @property
    def dhcp(self) -> DhcpServer:
        """The DHCP server: `leases()`. Raises ConfigError when the network has none."""
        if not self._config.dhcp:
            raise ConfigError("This network has no DHCP server: make it with NatConfig(dhcp=True).")
        if self._dhcp is None:
            from guestnet.services.dhcp import DhcpConfig, DhcpServer, LeaseStore

            config = self._config
            made = DhcpServer(
                DhcpConfig(
                    server=config.gateway,
                    subnet=config.subnet,
                    router=config.gateway,
                    dns=(config.gateway,) if config.dns else (),
                    domain=config.zone,
                    search=config.search,
                    mtu=config.mtu,
                    lease_time=config.lease_time,
                ),
                LeaseStore(self._registry),
            )
            with self._making:
                if self._dhcp is None:
                    self._dhcp = made
            self.on_dhcp(self._dhcp)
        return self._dhcp

    @property
    def made_dhcp(self) -> DhcpServer | None:
        """The DHCP server, None as long as nobody has needed it."""
        return self._dhcp if self._config.dhcp else None

    @property
    def has_dhcp6(self) -> bool:
        """Whether the network serves DHCPv6."""
        return self._config.dhcp and self._config.subnet6 is not None

    @property
    def dhcp6(self) -> Dhcp6Server:
        """The DHCPv6 server: `leases()`. Raises ConfigError when the network has none."""
        config = self._config
        if not config.dhcp or config.subnet6 is None or config.gateway6 is None:
            raise ConfigError(
                "This network has no DHCPv6 server: make it with "
                "NatConfig(dhcp=True, subnet6='fd12:3456:789a::/64')."
            )
        if self._dhcp6 is None:
            from guestnet.runtime.addresses6 import Addresses6
            from guestnet.services.dhcp import LeaseStore
            from guestnet.services.dhcp6 import Dhcp6Config, Dhcp6Server

            reserved = {one.mac: one.ip6 for one in config.static_leases if one.ip6 is not None}
            book = Addresses6(self._registry, config.subnet, config.subnet6, reserved, (config.gateway6,))
            made = Dhcp6Server(
                Dhcp6Config(
                    mac=parse_mac(config.gateway_mac),
                    prefix=config.subnet6,
                    zone=config.zone,
                    dns=(config.gateway6,) if config.dns else (),
                    search=config.search,
                    lease_time=config.lease_time,
                ),
                LeaseStore(book),
            )
            with self._making:
                if self._dhcp6 is None:
                    self._dhcp6, self._addresses6 = made, book
                    self._registry.removed = book.remove
            self.on_dhcp6(self._dhcp6)
        return self._dhcp6

    @property
    def made_dhcp6(self) -> Dhcp6Server | None:
        """The DHCPv6 server, None as long as nobody has needed it."""
        return self._dhcp6

    def leases(self) -> list[LeaseRecord]:
        """Lists the current leases, of DHCPv4 and of DHCPv6. From any thread.

        Returns:
            One record for each.
        """
        found = self.dhcp.leases() if self._config.dhcp else []
        return found if self._dhcp6 is None else [*found, *self._dhcp6.leases()]

    def restore(self, leases: list[LeaseRecord]) -> None:
        """Takes over leases of an earlier run, whose endpoints are there again.

        Args:
            leases: What `leases` returned. Leases that no longer fit are left out.
        """
        self.dhcp.restore(leases)
        if self.has_dhcp6:
            self.dhcp6.restore(leases)
            for one in self.dhcp6.leases():
                endpoint = self._registry.get(one.endpoint_id)
                if endpoint is not None and endpoint.mac == one.mac and isinstance(one.ip, IPv6Address):
                    self._registry.note_lease6(one.endpoint_id, one.ip)

    @property
    def dns(self) -> DnsServer:
        """The DNS server: `add_record(name, value)`. Raises ConfigError when the network has none."""
        if not self._config.dns:
            raise ConfigError("This network has no DNS server: make it with NatConfig(dns=True).")
        if self._dns is None:
            from guestnet.services.dns import DnsConfig, DnsServer

            config = self._config
            self._dns = DnsServer(
                DnsConfig(
                    zone=config.zone,
                    records=config.dns_records,
                    gateway=config.gateway,
                    subnet=config.subnet,
                    gateway6=config.gateway6,
                    subnet6=config.subnet6,
                    host=config.loopback_address,
                    resolvers=config.resolvers,
                    directory=self._registry,
                )
            )
            self._registry.owned = self._dns.owns
        return self._dns

    @property
    def pcp(self) -> PcpServer:
        """The PCP server: `mappings()`. Raises ConfigError when the network has none."""
        if self._config.pcp_ports is None:
            raise ConfigError(
                "Guests of this network open no ports: make it with NatConfig(pcp_ports=(40000, 40999))."
            )
        if self._pcp is None:
            from guestnet.services.pcp import PcpConfig, PcpServer

            first, last = self._config.pcp_ports
            self._pcp = PcpServer(PcpConfig(first=first, last=last, most=_mappings_most()))
        return self._pcp

    def __repr__(self) -> str:
        config = self._config
        used = (
            ("dhcp", config.dhcp),
            ("dhcp6", self.has_dhcp6),
            ("dns", config.dns),
            ("pcp", config.pcp_ports),
        )
        return f"<Services {' '.join(name for name, on in used if on) or 'none'}>"


class ServiceHost:
    """The services of one session."""

    def __init__(
        self,
        services: Services,
        config: NatConfig,
        registry: Registry,
        control: Control,
        publishing: Publishing,
        ports: PortTable,
        emit: Emitter,
    ) -> None:
        self._services, self._config, self._registry, self._control = services, config, registry, control
        self._publishing, self._ports, self._emit = publishing, ports, emit
        self._dns: DnsControl | None = None
        self._pcp: PcpServer | None = None
        self._mapping: dict[str, int] = {}
        self._expiry: asyncio.TimerHandle | None = None
        self.refused = 0
        """Requests of PCP that were not taken because too many were being answered."""
        self._idle: asyncio.TimerHandle | None = None
        # Made here and not in the control thread, whose loop would stand still for what it imports.
        _ = self._config.dns and services.dns

    async def open(self) -> None:
        """Adds the services that the configuration asks for."""
        control, plane, gateway = self._control, self._control.plane, self._config.gateway
        if self._config.dhcp:
            self._services.on_dhcp = self._serve_dhcp
            if (dhcp := self._services.made_dhcp) is not None:
                self._serve_dhcp(dhcp)
            self._idle = control.loop.call_later(_IDLE_SECONDS, self._make_dhcp)
            await control.do(plane.add_service, _DHCP, "udp", gateway, DHCP_PORT)
        if self._services.has_dhcp6:
            self._services.on_dhcp6 = self._serve_dhcp6
            if (dhcp6 := self._services.made_dhcp6) is not None:
                self._serve_dhcp6(dhcp6)
            await control.do(plane.add_service, _DHCP6, "udp", _LINK_LOCAL, DHCP6_PORT)
        self.mode_changed(self._config.mode)
        if self._config.dns:
            await control.do(plane.add_service, _DNS_UDP, "udp", gateway, DNS_PORT)
            await control.do(plane.add_service, _DNS_TCP, "tcp", gateway, DNS_PORT)
            if (gateway6 := self._config.gateway6) is not None:
                await control.do(plane.add_service, _DNS_UDP, "udp", gateway6, DNS_PORT)
                await control.do(plane.add_service, _DNS_TCP, "tcp", gateway6, DNS_PORT)
            proxied = self._config.proxy is not None
            self._dns = DnsControl(control, self._services.dns, self._registry, _DNS_UDP, proxied=proxied)
            self._dns.open()
        if self._config.pcp_ports is not None:
            from guestnet.runtime.services.pcp_ports import GuestPorts

            pcp = self._pcp = self._services.pcp
            pcp.on_open, pcp.on_close = self._opened, self._closed
            ports = GuestPorts(self._config, self._registry, self._publishing)
            ports.check()
            pcp.start(ports)
            await control.do(plane.add_service, _PCP, "udp", gateway, PCP_PORT)

    def mode_changed(self, mode: NetMode) -> None:
        """The network has this mode from now on."""
        if self._config.dns:
            # Asking other name servers would be a way out of a network that has none.
            self._services.dns.set_forwarding(mode is not NetMode.HOST_ONLY)
        if self._dns is not None:
            self._dns.name_servers_changed()

    async def close(self) -> None:
        """Ends what is served. The servers outlive it with their names and leases."""
        self._services.on_dhcp = self._services.on_dhcp6 = _nobody_hears
        if (dhcp := self._services.made_dhcp) is not None:
            dhcp.on_lease = dhcp.on_release = _nobody_hears
        if (dhcp6 := self._services.made_dhcp6) is not None:
            dhcp6.on_lease = dhcp6.on_release = _nobody_hears
        if self._idle is not None:
            self._idle.cancel()
        if self._dns is not None:
            self._dns.close()
        if self._expiry is not None:
            self._expiry.cancel()
        if self._pcp is not None:
            self._pcp.stop()

    def datagram(self, event: _native.Datagram, endpoint: Endpoint) -> None:
        """A datagram for a service."""
        if event.service == _DHCP:
            self._answer_dhcp(event, endpoint)
        elif event.service == _DHCP6:
            self._answer_dhcp6(event, endpoint)
        elif event.service == _PCP:
            mapping = self._mapping.get(endpoint.id, 0)
            if mapping >= _MAPPING:
                self.refused += 1
                return
            self._mapping[endpoint.id] = mapping + 1
            self._control.spawn(self._answer_pcp(event, endpoint.id))

    def dns_question(self, event: _native.DnsQuestion) -> None:
        """The DNS forwarder asks for a name."""
        if self._dns is not None:
            self._dns.question(event)

    def name_server(self, event: _native.NameServer) -> None:
        """The DNS forwarder found that a name server does not respond, or does so again."""
        if self._dns is not None:
            self._dns.name_server(event)

    def forget(self, endpoint_id: str) -> None:
        """An endpoint goes: what its guest held ends before its address is free."""
        if (dhcp := self._services.made_dhcp) is not None:
            dhcp.remove_endpoint(endpoint_id)
        if (dhcp6 := self._services.made_dhcp6) is not None:
            dhcp6.remove_endpoint(endpoint_id)
        if self._pcp is not None:
            self._pcp.remove_endpoint(endpoint_id)

    def address_left(self, address: IPv4Address) -> None:
        """A guest has an address no more: no port leads there before it is another's."""
        if self._pcp is not None:
            self._pcp.remove_address(address)

    def unpublished(self, forward: Forward) -> None:
        """The network's owner took a port back, perhaps one that a guest had opened."""
        if self._pcp is not None:
            self._pcp.closed(forward)

    def expire(self) -> None:
        """Ends leases and mappings that are over; the servers do it too, when they are asked something."""
        if (dhcp := self._services.made_dhcp) is not None:
            dhcp.expire(time.monotonic())
        if (dhcp6 := self._services.made_dhcp6) is not None:
            dhcp6.expire(time.monotonic())
        if self._pcp is not None:
            self._pcp.expire()

    def leased6(self, endpoint_id: str) -> list[IPv6Address]:
        """The addresses that DHCPv6 has given to an endpoint."""
        dhcp6 = self._services.made_dhcp6
        return [] if dhcp6 is None else dhcp6.addresses_of(endpoint_id)

    def _make_dhcp(self) -> None:
        _ = self._services.dhcp
        _ = self._services.has_dhcp6 and self._services.dhcp6

    def _serve_dhcp6(self, dhcp6: Dhcp6Server) -> None:
        dhcp6.on_lease = self._leased6
        dhcp6.on_release = self._released6

    def _answer_dhcp6(self, event: _native.Datagram, endpoint: Endpoint) -> None:
        reply = self._services.dhcp6.handle(
            event.payload,
            endpoint_id=endpoint.id,
            mac=event.mac,
            now=time.monotonic(),
            unicast=not event.dst[0].is_multicast,
        )
        if reply is not None:
            source, target = (_LINK_LOCAL, DHCP6_PORT), (event.src[0], DHCP6_CLIENT_PORT)
            plane = self._control.plane
            self._control.post(plane.service_send, event.port, event.mac, source, target, reply)

    def _serve_dhcp(self, dhcp: DhcpServer) -> None:
        dhcp.on_lease = self._leased
        dhcp.on_release = self._released

    def _answer_dhcp(self, event: _native.Datagram, endpoint: Endpoint) -> None:
        reply = self._services.dhcp.handle(
            event.payload, endpoint_id=endpoint.id, mac=event.mac, now=time.monotonic()
        )
        if reply is None:
            return
        source, target = (self._config.gateway, DHCP_PORT), (reply.dst_ip, reply.dst_port)
        plane = self._control.plane
        self._control.post(plane.service_send, event.port, reply.dst_mac, source, target, reply.payload)

    async def _answer_pcp(self, event: _native.Datagram, endpoint_id: str) -> None:
        assert self._pcp is not None
        address = event.src[0]
        try:
            if not isinstance(address, IPv4Address):
                return
            answer = await self._pcp.handle(event.payload, endpoint_id=endpoint_id, source=address)
        finally:
            left = self._mapping[endpoint_id] - 1
            if left:
                self._mapping[endpoint_id] = left
            else:
                del self._mapping[endpoint_id]
            self._await_expiry()
        if answer is not None:
            plane = self._control.plane
            self._control.post(plane.service_send, event.port, event.mac, event.dst, event.src, answer)

    def _await_expiry(self) -> None:
        """Sets the alarm for the mapping that ends first; without mappings there is none."""
        assert self._pcp is not None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if (seconds := self._pcp.next_expiry()) is not None:
            self._expiry = self._control.loop.call_later(seconds, self._mapping_is_over)

    def _mapping_is_over(self) -> None:
        assert self._pcp is not None
        self._pcp.expire()
        self._await_expiry()

    def _opened(self, mapping: Mapping) -> None:
        self._emit_port(PortOpened, mapping)

    def _closed(self, mapping: Mapping) -> None:
        self._emit_port(PortClosed, mapping)

    def _emit_port(self, kind: type[PortOpened | PortClosed], mapping: Mapping) -> None:
        self._emit(
            kind,
            mapping.endpoint_id,
            protocol=mapping.protocol,
            port=mapping.external_port,
            guest=(mapping.address, mapping.internal_port),
        )

    def _leased(self, lease: Any) -> None:
        """A guest has taken an address."""
        id, ip = lease.endpoint_id, lease.ip
        endpoint, port = self._registry.get(id), self._ports.port(id)
        if endpoint is None or port is None:
            return
        self._registry.note_hostname(endpoint, lease.mac, lease.hostname)
        # Also an address besides the endpoint's own, for what is bridged behind it.
        self._control.ensure(self._control.plane.bind_address, port, ip, lease.mac)
        self._emit(LeaseTaken, id, mac=format_mac(lease.mac), ip=ip, hostname=endpoint.hostname)

    def _leased6(self, lease: Lease[IPv6Address]) -> None:
        """A guest has taken an IPv6 address."""
        id = lease.endpoint_id
        endpoint, port = self._registry.get(id), self._ports.port(id)
        if endpoint is None or port is None:
            return
        self._registry.note_hostname(endpoint, lease.mac, lease.hostname)
        mac = format_mac(lease.mac)
        if endpoint.mac == mac:
            self._registry.note_lease6(id, lease.ip)
        self._control.ensure(self._control.plane.bind_address, port, lease.ip, lease.mac)
        self._emit(LeaseTaken, id, mac=mac, ip=lease.ip, hostname=endpoint.hostname)

    def _released6(self, lease: Lease[IPv6Address]) -> None:
        """A guest gave an IPv6 address back."""
        id, mac = lease.endpoint_id, format_mac(lease.mac)
        endpoint = self._registry.get(id)
        if endpoint is not None and endpoint.mac == mac and lease.ip in endpoint.addresses:
            self._registry.note_lease6(id, None)
        self._control.ensure(self._control.plane.unbind_address, lease.ip)
        self._emit(LeaseReleased, id, mac=mac, ip=lease.ip)

    def _released(self, lease: Any) -> None:
        """A guest gave an address back. The endpoint's own stays reserved for it."""
        id, ip = lease.endpoint_id, lease.ip
        self.address_left(ip)
        endpoint = self._registry.get(id)
        if endpoint is not None and endpoint.ip != ip and self._registry.owner(ip) is None:
            self._control.ensure(self._control.plane.unbind_address, ip)
        self._emit(LeaseReleased, id, mac=format_mac(lease.mac), ip=ip)
