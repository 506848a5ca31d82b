"""Endpoint: one guest's network card, as the network knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from guestnet.errors import ConfigError, EndpointNotFound, NotRunning
from guestnet.model.spec import NetMode
from guestnet.runtime.forwards import ForwardSpec

if TYPE_CHECKING:
    from guestnet.model.stats import NetworkStats
    from guestnet.runtime.network import NatNetwork
    from guestnet.runtime.publishing import Forward


class Endpoint:
    """One guest NIC. Made by the network; what may change (the address after a conflict, the MAC of a guest
    that does not have the one it was given) is changed by the network alone.
    """

    __slots__ = (
        *("_attached", "_hostname", "_id", "_ip", "_listener", "_mac", "_mode", "_network", "_seen", "_told"),
    )

    def __init__(
        self,
        id: str,
        mac: str,
        ip: IPv4Address,
        mode: NetMode = NetMode.NAT,
        hostname: str | None = None,
        listener: str | None = None,
        network: Callable[[], NatNetwork | None] = lambda: None,
    ) -> None:
        self._network = network
        self._id = id
        self._mac = mac
        self._ip = ip
        self._mode = mode
        self._hostname = hostname
        self._listener = listener
        self._told = False
        """The guest told the hostname itself."""
        self._attached: str | None = None
        self._seen: dict[IPv4Address, None] = {}

    @property
    def id(self) -> str:
        """The name that tells it apart, also for DNS."""
        return self._id

    @property
    def mac(self) -> str:
        """Its hardware address. A generated one is a proposal until the guest has shown its own."""
        return self._mac

    @property
    def ip(self) -> IPv4Address:
        """The address that DHCP gives it; in the mode "bridged" the one that it was first seen to use,
        0.0.0.0 until then."""
        return self._ip

    @property
    def mode(self) -> NetMode:
        """What it can reach."""
        return self._mode

    @property
    def hostname(self) -> str | None:
        """Another name that it has for DNS: given, or told by the guest itself."""
        return self._hostname

    @property
    def attachment(self) -> str | None:
        """How its frames enter: "tap", "stream", "dgram", "unixgram", "vhost-user", "memory"; None when they
        do not."""
        return self._attached

    @property
    def listener(self) -> str | None:
        """The path of the listener that it came to, None for one that was created."""
        return self._listener

    @property
    def addresses(self) -> tuple[IPv4Address, ...]:
        """All addresses: the one that DHCP gives, then those that the guest was seen to use besides."""
        return (self._ip, *(address for address in self._seen if address != self._ip))

    def publish(self, spec: str | ForwardSpec) -> Forward:
        """Publishes ports of this guest on the host, `[host_ip:]port[-end]:port[-end][/tcp|/udp]`; see
        `NatNetwork.publish`. Raises ConfigError for the name of another guest, NotRunning, PortInUse."""
        return self._live().publish(self._own(spec))

    async def apublish(self, spec: str | ForwardSpec) -> Forward:
        """As `publish`."""
        return await self._live().apublish(self._own(spec))

    def stats(self) -> NetworkStats:
        """The counters of this endpoint. Raises NotRunning, or EndpointNotFound when it was removed."""
        return self._counters(self._live().endpoint_stats())

    async def astats(self) -> NetworkStats:
        """As `stats`."""
        return self._counters(await self._live().aendpoint_stats())

    def _live(self) -> NatNetwork:
        network = self._network()
        if network is None:
            raise NotRunning(f"The network of endpoint {self._id!r} is gone: keep a reference to it.")
        return network

    def _own(self, spec: str | ForwardSpec) -> ForwardSpec:
        wanted = ForwardSpec.of(spec)
        if wanted.guest not in (None, self._id, self._hostname, str(self._ip)):
            raise ConfigError(
                f"{wanted} names {wanted.guest!r}, and this is {self._id!r}: leave the name out, or use "
                "NatNetwork.publish."
            )
        return replace(wanted, guest=self._id)

    def _counters(self, all_of_them: dict[str, NetworkStats]) -> NetworkStats:
        found = all_of_them.get(self._id)
        if found is None:
            raise EndpointNotFound(f"Endpoint {self._id!r} is no longer on its network.")
        return found

    def __repr__(self) -> str:
        how = f" by {self._attached}" if self._attached else ""
        return f"<Endpoint {self._id!r} {self._mac} {self._ip} {self._mode}{how}>"
