"""The data plane: the contract with the crate `guestnet-py`, checked by stubtest (scripts/stubtest.sh).

Only `guestnet.runtime` and the modules for the NAT engine use it. MACs are six bytes, addresses are those of
`ipaddress`.
"""

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, Literal, TypeAlias, final

from typing_extensions import Buffer

from guestnet.errors import GuestnetError

_Ip: TypeAlias = IPv4Address | IPv6Address
_IpIn: TypeAlias = _Ip | str
_Socket: TypeAlias = tuple[_Ip, int]
_SocketIn: TypeAlias = tuple[_IpIn, int]
_Rule: TypeAlias = tuple[
    str,
    str,
    str,
    Sequence[int] | None,
    Sequence[str],
    tuple[Any, ...],
    Sequence[tuple[str, int, int]],
    str,
    bool,
    str,
    "_Limit | None",
]
"""Label, action, direction, endpoints, prefixes of clients, destination, ports, match, log, query types,
limit."""
_Limit: TypeAlias = tuple[int | None, ...]
"""Bytes a second from and to guests, packets a second from and to them, new flows a second, open flows,
queries a second, bytes in all."""
_DnsRecord: TypeAlias = tuple[bytes, int, int, bytes]
"""Name as labels, type, TTL in seconds, data."""

__all__ = [
    "AddressSeen",
    "DataPlane",
    "Datagram",
    "DnsQuestion",
    "Done",
    "Failed",
    "FlowClosed",
    "FlowDenied",
    "FlowInfo",
    "FlowOpened",
    "Frame",
    "Log",
    "NameDenied",
    "NameServer",
    "NatEngine",
    "PacketPool",
    "PolicyAsk",
    "PolicyAskEnded",
    "PolicyTable",
    "PortDown",
    "PortInfo",
    "PortUp",
    "Ring",
    "Runtime",
    "__version__",
    "after_fork_in_child",
    "after_fork_in_parent",
    "before_fork",
    "confinement_lack",
    "drop_reasons",
    "io_uring_works",
]

__version__: Final[str]

@final
class Runtime:
    """Packet threads that networks of this process share.

    A network is placed on the threads that have the fewest, one for each of its workers. A thread starts
    with its first network and ends with its last one.
    """

    def __new__(cls, *, workers: int | None = None, name: str = "guestnet") -> Runtime:
        """A runtime of up to `workers` threads, 1 to 64 (None: one for each processor), called `name`,
        `name-1` and so on. Raises ConfigError for another number."""

    @staticmethod
    def of_process() -> Runtime:
        """The runtime of networks that name none. It has a thread for each processor, and more where a
        network asks for more workers. A fork of the process gets one of its own."""

    @property
    def workers(self) -> int:
        """Most threads."""
    @property
    def threads(self) -> int:
        """Threads that run now."""
    @property
    def networks(self) -> int:
        """Networks on them; one with several workers counts once for each."""

