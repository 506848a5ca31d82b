"""Endpoint: one guest NIC, as the network knows it."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Protocol

from guestnet.control.portal import blocking
from guestnet.errors import ConfigError, EndpointNotFound, NotRunning
from guestnet.model.forward_spec import ForwardSpec
from guestnet.model.spec import NetMode

if TYPE_CHECKING:
    from guestnet.model.stats import NetworkStats
    from guestnet.runtime.published.forward import Forward


class EndpointRecord:
    """What a network knows of an endpoint. The registry alone has it and changes it."""

    __slots__ = (
        "attached",
        "hostname",
        "id",
        "ip",
        "leased6",
        "listener",
        "mac",
        "mode",
        "seen",
        "seen6",
        "told",
    )

    def __init__(
        self,
        id: str,
        mac: str,
        ip: IPv4Address,
        mode: NetMode = NetMode.NAT,
        hostname: str | None = None,
        listener: str | None = None,
    ) -> None:
        self.id, self.mac, self.ip, self.mode = id, mac, ip, mode
        self.hostname, self.listener = hostname, listener
        self.told = False
        """The guest told the hostname itself."""
        self.attached: str | None = None
        self.seen: dict[IPv4Address, None] = {}
        self.leased6: tuple[IPv6Address, ...] = ()
        self.seen6: dict[IPv6Address, None] = {}

    @property
    def addresses6(self) -> tuple[IPv6Address, ...]:
        """The leased address, then others, the latest first."""
        return (*self.leased6, *reversed(self.seen6))


class EndpointNetwork(Protocol):
    """What an endpoint needs of its network."""

    async def apublish(self, spec: str | ForwardSpec) -> Forward: ...

    async def aendpoint_stats(self) -> dict[str, NetworkStats]: ...


class Endpoint:
    """One guest NIC. `NatNetwork.create_endpoint` makes it, or a guest that comes to a listener.

    Only the network changes it: the address after a conflict, and the MAC of a guest that does not use the
    generated one.

    Example:
        >>> from guestnet import NatNetwork
        >>> endpoint = NatNetwork().create_endpoint("vm1", mac="52:54:00:12:34:56", hostname="web")
        >>> endpoint.id, str(endpoint.ip), endpoint.hostname, endpoint.attachment
        ('vm1', '192.168.64.2', 'web', None)
    """

    __slots__ = ("_network", "_record")

    def __init__(
        self, record: EndpointRecord, network: Callable[[], EndpointNetwork | None] = lambda: None
    ) -> None:
        self._record = record
        self._network = network

    @property
    def id(self) -> str:
        """The name that identifies it, also in DNS."""
        return self._record.id

    @property
    def mac(self) -> str:
        """Its MAC address. A generated one is provisional until the guest has shown its own."""
        return self._record.mac

    @property
    def ip(self) -> IPv4Address:
        """The address that DHCP gives it.

        In the mode "bridged", it is the first address that the guest was seen to use, and 0.0.0.0 until then.
        """
        return self._record.ip

    @property
    def mode(self) -> NetMode:
        """What it can reach."""
        return self._record.mode

    @property
    def hostname(self) -> str | None:
        """Another name that it has in DNS: given by the owner, or by the guest itself."""
        return self._record.hostname

    @property
    def attachment(self) -> str | None:
        """How its frames enter, None when they do not.

        The kinds are "tap", "stream", "dgram", "unixgram", "vhost-user" and "memory".
        """
        return self._record.attached

    @property
    def listener(self) -> str | None:
        """The path of the listener that it came to, None for an endpoint that was created."""
        return self._record.listener

    @property
    def addresses(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """All addresses: the one that DHCP gives and others that the guest was seen to use, then in IPv6 the
        one that it took by DHCPv6 and others of the network's prefix."""
        record = self._record
        return (record.ip, *(one for one in record.seen if one != record.ip), *record.addresses6)

    async def apublish(self, spec: str | ForwardSpec) -> Forward:
        """Publishes ports of this guest on the host. See `NatNetwork.publish`.

        Args:
            spec: `[host_ip:]port[-end]:port[-end][/tcp|/udp]`, or a `ForwardSpec`.

        Returns:
            The published ports.

        Raises:
            ConfigError: The text is wrong, or names another guest.
            NotRunning: The network does not run.
            PortInUse: A port of the host is in use.
        """
        return await self._live().apublish(self._own(spec))

    publish = blocking(apublish)

    async def astats(self) -> NetworkStats:
        """Returns the counters of this endpoint.

        Returns:
            The counters.

        Raises:
            NotRunning: The network does not run.
            EndpointNotFound: The endpoint was removed.
        """
        found = (await self._live().aendpoint_stats()).get(self._record.id)
        if found is None:
            raise EndpointNotFound(f"Endpoint {self._record.id!r} is no longer on its network.")
        return found

    stats = blocking(astats)

    def _live(self) -> EndpointNetwork:
        network = self._network()
        if network is None:
            raise NotRunning(f"The network of endpoint {self._record.id!r} is gone: keep a reference to it.")
        return network

    def _own(self, spec: str | ForwardSpec) -> ForwardSpec:
        wanted = ForwardSpec.of(spec)
        if wanted.guest not in (None, self._record.id, self._record.hostname, str(self._record.ip)):
            raise ConfigError(
                f"{wanted} names {wanted.guest!r}, and this is {self._record.id!r}: leave the name out, or "
                "use NatNetwork.publish."
            )
        from dataclasses import replace

        return replace(wanted, guest=self._record.id)

    def __repr__(self) -> str:
        how = f" by {self._record.attached}" if self._record.attached else ""
        return f"<Endpoint {self._record.id!r} {self._record.mac} {self._record.ip} {self._record.mode}{how}>"
