"""Where the gateway's services meet the network: datagrams in, answers out, names and addresses between.

The services know nothing of the data plane, and the data plane nothing of them. A UDP service gets each
datagram with the endpoint that it came from; a TCP service listens on a unix socket that guests' connections
are relayed to.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

from guestnet.config import NetMode
from guestnet.errors import ConfigError
from guestnet.names import Names

if TYPE_CHECKING:
    from guestnet import _native
    from guestnet.config import NatConfig
    from guestnet.endpoint import Endpoint
    from guestnet.registry import Registry
    from guestnet.services.dhcp import DhcpServer
    from guestnet.services.dns import DnsServer
    from guestnet.services.dns.server import Reply
    from guestnet.session import Session

_log = logging.getLogger("guestnet")

DHCP_PORT, DNS_PORT = 67, 53
_DHCP, _DNS_UDP, _DNS_TCP = 1, 2, 3
"""Numbers of the services, for the data plane."""
_QUESTIONS = 1024
"""DNS questions that are being answered at once; of one endpoint a quarter of it."""
_ALWAYS = 16
"""Those that are answered for an endpoint although others have taken all."""
_PATH_LONGEST = 107


class Services:
    """What the gateway serves, as its owner sees it; each made when it is first needed."""

    def __init__(self, config: NatConfig, registry: Registry) -> None:
        self._config = config
        self._registry = registry
        self._dhcp: DhcpServer | None = None
        self._dns: DnsServer | None = None

    @property
    def dhcp(self) -> DhcpServer:
        """The DHCP server: `leases()`. Raises ConfigError when the network has none."""
        if not self._config.dhcp:
            raise ConfigError("This network has no DHCP server: make it with NatConfig(dhcp=True).")
        if self._dhcp is None:
            from guestnet.services.dhcp import DhcpConfig, DhcpServer, LeaseStore

            config = self._config
            self._dhcp = DhcpServer(
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
        return self._dhcp

    @property
    def dns(self) -> DnsServer:
        """The DNS server: `add_record(name, value)`. Raises ConfigError when the network has none."""
        if not self._config.dns:
            raise ConfigError("This network has no DNS server: make it with NatConfig(dns=True).")
        if self._dns is None:
            from guestnet.services.dns import DnsConfig, DnsServer

            config = self._config
            # Asking other name servers would be a way out of a network that has none.
            resolvers = () if config.mode is NetMode.HOST_ONLY else config.resolvers
            self._dns = DnsServer(
                DnsConfig(
                    zone=config.zone,
                    records=config.dns_records,
                    gateway=config.gateway,
                    subnet=config.subnet,
                    host=config.loopback_address,
                    resolvers=resolvers,
                    directory=self._registry,
                )
            )
        return self._dns

    def __repr__(self) -> str:
        on = [name for name, used in (("dhcp", self._config.dhcp), ("dns", self._config.dns)) if used]
        return f"<Services {' '.join(on) or 'none'}>"


class ServiceHost:
    """The services of one session."""

    def __init__(self, session: Session, services: Services) -> None:
        self._session = session
        self._services = services
        self._config = session.config
        self._asking: dict[str, int] = {}
        self._directory: str | None = None
        self._dns_is_open = False
        self._names: Names | None = None
        self._hidden_socket: int | None = None
        self.refused = 0
        """DNS questions that were not taken because too many were being answered."""

    async def open(self) -> None:
        """Adds the services that the configuration asks for."""
        control, plane, gateway = self._session.control, self._session.control.plane, self._config.gateway
        if self._config.dhcp:
            dhcp = self._services.dhcp
            dhcp.on_lease = self._leased
            dhcp.on_release = self._released
            await control.do(plane.add_service, _DHCP, "udp", gateway, DHCP_PORT)
        if self._config.dns:
            dns = self._services.dns
            self._dns_is_open = True
            await control.do(plane.add_service, _DNS_UDP, "udp", gateway, DNS_PORT)
            self._names = Names(control, dns, self._session.registry, _DNS_UDP)
            self._names.open()
            path = self._private_path("dns")
            if path is not None:
                await dns.serve_unix(path)
                path = self._hidden(path)
                await control.do(plane.add_service, _DNS_TCP, "tcp", gateway, DNS_PORT, path)

    async def close(self) -> None:
        """Ends what listens, and removes its socket."""
        if self._names is not None:
            self._names.close()
        if self._dns_is_open:
            await self._services.dns.close()
        self._remove_directory()
        if self._hidden_socket is not None:
            os.close(self._hidden_socket)
            self._hidden_socket = None

    def _remove_directory(self) -> None:
        if self._directory is not None:
            for name in os.listdir(self._directory):
                os.unlink(os.path.join(self._directory, name))
            os.rmdir(self._directory)
            self._directory = None

    def _hidden(self, path: str) -> str:
        """Takes a socket that listens off the disk, so that nothing is left there however this process ends:
        Linux finds it by a descriptor too. Returns the path to connect to."""
        try:
            held = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (OSError, AttributeError):
            return path
        hidden = f"/proc/self/fd/{held}"
        if not os.path.exists(hidden):
            os.close(held)
            return path
        self._hidden_socket = held
        self._remove_directory()
        return hidden

    def _private_path(self, name: str) -> str | None:
        """A path for a unix socket in a directory that nobody else can enter."""
        for base in (os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("TMPDIR"), "/tmp"):
            if not base:
                continue
            directory = os.path.join(base, f"guestnet-{secrets.token_hex(8)}")
            path = os.path.join(directory, name)
            if len(os.fsencode(path)) > _PATH_LONGEST:
                continue
            try:
                os.mkdir(directory, 0o700)
            except OSError:
                continue
            self._directory = directory
            return path
        _log.warning("no directory for sockets can be made in /tmp: guests have no DNS over TCP")
        return None

    def datagram(self, event: _native.Datagram, endpoint: Endpoint) -> None:
        """A datagram for a service."""
        if event.service == _DHCP:
            self._answer_dhcp(event, endpoint)
        elif event.service == _DNS_UDP:
            self._question(event, endpoint.id)

    def _question(self, event: _native.Datagram, endpoint_id: str) -> None:
        names = self._names
        if names is None:
            return
        names.renew()
        generation = names.generation
        reply = self._services.dns.known(event.payload)
        if reply is not None:
            self._reply_dns(event, reply, generation)
            return
        asking = self._asking.get(endpoint_id, 0)
        full = sum(self._asking.values()) >= _QUESTIONS
        if asking >= (_ALWAYS if full else _QUESTIONS // 4):
            self.refused += 1
            return
        self._asking[endpoint_id] = asking + 1
        self._session.control.spawn(self._answer_dns(event, endpoint_id, generation))

    def forget(self, endpoint_id: str) -> None:
        """An endpoint goes: what its guest held ends before its address is free."""
        if self._config.dhcp:
            self._services.dhcp.remove_endpoint(endpoint_id)

    def expire(self) -> None:
        """Ends leases that are over; the server does it too, whenever it is asked something."""
        if self._config.dhcp:
            self._services.dhcp.expire(time.monotonic())

    def _answer_dhcp(self, event: _native.Datagram, endpoint: Endpoint) -> None:
        reply = self._services.dhcp.handle(
            event.payload, endpoint_id=endpoint.id, mac=event.mac, now=time.monotonic()
        )
        if reply is None:
            return
        source, target = (self._config.gateway, DHCP_PORT), (reply.dst_ip, reply.dst_port)
        plane = self._session.control.plane
        self._session.control.post(
            plane.service_send, event.port, reply.dst_mac, source, target, reply.payload
        )

    async def _answer_dns(self, event: _native.Datagram, endpoint_id: str, generation: int) -> None:
        try:
            reply = await self._services.dns.wait(event.payload, endpoint_id)
        finally:
            left = self._asking[endpoint_id] - 1
            if left:
                self._asking[endpoint_id] = left
            else:
                del self._asking[endpoint_id]
        self._reply_dns(event, reply, generation)

    def _reply_dns(self, event: _native.Datagram, reply: Reply, generation: int) -> None:
        if reply.answer is None:
            return
        control = self._session.control
        # From the address that was asked, or the guest does not take it for an answer.
        control.post(control.plane.service_send, event.port, event.mac, event.dst, event.src, reply.answer)
        if self._names is not None:
            self._names.keep(event, reply, generation)

    def _leased(self, lease: Any) -> None:
        self._session.leased(lease.endpoint_id, lease.mac, lease.ip, lease.hostname)

    def _released(self, lease: Any) -> None:
        self._session.released(lease.endpoint_id, lease.mac, lease.ip)