@final
class DataPlane:
    """A running network: its part of the packet threads of a `Runtime`.

    Each command is a method that queues it and returns its number; a `Done` event brings the number back.
    Raises BusyError when the queue is full or the network has ended, ConfigError for a value out of range,
    AttachError for a descriptor that is not open, NotRunning in a fork of the process. Descriptors are
    duplicated: close yours when you like.
    """

    def __new__(
        cls,
        *,
        gateway: IPv4Address | str,
        prefix: int,
        gateway_mac: bytes,
        secret: bytes,
        mode: str = "nat",
        host_loopback: IPv4Address | str | None = None,
        isolated: bool = False,
        reserved: Sequence[tuple[_IpIn, bytes]] = ...,
        filtering: str = "address_dependent",
        limits: Mapping[str, int] = ...,
        timeouts: Mapping[str, int] = ...,
        strategy: str = "adaptive",
        batch_size: int = 64,
        max_spins: int = 1000,
        event_ring: int = 8192,
        command_ring: int = 1024,
        name: str = "guestnet",
        workers: int = 1,
        io_uring: bool = True,
        source: str | None = None,
        proxy: tuple[str, _IpIn, int, bytes, bytes] | None = None,
        runtime: Runtime | None = None,
        gateway6: IPv6Address | str | None = None,
        search: Sequence[str] = ...,
        upstream6: bool = True,
    ) -> DataPlane:
        """Starts the network with 1 to 64 workers, on `runtime` or on that of the process. `secret` is 32
        random bytes that key its hashes and sequence numbers. An address that is `reserved` for a MAC is
        taken by no other guest. With `gateway6`, an address of a /64, the gateway is a router of IPv6 that
        advertises `search`; `upstream6` says whether a route leads out. Raises DataPlaneError when the system
        has no descriptor or thread for it, ConfigError when it asks for more workers than the runtime has,
        NotRunning when the runtime is that of a parent process."""

    @property
    def event_fd(self) -> int:
        """Readable when there are events."""
    @property
    def is_healthy(self) -> bool:
        """False when the network has ended or is about to, by `stop` or by a failure."""
    def drain(self, max: int) -> list[_Event]:
        """Takes up to `max` events, oldest first; `event_fd` is readable again when there are more."""
    def stats(self) -> dict[str, Any]:
        """The counters of one moment; `drops` and `io` are dictionaries in it."""
    def worker_stats(self) -> list[dict[str, Any]]:
        """As `stats`, for each worker."""
    def begin_stop(self) -> None:
        """Asks the network to end, and does not wait: `event_fd` becomes readable when it has."""
    @property
    def has_ended(self) -> bool:
        """True when nothing of the network runs any more. `stop` does not wait then, but for the end of a
        thread whose last network this was."""
    def stop(self) -> None:
        """Ends the network and waits for that; may be called again."""
    def add_port(
        self,
        port: int,
        *,
        mac: bytes | None = None,
        addresses: Sequence[_IpIn] = ...,
        mtu: int = 1500,
        gso_max: int = 65000,
        lax_offload: bool = False,
        uplink: bool = False,
    ) -> int:
        """Adds a port without attachment; its number is below 0x8000_0000. `uplink`: it leads to the segment
        that a bridged network joins."""
    def remove_port(self, port: int) -> int:
        """Removes a port, its flows and its attachment."""
    def attach_tap(self, port: int, fd: int) -> int:
        """Attaches a TAP device, made with IFF_VNET_HDR or without."""
    def attach_stream(self, port: int, fd: int) -> int:
        """Attaches a connected stream socket with QEMU's framing."""
    def attach_dgram(self, port: int, fd: int) -> int:
        """Attaches a connected socket that carries one frame per packet."""
    def attach_vhost_user(self, port: int, fd: int) -> int:
        """Attaches a vhost-user front-end: its connection, or a listening socket where it may come and go."""
    def attach_memory(self, port: int) -> int:
        """Frames come by `inject` and go by `Frame` events."""
    def listen(
        self,
        listener: int,
        kind: str,
        fd: int,
        *,
        mtu: int = 1500,
        gso_max: int = 65000,
        lax_offload: bool = False,
    ) -> int:
        """Takes guests on a bound unix socket: "stream", "dgram", "unixgram" or "vhost-user"."""
    def stop_listening(self, listener: int) -> int:
        """Takes no more guests there."""
    def bind_address(self, port: int, ip: _IpIn, mac: bytes | None = None) -> int:
        """Gives an address to a port."""
    def unbind_address(self, ip: _IpIn) -> int:
        """Takes an address back."""
    def add_service(
        self, service: int, proto: str, address: _IpIn, port: int, unix_path: str | None = None
    ) -> int:
        """Adds a service of the gateway: UDP as `Datagram` events, TCP relayed to a unix socket. TCP without
        a path is DNS, served by the forwarder."""
    def service_send(self, port: int, dst_mac: bytes, src: _SocketIn, dst: _SocketIn, payload: bytes) -> int:
        """Sends the answer of a UDP service."""
    def set_dns_zones(self, service: int, generation: int, own: Sequence[bytes]) -> int:
        """Says which names (labels, in lower case), with all below them, the DNS service may have an own
        answer for, and forgets all cached responses. `generation` counts the changes."""
    def forget_guest_names(self, generation: int) -> int:
        """Guests that have names have come or gone, or have other ones."""
    def set_name_servers(
        self,
        servers: Sequence[str],
        *,
        timeout: float = 2.0,
        attempts: int = 2,
        rotate: bool = False,
        use_tcp: bool = False,
    ) -> int:
        """The name servers that names of others are asked of, as `192.0.2.53:53` or `[2001:db8::53]:53`;
        `timeout` in seconds for each try, `attempts`: tries of each."""
    def forward_dns(self, port: int, ticket: int, generation: int) -> int:
        """Answers a `DnsQuestion`: the name is not the network's own."""
    def answer_dns(
        self,
        port: int,
        ticket: int,
        generation: int,
        rcode: int,
        answers: Sequence[_DnsRecord],
        authority: Sequence[_DnsRecord],
        searched: bytes | None = None,
        target: bytes | None = None,
    ) -> int:
        """Answers a `DnsQuestion`. `generation` is what it was before the records were looked at.
        `searched`: the name before the search domain, while which fails this is a temporary failure;
        `target`: the name of others that the last answer is an alias of."""
    def add_forward(
        self, forward: int, proto: str, guest: _SocketIn, fds: Sequence[int], *, opened_by_guest: bool = False
    ) -> int:
        """Publishes a guest's port on listening TCP or bound UDP sockets."""
    def attach_tun(
        self,
        fd: int,
        *,
        external: Sequence[IPv4Address],
        ports: tuple[int, int] | None = None,
        mtu: int = 1500,
    ) -> int:
        """Makes a TUN device (IFF_NO_PI, with or without IFF_VNET_HDR) the uplink: what goes outside is
        translated to the external addresses and leaves there. `ports` are first and last (49152 to 65535),
        `mtu` is of both sides, in bytes."""
    def add_uplink_forward(
        self,
        forward: int,
        proto: str,
        external: _SocketIn,
        guest: _SocketIn,
        *,
        opened_by_guest: bool = False,
    ) -> int:
        """Publishes a guest's port on an external address of the uplink. Raises PortInUse or ConfigError."""
    def nat_stats(self) -> int:
        """Counters of the uplink's engine and what it holds: a pair of dictionaries."""
    def retarget_forward(self, forward: int, guest: _SocketIn) -> int:
        """Leads a forward elsewhere; an address that no port has refuses every client."""
    def remove_forward(self, forward: int) -> int:
        """Takes a published port back; connections that run live on."""
    def inject(self, port: int, frame: Buffer) -> int:
        """A frame from the guest of a memory attachment."""
    def name_port(self, port: int, name: str | None) -> None:
        """What captures call a port, None to forget it. Holds at once; not a command."""
    def start_capture(self, fd: int, snaplen: int = 0) -> int:
        """Writes every frame of every port to `fd` as pcapng, `snaplen` bytes of it (0: all)."""
    def stop_capture(self) -> int:
        """Ends the capture; done when everything is written."""
    def set_policy(self, mode: str, *, isolated: bool = False, trusted: Sequence[int] = ...) -> int:
        """Changes the rules: the mode, and whether guests may open flows to each other. Those on the ports in
        `trusted` always may. Brings the number of flows that were cut, once all flows have been judged again.
        """
    def decide(self, port: int, ticket: int, allow: bool) -> int:
        """Answers the question of a `PolicyAsk`."""
    def set_rules(self, endpoint: int | None, table: PolicyTable | None) -> int:
        """Puts a policy in force, for one guest or for all that have none of their own. Brings the number of
        flows that were cut, once all flows have been judged again. Keep the table that it replaces until
        then: freeing a large one takes time."""
    def set_limit(self, endpoint: int | None, limit: _Limit | None) -> int:
        """Limits what a guest carries, or (None) all together. None takes the limit back."""
    def set_upstream6(self, upstream: bool) -> int:
        """Says whether this host has IPv6: guests learn whether a route of IPv6 leads out."""
    def set_host_addresses(self, addresses: Sequence[_IpIn]) -> int:
        """Says which addresses this host has, for rules about the group "host"."""
    def tell_flows(self, flows: bool, *, denials: bool) -> int:
        """Whether `FlowOpened` and `FlowClosed` events come, and whether `FlowDenied` events do."""
    def list_flows(self) -> int:
        """Brings a list of `FlowInfo`."""
    def port_stats(self) -> int:
        """Brings a list of `PortInfo`."""

