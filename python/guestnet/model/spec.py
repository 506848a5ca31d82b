"""The configuration of a network, checked when it is made.

`NatConfig` is a frozen record with its own checks. Importing a library for models would take 90 ms;
`guestnet run -- true` takes 55 in all. Every wrong value is a ConfigError that names the value and says what
to write instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from typing import TYPE_CHECKING, Any, NoReturn

from guestnet.errors import ConfigError
from guestnet.model.defaults import DEFAULT_SUBNET, DEFAULT_ZONE
from guestnet.model.frozen import FrozenMapping
from guestnet.model.frozen_record import FrozenRecord
from guestnet.model.ipam import format_mac, parse_mac
from guestnet.model.values import (
    PREFIX_LONGEST,
    check_port_range,
    checked_guest_ports,
    checked_limit,
    checked_policy,
    checked_prefix6,
    checked_records,
    checked_resolvers,
    choice,
    domain,
    ipv4_address,
    ipv4_subnet,
    named_numbers,
    path,
    several,
    whole_number,
    yes_or_no,
)

if TYPE_CHECKING:
    from guestnet.model.proxy import ProxyUrl
    from guestnet.policy.limit import Limit
    from guestnet.policy.policy import Policy

MTU_LOWEST, MTU_HIGHEST = 68, 65520
"""The lowest by RFC 791, and the highest that TAP and virtio carry."""
LEASE_SHORTEST, LEASE_LONGEST = 10, 0xFFFFFFFE
WORKERS_MOST = 64
LIMITS = (
    *("flows", "flows_per_port", "udp_sockets_per_port", "buffer_per_port", "socket_memory", "macs_per_port"),
    *("addresses_per_port", "reassemblies_per_port", "reassembly_bytes", "icmp_errors_per_second"),
    *("floods_per_second", "service_datagrams_per_second", "neighbour_waiting"),
    *("dns_queries", "dns_queries_per_port", "dns_connections"),
)
TIMEOUTS = ("udp", "udp_dns", "icmp", "tcp_established", "tcp_transitory", "reassembly")
"""What the data plane knows by these names; its defaults are in `guestnet-core/src/interface/config.rs`."""
_OWN = ("`gateway`", "`dhcp_start`", "`dhcp_end`")


class NetMode(StrEnum):
    """What the guests of a network can reach.

    Example:
        >>> NetMode("host_only") is NetMode.HOST_ONLY
        True
    """

    NAT = "nat"
    """Each other, the gateway, and everything that the host can reach."""
    HOST_ONLY = "host_only"
    """Each other, the gateway and its services."""
    BRIDGED = "bridged"
    """All of the host's segment that they join (`bridge`). There is no gateway of guestnet's."""


class Uplink(StrEnum):
    """How traffic leaves the network.

    Example:
        >>> NatConfig(uplink="tun").uplink is Uplink.TUN
        True
    """

    SOCKETS = "sockets"
    """Through sockets of this process. It needs no privilege."""
    TUN = "tun"
    """As translated packets through a TUN device of the host. It needs CAP_NET_ADMIN."""


class PollingStrategy(StrEnum):
    """What a packet thread does when nothing is ready.

    Example:
        >>> NatConfig().polling
        <PollingStrategy.ADAPTIVE: 'adaptive'>
    """

    BUSY = "busy"
    """Polls all the time: the shortest delay, for a whole processor."""
    ADAPTIVE = "adaptive"
    """Polls for a moment after work, then sleeps."""
    EVENT_DRIVEN = "event_driven"
    """Sleeps."""


class Filtering(StrEnum):
    """Who may send to a UDP port that a guest uses (RFC 4787 section 5).

    Example:
        >>> NatConfig().filtering
        <Filtering.ADDRESS_DEPENDENT: 'address_dependent'>
    """

    ENDPOINT_INDEPENDENT = "endpoint_independent"
    """Anyone."""
    ADDRESS_DEPENDENT = "address_dependent"
    """Hosts that the guest has sent to from that port."""
    ADDRESS_AND_PORT_DEPENDENT = "address_and_port_dependent"
    """Ports that the guest has sent to from that port."""


class StaticLease(FrozenRecord, kw_only=False):
    """An address of either family or of both, and optionally a name, that a MAC always gets.

    Example:
        >>> lease = StaticLease("52:54:00:12:34:56", IPv4Address("192.168.64.10"), "web")
        >>> NatConfig(static_leases=[lease]).static_leases[0].name
        'web'
    """

    mac: str
    ip: IPv4Address | None
    name: str | None = None
    ip6: IPv6Address | None = None

    @property
    def addresses(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """The addresses."""
        return tuple(one for one in (self.ip, self.ip6) if one is not None)


class NatConfig(FrozenRecord):
    """The settings of a network. All are keywords, and text is accepted wherever its meaning is clear.

    Addresses:

    - `subnet`: IPv4, /8 to /30. `gateway`: its address in it, the first by default. `gateway_mac`: its MAC.
    - `subnet6`: an IPv6 /64, none by default. Guests make addresses of it themselves, or get them by DHCPv6
      with the number of their IPv4 address. The gateway advertises it, and routes while the host has IPv6.
      Packets leave through host sockets, with every `uplink`.
    - `dhcp_start`, `dhcp_end`: the range of addresses for endpoints, the whole subnet by default.
    - `static_leases`: addresses and names for known MACs: `StaticLease` objects, or mappings with its fields.
    - `mtu`: the IP MTU of the guests in bytes, 68 to 65520.

    What guests reach:

    - `mode`: see `NetMode`. `bridge`: with the mode "bridged", the bridge or Ethernet interface of the host
      that guests join. It then gives addresses and names; `subnet` and what belongs to it are not used.
    - `host_loopback`: guests reach the host's 127.0.0.1 at the last address of the subnet, which is then
      named `host.guestnet.internal`. It cannot be combined with the mode "host_only".
    - `policy`: a `Policy`, or a mapping with the keys of a policy file; by default there are no rules besides
      the floor. It cannot be combined with the mode "bridged".
    - `limit`: what all guests together may carry, `guest_limit`: what each of them may; see `Limit`, whose
      text ("10mbit/2mbit") is accepted. They cannot be combined with the mode "bridged".
    - `isolated`: guests open no flows to each other. It cannot be combined with the mode "bridged".
    - `filtering`: see `Filtering`.
    - `pcp_ports`: the first and the last port of the host that guests may open, by PCP or NAT-PMP; none by
      default. `pcp_address`: the host's address for them; every address by default.

    Services:

    - `dhcp`, `dns`: whether the gateway serves them. `lease_time`: in seconds, 10 or more.
    - `dns_records`: names with their records: addresses, or `TYPE:value` (`TXT:some text`). `*.example`
      stands for all names below `example`. `zone`: the domain of the endpoints' names. `search`: domains that
      guests try for short names, the zone by default. `resolvers`: addresses of name servers for all other
      names; the host's by default, () for none.

    How traffic leaves:

    - `uplink`: see `Uplink`. With "tun", `external` has the external addresses of the guests, which must be
      routed to this host (by default one of 100.64.0.0/10, which only this host knows). `port_range` has
      their first and last external port. `forwarding` makes this host forward while the network runs.
      `masquerade` does so too, and gives packets that leave the host's own address.
    - `source`: with "sockets", an address or an interface of the host that flows to the outside leave from.
      Without it, or for the other family of addresses, they have no way out. By default the host's routes
      decide.
    - `proxy`: with "sockets", the URL of a proxy that all TCP connections go through: `socks5://` or `http://`
      with `user:password@` where it wants them, `host` for that of the host's environment (ALL_PROXY,
      HTTPS_PROXY), or `@FILE`. UDP and ping are refused then, and the name servers are asked over TCP.

    Packet threads:

    - `workers`: packet threads that share the endpoints, 1 to 64. More than one helps where several guests
      are busy and processors are free.
    - `polling`, `max_spins`: see `PollingStrategy`. `batch_size`: frames of one batch, 1 to 1024.
    - `io_uring`: small writes are gathered and done in one call, where the system has io_uring (Linux 6.0).
    - `limits` (names in `LIMITS`) and `timeouts` (in seconds, names in `TIMEOUTS`): bounds of the data plane.

    Others:

    - `capture`: a file that every frame is written to, in the pcapng format.

    Raises:
        ConfigError: A value is wrong, or two of them contradict each other.

    Example:
        >>> config = NatConfig(subnet="10.9.0.0/24", dns_records={"db.example": "192.0.2.5"})
        >>> config.gateway, config.replace(mtu=9000).mtu
        (IPv4Address('10.9.0.1'), 9000)
        >>> NatConfig(subnet="10.9.0.0/33")
        Traceback (most recent call last):
        guestnet.errors.ConfigError: subnet '10.9.0.0/33' is not an IPv4 subnet: ...
    """

    subnet: IPv4Network
    gateway: IPv4Address
    subnet6: IPv6Network | None
    mtu: int
    mode: NetMode
    host_loopback: bool
    isolated: bool
    policy: Policy | None
    limit: Limit | None
    guest_limit: Limit | None
    dhcp: bool
    dns: bool
    lease_time: int
    dns_records: Mapping[str, tuple[str, ...]]
    zone: str
    search: tuple[str, ...]
    resolvers: tuple[str, ...] | None
    static_leases: tuple[StaticLease, ...]
    dhcp_start: IPv4Address
    dhcp_end: IPv4Address
    capture: str | None
    polling: PollingStrategy
    batch_size: int
    max_spins: int
    workers: int
    io_uring: bool
    filtering: Filtering
    gateway_mac: str
    bridge: str | None
    uplink: Uplink
    source: str | None
    proxy: ProxyUrl | None
    external: tuple[IPv4Address, ...]
    port_range: tuple[int, int]
    forwarding: bool
    masquerade: bool
    pcp_ports: tuple[int, int] | None
    pcp_address: IPv4Address | None
    limits: Mapping[str, int]
    timeouts: Mapping[str, int]

    def __init__(
        self,
        *,
        subnet: str | IPv4Network = DEFAULT_SUBNET,
        gateway: str | IPv4Address | None = None,
        subnet6: str | IPv6Network | None = None,
        mtu: int = 1500,
        mode: str | NetMode = NetMode.NAT,
        host_loopback: bool = False,
        isolated: bool = False,
        policy: Policy | Mapping[str, Any] | None = None,
        limit: Limit | str | Mapping[str, Any] | None = None,
        guest_limit: Limit | str | Mapping[str, Any] | None = None,
        dhcp: bool = True,
        dns: bool = True,
        lease_time: int = 3600,
        dns_records: Mapping[str, str | Iterable[str]] | None = None,
        zone: str = DEFAULT_ZONE,
        search: Iterable[str] | None = None,
        resolvers: Iterable[str] | None = None,
        static_leases: Iterable[StaticLease | Mapping[str, Any]] = (),
        dhcp_start: str | IPv4Address | None = None,
        dhcp_end: str | IPv4Address | None = None,
        capture: str | os.PathLike[str] | None = None,
        polling: str | PollingStrategy = PollingStrategy.ADAPTIVE,
        batch_size: int = 64,
        max_spins: int = 1000,
        workers: int = 1,
        io_uring: bool = True,
        filtering: str | Filtering = Filtering.ADDRESS_DEPENDENT,
        gateway_mac: str | bytes | None = None,
        uplink: str | Uplink = Uplink.SOCKETS,
        source: str | IPv4Address | IPv6Address | None = None,
        proxy: str | None = None,
        external: str | IPv4Address | Iterable[str | IPv4Address] = (),
        port_range: tuple[int, int] = (49152, 65535),
        forwarding: bool = False,
        masquerade: bool = False,
        pcp_ports: tuple[int, int] | None = None,
        pcp_address: str | IPv4Address | None = None,
        bridge: str | None = None,
        limits: Mapping[str, int] | None = None,
        timeouts: Mapping[str, int] | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "subnet", ipv4_subnet("subnet", subnet))
        put(self, "subnet6", checked_prefix6(subnet6))
        put(self, "mtu", whole_number("mtu", mtu, MTU_LOWEST, MTU_HIGHEST))
        put(self, "mode", choice(NetMode, "mode", mode))
        put(self, "host_loopback", yes_or_no("host_loopback", host_loopback))
        put(self, "isolated", yes_or_no("isolated", isolated))
        self._put_rules(policy, limit, guest_limit)
        put(self, "bridge", self._segment(bridge))
        # The segment that is joined has its own.
        served = self.mode is not NetMode.BRIDGED
        put(self, "dhcp", yes_or_no("dhcp", dhcp) and served)
        put(self, "dns", yes_or_no("dns", dns) and served)
        put(self, "lease_time", whole_number("lease_time", lease_time, LEASE_SHORTEST, LEASE_LONGEST))
        put(self, "dns_records", FrozenMapping(checked_records({} if dns_records is None else dns_records)))
        put(self, "zone", domain("zone", zone))
        names = (self.zone,) if search is None else several("search", search)
        put(self, "search", tuple(domain("search", name) for name in names))
        put(self, "resolvers", None if resolvers is None else checked_resolvers(resolvers))
        put(self, "capture", None if capture is None else path("capture", capture))
        put(self, "polling", choice(PollingStrategy, "polling", polling))
        put(self, "batch_size", whole_number("batch_size", batch_size, 1, 1024))
        put(self, "max_spins", whole_number("max_spins", max_spins, 0, 1_000_000))
        put(self, "workers", whole_number("workers", workers, 1, WORKERS_MOST))
        put(self, "filtering", choice(Filtering, "filtering", filtering))
        put(self, "limits", named_numbers("limits", {} if limits is None else limits, LIMITS))
        put(self, "timeouts", named_numbers("timeouts", {} if timeouts is None else timeouts, TIMEOUTS))
        put(self, "gateway", self.host_address("`gateway`", self.subnet[1] if gateway is None else gateway))
        self._check_loopback()
        own = parse_mac(b"\x02gn" + self.gateway.packed[1:] if gateway_mac is None else gateway_mac)
        put(self, "gateway_mac", format_mac(own))
        # The whole subnet is handed out; the gateway and the host's loopback are taken from it beforehand.
        put(
            self,
            "dhcp_start",
            self.host_address("`dhcp_start`", self.subnet[1] if dhcp_start is None else dhcp_start),
        )
        put(
            self,
            "dhcp_end",
            self.host_address("`dhcp_end`", self.subnet[-2] if dhcp_end is None else dhcp_end),
        )
        if self.dhcp_start > self.dhcp_end:
            raise ConfigError(
                f"dhcp_start {self.dhcp_start} is after dhcp_end {self.dhcp_end}: give the lower one first."
            )
        put(self, "uplink", choice(Uplink, "uplink", uplink))
        if self.mode is NetMode.BRIDGED and self.uplink is Uplink.TUN:
            raise ConfigError("With `mode='bridged'` nothing is translated: leave `uplink='tun'` out.")
        shared = self.uplink is Uplink.SOCKETS and self.mode is not NetMode.BRIDGED
        if self.workers > 1 and not shared:
            what = "`mode='bridged'`" if self.mode is NetMode.BRIDGED else "`uplink='tun'`"
            raise ConfigError(
                f"{self.workers} `workers` cannot share the one device of {what}: leave `workers` out."
            )
        put(self, "port_range", check_port_range(port_range))
        for name, on in (("io_uring", io_uring), ("forwarding", forwarding), ("masquerade", masquerade)):
            put(self, name, yes_or_no(name, on))
        put(self, "external", self._external(external))
        put(self, "source", self._source(source))
        put(self, "proxy", self._proxy(proxy))
        put(self, "pcp_ports", checked_guest_ports(pcp_ports))
        put(self, "pcp_address", self._pcp_address(pcp_address))
        put(self, "static_leases", self._leases(several("static_leases", static_leases)))

    @property
    def prefix_len(self) -> int:
        """The length of the subnet's prefix."""
        return self.subnet.prefixlen

    @property
    def gateway6(self) -> IPv6Address | None:
        """The gateway's address in the IPv6 prefix, None without one."""
        return None if self.subnet6 is None else self.subnet6[1]

    @property
    def loopback_address(self) -> IPv4Address | None:
        """The address of the host's 127.0.0.1 for guests, None when they do not reach it."""
        return self.subnet[-2] if self.host_loopback else None

    def replace(self, **changes: Any) -> NatConfig:
        """Returns a copy with other values. What follows from the changed values is derived again.

        Args:
            **changes: Settings with their new values.

        Returns:
            The changed copy.

        Raises:
            ConfigError: A value is wrong.
            TypeError: There is no such setting.
        """
        kept = {name: getattr(self, name) for name in self._fields}
        if "subnet" in changes:
            for name in ("gateway", "dhcp_start", "dhcp_end", "gateway_mac"):
                kept.pop(name)
        return NatConfig(**{**kept, **changes})

    @property
    def first_guest_address(self) -> IPv4Address:
        """The lowest address that a guest can have.

        Example:
            >>> NatConfig().first_guest_address
            IPv4Address('192.168.64.2')
        """
        first = self.dhcp_start
        while first in (self.gateway, self.loopback_address):
            first += 1
        return first

    @property
    def first_guest_address6(self) -> IPv6Address | None:
        """The IPv6 address of the guest with `first_guest_address`, None without an IPv6 prefix.

        Example:
            >>> NatConfig(subnet6="fd12::/64").first_guest_address6
            IPv6Address('fd12::2')
        """
        if self.subnet6 is None:
            return None
        return self.subnet6[int(self.first_guest_address) - int(self.subnet.network_address)]

    @property
    def guest_range(self) -> str:
        """The first and the last address that guests can have, as text."""
        first, last = self.subnet[1], self.subnet[-2]
        taken = {self.gateway, self.loopback_address}
        while first in taken:
            first += 1
        while last in taken:
            last -= 1
        return str(first) if first == last else f"{first} to {last}"

    def host_address(self, what: str, value: object) -> IPv4Address:
        """Checks an address that a host of the subnet can have.

        Args:
            what: The name of the value, for the message.
            value: The address.

        Returns:
            The address.

        Raises:
            ConfigError: It is not an address, or not one of a host in the subnet.
        """
        address = ipv4_address(what, value)
        ends = (self.subnet.network_address, self.subnet.broadcast_address)
        if address not in self.subnet or address in ends:
            # The gateway's own address is none for a guest.
            choice = f"{self.subnet[1]} to {self.subnet[-2]}" if what in _OWN else self.guest_range
            raise ConfigError(
                f"{what} {address} is not the address of a host in {self.subnet}: choose one from {choice}."
            )
        return address

    def _proxy(self, value: object) -> ProxyUrl | None:
        if value is None:
            return None
        from guestnet.model.proxy import proxy

        if self.uplink is not Uplink.SOCKETS or self.mode is NetMode.BRIDGED:
            other = "`uplink='tun'`" if self.uplink is Uplink.TUN else "`mode='bridged'`"
            raise ConfigError(f"With {other} packets leave as they are: leave `proxy` out.")
        for server in self.resolvers or ():
            if ip_address(server).is_loopback:
                raise ConfigError(
                    f"`resolvers` {server} would ask around the `proxy`: choose one that the proxy can reach."
                )
        return proxy(value)

    def _source(self, value: object) -> str | None:
        if value is None:
            return None
        from guestnet.model.source import source

        if self.uplink is not Uplink.SOCKETS or self.mode is NetMode.BRIDGED:
            other = "`uplink='tun'`" if self.uplink is Uplink.TUN else "`mode='bridged'`"
            raise ConfigError(
                f"With {other} the host's routes decide where packets leave: leave `source` out."
            )
        return source(value)

    def _external(self, value: object) -> tuple[IPv4Address, ...]:
        given = [value] if isinstance(value, str | IPv4Address) else several("external", value)
        found = tuple(ipv4_address("external", one) for one in given)
        if self.uplink is not Uplink.TUN and (found or self.forwarding or self.masquerade):
            settings = {"external": found, "forwarding": self.forwarding, "masquerade": self.masquerade}
            names = " and ".join(f"`{name}`" for name, value in settings.items() if value)
            raise ConfigError(f"Only `uplink='tun'` has {names}: set it too, or leave {names} out.")
        for address in found:
            if address in self.subnet or address.packed[0] in (0, 127) or address.packed[0] >= 224:
                raise ConfigError(
                    f"`external` {address} cannot be an address outside {self.subnet}: choose another."
                )
        if len(set(found)) != len(found):
            raise ConfigError("`external` names an address twice: give each once.")
        return found

    def _pcp_address(self, value: object) -> IPv4Address | None:
        if self.pcp_ports is not None and self.mode is not NetMode.NAT:
            raise ConfigError(
                "Only with `mode='nat'` guests open ports: choose it, or leave `pcp_ports` out."
            )
        if value is None:
            return None
        address = ipv4_address("pcp_address", value)
        if self.pcp_ports is None:
            raise ConfigError(f"`pcp_address` {address} needs `pcp_ports`: say which ports guests may open.")
        if address in self.subnet or address.is_unspecified or address.packed[0] >= 224:
            raise ConfigError(f"`pcp_address` {address} cannot be an address of the host: choose another.")
        return address

    def _segment(self, bridge: object) -> str | None:
        if self.mode is not NetMode.BRIDGED:
            if bridge is not None:
                raise ConfigError(
                    f"Only `mode='bridged'` has a `bridge`: choose it, or leave {bridge!r} out."
                )
            return None
        if bridge is None:
            raise ConfigError(
                "`mode='bridged'` needs a bridge or interface of the host to join: write `bridge='br0'`."
            )
        if not isinstance(bridge, str) or not 0 < len(bridge) <= 15 or set(bridge) & set("/ \t\n\0"):
            raise ConfigError(
                f"`bridge` {bridge!r} is not the name of an interface: write one such as 'br0'."
            )
        if self.host_loopback:
            raise ConfigError(
                "With `mode='bridged'` no gateway leads to the host's loopback: leave `host_loopback` out."
            )
        if self.isolated:
            raise ConfigError(
                "With `mode='bridged'` guests are on a segment of the host, for which guestnet has no rules: "
                "leave `isolated` out, and isolate them there."
            )
        if self.policy is not None:
            raise ConfigError(
                "With `mode='bridged'` guests are on a segment of the host, for which guestnet has no rules: "
                "leave `policy` out, and filter there."
            )
        return bridge

    def _put_rules(self, policy: object, limit: object, guest_limit: object) -> None:
        object.__setattr__(self, "policy", checked_policy(policy))
        object.__setattr__(self, "limit", checked_limit(limit))
        object.__setattr__(self, "guest_limit", checked_limit(guest_limit))
        if self.mode is NetMode.BRIDGED and (self.limit, self.guest_limit) != (None, None):
            raise ConfigError(
                "With `mode='bridged'` guests are on a segment of the host, which guestnet does not limit: "
                "leave `limit` and `guest_limit` out."
            )

    def _check_loopback(self) -> None:
        if not self.host_loopback:
            return
        if self.mode is NetMode.HOST_ONLY:
            raise ConfigError(
                "With `mode='host_only'` guests reach nothing of the host: leave `host_loopback` out, "
                "or choose `mode='nat'`."
            )
        if self.subnet.prefixlen == PREFIX_LONGEST:
            raise ConfigError(
                f"`subnet` {self.subnet} has no room for `host_loopback` besides the gateway and a guest: "
                "choose a larger one, such as a /29."
            )
        if self.gateway == self.loopback_address:
            raise ConfigError(
                f"`gateway` {self.gateway} is the address that `host_loopback` takes: choose another gateway."
            )

    def _leases(self, values: tuple[object, ...]) -> tuple[StaticLease, ...]:
        leases: list[StaticLease] = []
        seen: set[object] = set()
        for value in values:
            lease = self._lease(value)
            for one in (lease.mac, *lease.addresses, lease.name):
                if one is not None and one in seen:
                    raise ConfigError(f"`static_leases` names {one} twice: give each guest its own.")
                seen.add(one)
            leases.append(lease)
        return tuple(leases)

    def _lease(self, value: object) -> StaticLease:
        if isinstance(value, StaticLease):
            value = {name: getattr(value, name) for name in StaticLease._fields}
        if not isinstance(value, Mapping) or not {"mac"} <= set(value) <= set(StaticLease._fields):
            _refuse_lease(value)
        ip, ip6, name = value.get("ip"), value.get("ip6"), value.get("name")
        if ip is None and ip6 is None:
            _refuse_lease(value)
        if ip is not None:
            ip = self.host_address("`static_leases` address", ip)
            if ip in (self.gateway, self.loopback_address):
                raise ConfigError(
                    f"`static_leases` address {ip} is the gateway's own: choose one from {self.guest_range}."
                )
        if ip6 is not None:
            from guestnet.model.spec6 import host6_address

            ip6 = host6_address("`static_leases` address", ip6, self.subnet6)
        mac = format_mac(parse_mac(value["mac"], "`static_leases`"))
        if name is not None:
            name = domain("`static_leases` name", name, one_label=True)
        return StaticLease(mac, ip, name, ip6)


def _refuse_lease(value: object) -> NoReturn:
    raise ConfigError(
        f"static_leases entry {value!r} is not a lease: write "
        "{'mac': '02:00:5e:10:00:01', 'ip': '192.168.64.10', 'name': 'web'}, with 'ip6' for an IPv6 address."
    )