@final
class FlowInfo:
    """One flow."""

    @property
    def flow(self) -> tuple[int, int]: ...
    @property
    def port(self) -> int: ...
    @property
    def proto(self) -> int: ...
    @property
    def guest(self) -> _Socket: ...
    @property
    def remote(self) -> _Socket: ...
    @property
    def inbound(self) -> bool: ...
    @property
    def state(self) -> str: ...
    @property
    def bytes_out(self) -> int: ...
    @property
    def bytes_in(self) -> int: ...
    @property
    def age_ms(self) -> int: ...
    @property
    def idle_ms(self) -> int: ...

@final
class PortInfo:
    """One port with its counters."""

    @property
    def port(self) -> int: ...
    @property
    def mac(self) -> bytes | None: ...
    @property
    def addresses(self) -> list[_Ip]: ...
    @property
    def mtu(self) -> int: ...
    @property
    def flows(self) -> int: ...
    @property
    def buffered(self) -> int: ...
    @property
    def counters(self) -> dict[str, Any]: ...

@final
class Datagram:
    """A datagram for a UDP service."""

    @property
    def service(self) -> int: ...
    @property
    def port(self) -> int: ...
    @property
    def mac(self) -> bytes: ...
    @property
    def src(self) -> _Socket: ...
    @property
    def dst(self) -> _Socket: ...
    @property
    def payload(self) -> bytes: ...

@final
class DnsQuestion:
    """A guest asks for a name that may be the network's own, or the name servers are to be looked at."""

    @property
    def port(self) -> int: ...
    @property
    def ticket(self) -> int: ...
    @property
    def name(self) -> bytes: ...
    @property
    def kind(self) -> int: ...

@final
class NameServer:
    """A name server does not respond, or (without trouble) does so again."""

    @property
    def server(self) -> _Socket: ...
    @property
    def trouble(self) -> str | None: ...

@final
class AddressSeen:
    """A guest was seen to use an address."""

    @property
    def port(self) -> int: ...
    @property
    def mac(self) -> bytes: ...
    @property
    def address(self) -> _Ip: ...

@final
class FlowOpened:
    """A flow began."""

    @property
    def flow(self) -> tuple[int, int]: ...
    @property
    def port(self) -> int: ...
    @property
    def proto(self) -> int: ...
    @property
    def guest(self) -> _Socket: ...
    @property
    def remote(self) -> _Socket: ...
    @property
    def inbound(self) -> bool: ...
    @property
    def rule(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...

@final
class FlowClosed:
    """A flow ended."""

    @property
    def flow(self) -> tuple[int, int]: ...
    @property
    def port(self) -> int: ...
    @property
    def bytes_out(self) -> int: ...
    @property
    def bytes_in(self) -> int: ...
    @property
    def packets_out(self) -> int | None: ...
    @property
    def packets_in(self) -> int | None: ...
    @property
    def rule(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def shown(self) -> str | None: ...

@final
class PolicyAsk:
    """A flow waits for the owner's answer."""

    @property
    def ticket(self) -> int: ...
    @property
    def port(self) -> int: ...
    @property
    def proto(self) -> int: ...
    @property
    def guest(self) -> _Socket: ...
    @property
    def remote(self) -> _Socket: ...
    @property
    def rule(self) -> str: ...
    @property
    def name(self) -> str | None:
        """A name for which the guest got the address of the other side."""

@final
class PolicyAskEnded:
    """A flow waits no longer for the owner's answer."""

    @property
    def ticket(self) -> int: ...
    @property
    def port(self) -> int: ...

@final
class NameDenied:
    """A query of a guest was refused by a rule, or its answer was."""

    @property
    def port(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> int:
        """The number of the type that was asked for."""
    @property
    def rule(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def unreported(self) -> int:
        """How many denials of the guest were not reported since the last one that was."""

@final
class FlowDenied:
    """A flow was refused or cut."""

    @property
    def port(self) -> int: ...
    @property
    def direction(self) -> Literal["outbound", "inbound", "between_guests"]: ...
    @property
    def proto(self) -> int: ...
    @property
    def guest(self) -> _Socket: ...
    @property
    def remote(self) -> _Socket: ...
    @property
    def rule(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def shown(self) -> str | None: ...
    @property
    def reason(self) -> str: ...
    @property
    def unreported(self) -> int: ...

@final
class Done:
    """A command is done."""

    @property
    def sequence(self) -> int: ...
    @property
    def error(self) -> GuestnetError | None:
        """Why it was not done; nothing has changed then."""
    @property
    def value(self) -> list[FlowInfo] | list[PortInfo] | int | None:
        """What it brought."""

@final
class PortUp:
    """A guest came to a listener; nothing of it is told before this."""

    @property
    def port(self) -> int: ...
    @property
    def listener(self) -> int: ...
    @property
    def peer(self) -> str: ...

@final
class PortDown:
    """The attachment of a port is gone. The port of a listener's guest is gone with it."""

    @property
    def port(self) -> int: ...
    @property
    def reason(self) -> str: ...

@final
class Frame:
    """A frame to a guest with a memory attachment."""

    @property
    def port(self) -> int: ...
    @property
    def frame(self) -> bytes: ...

@final
class Log:
    """A log record; `level` is one of the module `logging`."""

    @property
    def level(self) -> int: ...
    @property
    def message(self) -> str: ...

@final
class Failed:
    """The worker has failed and is gone."""

    @property
    def message(self) -> str: ...

_Event: TypeAlias = (
    Datagram
    | AddressSeen
    | FlowOpened
    | FlowClosed
    | FlowDenied
    | NameDenied
    | PolicyAsk
    | PolicyAskEnded
    | Done
    | PortUp
    | PortDown
    | Frame
    | Log
    | Failed
)

_U32s: TypeAlias = Sequence[int] | Buffer
_Network: TypeAlias = tuple[_IpIn, int]

def io_uring_works() -> bool:
    """True when small writes can be gathered in one call of io_uring here."""

def confinement_lack() -> str | None:
    """None when packet threads can give up here what they never need; else what they cannot."""

def drop_reasons() -> list[str]:
    """The names of the reasons for drops, by number."""

def before_fork() -> None:
    """Waits until no engine is in use by another thread, and keeps it so until the fork is over."""

def after_fork_in_parent() -> None:
    """The end of a fork in the process that did it."""

def after_fork_in_child() -> None:
    """The end of a fork in the new process."""

@final
class NatEngine:
    """In-place NAT with connection tracking. Times are nanoseconds; a result is one byte (`nat.engine`)."""

    def __new__(
        cls,
        *,
        external: Sequence[_IpIn],
        internal: _Network,
        secret: bytes,
        gateway: _IpIn | None = None,
        ports: tuple[int, int] = ...,
        table_size: int = 65536,
        prefault: bool = False,
        timeouts: Mapping[str, int] = ...,
        mapping_udp: str = "endpoint_independent",
        mapping_tcp: str = "endpoint_independent",
        filtering_udp: str = "address_dependent",
        filtering_tcp: str = "address_dependent",
        port_preservation: bool = True,
        port_parity: bool = True,
        inbound_refresh: bool = True,
        tcp_pickup: bool = True,
        hairpin: bool = True,
        decrement_ttl: bool = True,
        mtu_outside: int = 65535,
        mtu_inside: int = 65535,
        ports_per_endpoint: int = 65536,
        sessions_per_endpoint: int = ...,
        no_nat: Sequence[_Network] = ...,
        denied: Sequence[_Network] = ...,
        refusal: str = "prohibited",
        answer_unsolicited_syn: bool = True,
        icmp_errors_per_second: int = 100,
        fragment_sets: int = 1024,
        fragment_bytes: int = ...,
        output_bytes: int = ...,
    ) -> NatEngine:
        """Raises ConfigError for what the engine cannot work with."""
    def translate(self, packet: Buffer, outbound: bool, now: int, offset: int = ...) -> int:
        """Translates one packet in place."""
    def translate_frame(self, frame: Buffer, outbound: bool, now: int) -> tuple[int, int]:
        """Translates the IPv4 packet of a frame in place; gives the result and the frame's length."""
    def translate_spans(
        self, buffer: Buffer, offsets: _U32s, lengths: _U32s | None, outbound: bool, now: int
    ) -> bytes:
        """Translates packets of one buffer in place; no lengths: up to the next."""
    def translate_each(self, packets: list[Any], outbound: bool, now: int) -> bytes:
        """Translates packets that are a buffer each."""
    def translate_pool(self, pool: PacketPool, indices: _U32s, outbound: bool, now: int) -> bytes:
        """Translates packets of a pool, by index."""
    def poll_output(self) -> tuple[bool, bytes] | None:
        """The next packet that the engine itself sends: whether it goes out, and its bytes."""
    def expire(self, now: int, visits: int) -> int:
        """Expiry work for up to `visits` records; returns how many connections ended."""
    def next_timer(self) -> int | None:
        """When there is expiry work next."""
    def add_forward(self, protocol: str, external: _SocketIn, internal: _SocketIn) -> None:
        """Publishes a port. Raises PortInUse or ConfigError."""
    def remove_forward(self, protocol: str, external: _SocketIn) -> bool:
        """Takes a published port back; False when it was not published."""
    @property
    def connection_count(self) -> int:
        """Connections tracked now."""
    def stats(self) -> dict[str, Any]:
        """Counters since the engine was made."""
    def conntrack_stats(self) -> dict[str, int]:
        """What the engine holds now."""
    def connections(
        self,
    ) -> list[
        tuple[int, str, tuple[IPv4Address, int], tuple[IPv4Address, int], tuple[IPv4Address, int], int, int]
    ]:
        """Protocol, state, internal, external and remote end, bytes out and in."""

@final
class PolicyTable:
    """A compiled policy. It never changes and can be in force in several networks."""

    def __new__(cls, rules: Sequence[_Rule], default: str, options: Mapping[str, Any]) -> PolicyTable:
        """Compiles rules, of which the first that matches decides. Raises ConfigError."""

    def __len__(self) -> int: ...
    @property
    def names_decide(self) -> bool:
        """Whether queries for names are judged."""
    def judge(
        self,
        direction: str,
        protocol: str,
        source: _IpIn | None,
        destination: _SocketIn,
        *,
        endpoint: int = 0,
        pins: Sequence[str] = ...,
        shown: str | None = None,
        host_addresses: Sequence[_IpIn] = ...,
        subnet: tuple[IPv4Address | str, int] | None = None,
        gateway: _IpIn | None = None,
        host_loopback: _IpIn | None = None,
    ) -> tuple[str, int | None, str]:
        """What becomes of a flow: "allow", "deny", "inspect" or "ask", the number of the rule (None: the
        default, or a built-in rule about other resolvers), and its label. `pins` are the names that the guest
        got for the address, `shown` is what the conversation shows ("": nothing, None: not yet)."""
    def judge_name(
        self, name: str, *, endpoint: int = 0, ordinary: bool = True
    ) -> tuple[str, int | None, str]:
        """Whether a name may be asked for; `ordinary`: by a query of a type that every allowed name may be
        asked for by."""

@final
class PacketPool:
    """Preallocated packet buffers of one size, used by index.

    Args:
        capacity: Buffers in the pool.
        buffer_size: Bytes of a buffer.

    Raises:
        ConfigError: A number is out of range, or an index is not held.

    Example:
        >>> pool = PacketPool(16, 2048)
        >>> index = pool.put(b"a frame")
        >>> pool.get(index), pool.available
        (b'a frame', 15)
        >>> pool.free(index)
    """

    def __new__(cls, capacity: int = ..., buffer_size: int = ...) -> PacketPool: ...
    @property
    def capacity(self) -> int:
        """How many buffers there are."""
    @property
    def buffer_size(self) -> int:
        """How many bytes a buffer holds."""
    @property
    def available(self) -> int:
        """How many buffers are free."""
    def alloc(self) -> int | None:
        """Takes a buffer.

        Returns:
            Its index, None when none is free.
        """
    def free(self, index: int) -> None:
        """Gives a buffer back.

        Args:
            index: The buffer.

        Raises:
            ConfigError: The buffer is not held.
        """
    def get(self, index: int) -> bytes:
        """Returns the bytes in use.

        Args:
            index: The buffer.

        Returns:
            A copy of them.

        Raises:
            ConfigError: The buffer is not held.
        """
    def take(self, index: int) -> bytes | None:
        """Returns the bytes in use, and frees the buffer.

        Args:
            index: The buffer.

        Returns:
            A copy of the bytes, None when the buffer is not held.
        """
    def set(self, index: int, data: Buffer) -> None:
        """Sets the bytes in use.

        Args:
            index: The buffer.
            data: Any object that has contiguous bytes.

        Raises:
            ConfigError: The buffer is not held, or the bytes do not fit.
        """
    def put(self, data: Buffer) -> int | None:
        """Takes a buffer and fills it.

        Args:
            data: Any object that has contiguous bytes.

        Returns:
            The index of the buffer, None when none is free.

        Raises:
            ConfigError: The bytes do not fit.
        """
    def __len__(self) -> int: ...

@final
class Ring:
    """A queue of buffer indexes. Any thread may use either end; one at a time does.

    Args:
        capacity: How many indexes it holds, rounded up to a power of two.

    Raises:
        ConfigError: The number is out of range.

    Example:
        >>> ring = Ring(4)
        >>> ring.enqueue_batch([1, 2, 3]), ring.dequeue(), len(ring)
        (3, 1, 2)
    """

    def __new__(cls, capacity: int = ...) -> Ring: ...
    @property
    def capacity(self) -> int:
        """How many indexes it holds at most."""
    @property
    def is_empty(self) -> bool:
        """Whether it holds no index."""
    @property
    def is_full(self) -> bool:
        """Whether it has no room."""
    def enqueue(self, index: int) -> bool:
        """Puts an index.

        Args:
            index: A buffer.

        Returns:
            Whether there was room.
        """
    def dequeue(self) -> int | None:
        """Takes the oldest index.

        Returns:
            The index, None when the ring is empty.
        """
    def enqueue_batch(self, indices: Sequence[int]) -> int:
        """Puts as many indexes as there is room for, in order.

        Args:
            indices: Buffers.

        Returns:
            How many were put.
        """
    def dequeue_batch(self, count: int) -> list[int]:
        """Takes several indexes, oldest first.

        Args:
            count: How many at most.

        Returns:
            The indexes.
        """
    def __len__(self) -> int: ...
