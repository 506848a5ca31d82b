"""NatEngine: translates IPv4 packets in place, with connection tracking.

Theory of operation: the engine has no sockets, no threads and no clock of its own. A caller gives it a packet
in any writable buffer (bytearray, memoryview, ctypes or NumPy array) and a direction. The engine rewrites
addresses, ports and checksums, and says what became of the packet. What it sends itself (ICMP errors,
fragments) waits in `output`. Connections end in slices of expiry work, which the caller asks for.

Limits: batches run without the interpreter's lock, so no other thread may write to their buffers meanwhile,
and `os.fork` waits for them. A caller that translates a capture gives `now` with every call.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from typing import Any, ClassVar, overload

from guestnet import _native
from guestnet.errors import ConfigError
from guestnet.model.defaults import DEFAULT_SUBNET
from guestnet.model.spec import Filtering
from guestnet.model.stats import ConnTrackStats, NatStats
from guestnet.model.values import check_port_range, choice, whole_number

PacketPool = _native.PacketPool
Ring = _native.Ring

os.register_at_fork(
    before=_native.before_fork,
    after_in_parent=_native.after_fork_in_parent,
    after_in_child=_native.after_fork_in_child,
)

_SLICE = 1024
"""Records that one slice of expiry work visits, in well under a millisecond."""


class NatDirection(Enum):
    """Which way a packet travels.

    Example:
        >>> NatDirection.OUTBOUND
        <NatDirection.OUTBOUND: True>
    """

    OUTBOUND = True
    """From a guest to the outside."""
    INBOUND = False
    """From the outside to a guest."""


class Refusal(StrEnum):
    """The reply to a guest whose new connection is refused."""

    PROHIBITED = "prohibited"
    """ICMP 3/13, administratively prohibited (RFC 5508)."""
    HOST_UNREACHABLE = "host_unreachable"
    """ICMP 3/1, a soft error (RFC 6888)."""
    SILENT = "silent"


@dataclass(frozen=True)
class NatResult:
    """What became of a packet.

    Only a packet whose result has `send` may be sent on. After any other result the buffer is unchanged,
    except after `FRAGMENTED`.

    Example:
        >>> NatResult.TRANSLATED.send, NatResult.PASS_THROUGH.send
        (True, False)
        >>> NatResult.dropped("table_full").is_dropped
        True
    """

    kind: str
    """translated, hairpinned, pass_through, held, fragmented, too_big or dropped."""
    reason: str | None = None
    """Why it was dropped, in a word that does not change between releases."""

    TRANSLATED: ClassVar[NatResult]
    """Rewritten; it goes on in its direction."""
    HAIRPINNED: ClassVar[NatResult]
    """Rewritten at both ends; it goes back inside, to another guest."""
    PASS_THROUGH: ClassVar[NatResult]
    """It does not concern the engine."""
    HELD: ClassVar[NatResult]
    """A fragment that waits for the first of its packet; it comes out of `output` later."""
    FRAGMENTED: ClassVar[NatResult]
    """Rewritten, and too big for the next link. Its fragments are in `output`."""
    TOO_BIG: ClassVar[NatResult]
    """Over the MTU and must not be fragmented. An ICMP error for its sender is in `output`."""

    @property
    def is_dropped(self) -> bool:
        """Whether the packet was dropped, for `reason`."""
        return self.kind == "dropped"

    @property
    def send(self) -> bool:
        """Whether the buffer now holds a packet to send on."""
        return self.kind in ("translated", "hairpinned")

    def __repr__(self) -> str:
        if self.reason is not None:
            return f"NatResult.dropped({self.reason!r})"
        return f"NatResult.{self.kind.upper()}"

    @staticmethod
    def dropped(reason: str) -> NatResult:
        """Returns the result of a packet that was dropped.

        Args:
            reason: A stable name of a reason, such as "table_full".

        Returns:
            The result with this reason.

        Raises:
            ValueError: There is no such reason.
        """
        return _RESULTS[_DROPPED + _REASONS.index(reason)]


_KINDS = ("translated", "hairpinned", "pass_through", "held", "fragmented", "too_big")
_DROPPED = 16
_REASONS = tuple(_native.drop_reasons())
_RESULTS: dict[int, NatResult] = {
    **{code: NatResult(kind) for code, kind in enumerate(_KINDS)},
    **{_DROPPED + code: NatResult("dropped", reason) for code, reason in enumerate(_REASONS)},
}
for _code, _kind in enumerate(_KINDS):
    setattr(NatResult, _kind.upper(), _RESULTS[_code])


class NatResults(Sequence[NatResult]):
    """The results of a batch: a sequence that keeps one byte for each packet.

    Example:
        >>> engine = NatEngine("203.0.113.1")
        >>> results = engine.translate_batch([bytearray(28), bytearray(28)], NatDirection.OUTBOUND)
        >>> len(results), results[0].send
        (2, False)
    """

    def __init__(self, codes: bytes) -> None:
        self.codes = codes
        """0 translated, 1 hairpinned, 2 pass through, 3 held, 4 fragmented, 5 too big, from 16 dropped."""

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> NatResult: ...
    @overload
    def __getitem__(self, index: slice) -> NatResults: ...
    def __getitem__(self, index: int | slice) -> NatResult | NatResults:
        if isinstance(index, slice):
            return NatResults(self.codes[index])
        return _RESULTS[self.codes[index]]

    def __iter__(self) -> Iterator[NatResult]:
        return map(_RESULTS.__getitem__, self.codes)

    def __eq__(self, other: object) -> bool:
        return self.codes == other.codes if isinstance(other, NatResults) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def counts(self) -> dict[NatResult, int]:
        """Counts the results.

        Returns:
            How often each result occurs.
        """
        return {_RESULTS[code]: n for code, n in Counter(self.codes).items()}

    def __repr__(self) -> str:
        return f"<NatResults {', '.join(f'{n} {r!r}' for r, n in self.counts().items()) or 'of nothing'}>"


def _is_outbound(direction: NatDirection) -> bool:
    if not isinstance(direction, NatDirection):
        raise TypeError(f"{direction!r} is not a NatDirection: give NatDirection.OUTBOUND or INBOUND.")
    return direction is NatDirection.OUTBOUND


def _of_ports(protocol: str) -> str:
    if protocol not in ("tcp", "udp"):
        raise ConfigError(f"{protocol!r} is not a protocol of ports: write 'tcp' or 'udp'.")
    return protocol


def _end(what: str, value: tuple[IPv4Address | str, int]) -> tuple[IPv4Address, int]:
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{what} {value!r} is not an address and a port: write ('203.0.113.1', 80).")
    return _address(value[0], f"The {what} address"), whole_number(f"The {what} port", value[1], 1, 65535)


def _address(value: IPv4Address | str, what: str) -> IPv4Address:
    if not isinstance(value, IPv4Address | str):
        raise TypeError(f"{what} {value!r} is neither text nor an IPv4Address: write '203.0.113.1'.")
    try:
        return IPv4Address(value)
    except AddressValueError:
        raise ConfigError(
            f"{what} {value!r} is not an IPv4 address: write one such as 203.0.113.1."
        ) from None


def _network(value: IPv4Network | str, what: str) -> IPv4Network:
    if not isinstance(value, IPv4Network | str):
        raise TypeError(f"{what} {value!r} is neither text nor an IPv4Network: write '{DEFAULT_SUBNET}'.")
    try:
        return IPv4Network(value)
    except (AddressValueError, NetmaskValueError, ValueError):
        message = f"{what} {value!r} is not an IPv4 network: write one such as {DEFAULT_SUBNET}."
        raise ConfigError(message) from None


@dataclass(frozen=True)
class NatEngineConfig:
    """The settings of an engine. The defaults are what RFC 4787, 5382, 5508, 6888 and 7857 ask for.

    Raises:
        ConfigError: A value is wrong. The message says what to write instead.
        TypeError: A value has a wrong type.

    Example:
        >>> config = NatEngineConfig("203.0.113.1", internal="10.9.0.0/24").with_timeout(600)
        >>> config.port_range, config.timeouts["udp"]
        ((49152, 65535), 600)
    """

    external: IPv4Address | str | Sequence[IPv4Address | str]
    """External addresses; a guest keeps one of them."""
    internal: IPv4Network | str = DEFAULT_SUBNET
    """The inside network."""
    gateway: IPv4Address | str | None = None
    """The source address of ICMP errors to guests; by default the first address inside."""
    port_range: tuple[int, int] = (49152, 65535)
    """External ports, both included."""
    table_size: int = 65536
    """The most connections at once."""
    prefault: bool = False
    """Touch all memory at the start, so that no packet waits for a page."""
    timeouts: Mapping[str, int] = field(default_factory=dict)
    """Seconds, by name: udp 300, udp_dns 10 (answered), icmp 60, tcp_established 7440, tcp_opening 240,
    tcp_closing 240, other 300, fragment 15, port_hold 120, unsolicited_syn 6."""
    mapping_udp: Filtering = Filtering.ENDPOINT_INDEPENDENT
    mapping_tcp: Filtering = Filtering.ENDPOINT_INDEPENDENT
    filtering_udp: Filtering = Filtering.ADDRESS_DEPENDENT
    filtering_tcp: Filtering = Filtering.ADDRESS_DEPENDENT
    port_preservation: bool = True
    port_parity: bool = True
    inbound_refresh: bool = True
    """Inbound packets keep UDP and ICMP mappings alive too."""
    tcp_pickup: bool = True
    """An outbound segment without SYN may open a connection."""
    hairpin: bool = True
    decrement_ttl: bool = True
    mtu_outside: int = 65535
    mtu_inside: int = 65535
    ports_per_endpoint: int = 65536
    sessions_per_endpoint: int = 0xFFFFFFFF
    no_nat: Sequence[IPv4Network | str] = ()
    """Destinations that are not translated."""
    denied: Sequence[IPv4Network | str] = ()
    """Destinations that are refused."""
    refusal: Refusal = Refusal.PROHIBITED
    answer_unsolicited_syn: bool = True
    icmp_errors_per_second: int = 100
    """ICMP errors to one guest, and to the whole outside."""
    secret: bytes | None = field(default=None, repr=False)
    """32 bytes that key hashes and ports; random by default. With a fixed one, runs are reproducible."""

    def __post_init__(self) -> None:
        given = self.external
        many = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        put = object.__setattr__
        put(self, "external", tuple(_address(a, "The external address") for a in many))
        put(self, "internal", _network(self.internal, "The internal network"))
        if self.gateway is not None:
            put(self, "gateway", _address(self.gateway, "The gateway"))
        for name in ("no_nat", "denied"):
            put(self, name, tuple(_network(n, "The destination") for n in getattr(self, name)))
        put(self, "port_range", check_port_range(self.port_range, "The port range"))
        for name in ("mapping_udp", "mapping_tcp", "filtering_udp", "filtering_tcp"):
            put(self, name, choice(Filtering, name, getattr(self, name)))
        put(self, "refusal", choice(Refusal, "refusal", self.refusal))
        if not isinstance(self.timeouts, Mapping):
            raise TypeError(f"timeouts {self.timeouts!r} is not a mapping of names to seconds.")
        # The engine checks all the rest; now, so that a wrong value is found where it is written.
        _engine(_check_arguments(self))

    def with_port_range(self, first: int, last: int) -> NatEngineConfig:
        """Returns a copy with other external ports.

        Args:
            first: The first external port.
            last: The last one, included.

        Returns:
            The changed copy.

        Raises:
            ConfigError: A number is not a port, or `first` is after `last`.
        """
        return replace(self, port_range=(first, last))

    def with_timeout(self, seconds: int) -> NatEngineConfig:
        """Returns a copy with another timeout for UDP and for established TCP.

        Args:
            seconds: The timeout.

        Returns:
            The changed copy.

        Raises:
            ConfigError: The number is out of range.
        """
        return replace(self, timeouts={**self.timeouts, "udp": seconds, "tcp_established": seconds})

    def with_filtering(self, filtering: Filtering) -> NatEngineConfig:
        """Returns a copy with this filtering for all protocols.

        Args:
            filtering: Who may send to a port that a guest uses.

        Returns:
            The changed copy.

        Raises:
            ConfigError: The value is not a `Filtering`.
        """
        return replace(self, filtering_udp=filtering, filtering_tcp=filtering)


def _check_arguments(config: NatEngineConfig) -> dict[str, Any]:
    """The native arguments, with a table that costs nothing: for checking alone."""
    values = _arguments(config)
    if 0 < values["table_size"] <= 0xFFFFFE:
        values["table_size"] = 1
    values["prefault"] = False
    return values


def _arguments(c: NatEngineConfig) -> dict[str, Any]:
    def split(network: IPv4Network | str) -> tuple[IPv4Address, int]:
        n = IPv4Network(network)
        return n.network_address, n.prefixlen

    same = (
        "gateway", "table_size", "prefault", "port_preservation", "port_parity", "inbound_refresh",
        "tcp_pickup", "hairpin", "decrement_ttl", "mtu_outside", "mtu_inside", "ports_per_endpoint",
        "sessions_per_endpoint", "answer_unsolicited_syn", "icmp_errors_per_second",
    )  # fmt: skip
    words = ("mapping_udp", "mapping_tcp", "filtering_udp", "filtering_tcp", "refusal")
    assert isinstance(c.external, tuple)
    return {
        **{name: getattr(c, name) for name in same},
        **{name: str(getattr(c, name)) for name in words},
        "external": list(c.external),
        "internal": split(c.internal),
        "ports": c.port_range,
        "timeouts": dict(c.timeouts),
        "no_nat": [split(n) for n in c.no_nat],
        "denied": [split(n) for n in c.denied],
        "secret": c.secret if c.secret is not None else os.urandom(32),
    }


def _engine(arguments: dict[str, Any]) -> _native.NatEngine:
    try:
        return _native.NatEngine(**arguments)
    except OverflowError as e:
        raise ConfigError(f"A number of the NAT engine's configuration is out of range: {e}.") from None


@dataclass(frozen=True)
class Connection:
    """One tracked connection. For ICMP the ports are identifiers; protocols without ports have 0.

    Example:
        >>> engine = NatEngine("203.0.113.1")
        >>> engine.connections()
        []
    """

    protocol: int
    state: str
    internal: tuple[IPv4Address, int]
    external: tuple[IPv4Address, int]
    remote: tuple[IPv4Address, int]
    bytes_out: int
    bytes_in: int


class NatEngine:
    """Translates packets in place, with connection tracking.

    Several threads may use an engine; one at a time runs in it. Time may start anywhere: the first call sets
    its start, by `now` or else by the clock. A time before the latest one counts as the latest. Give `now`
    with every call or with none.

    Args:
        config: The settings, or an external address.
        clock: Returns nanoseconds. It is asked when a call has no `now`.

    Raises:
        ConfigError: A setting is wrong.

    Example:
        >>> engine = NatEngine(NatEngineConfig("203.0.113.1", internal="192.168.64.0/24"))
        >>> header = "4500001c0001000040113e1cc0a84002cb007109"  # UDP from 192.168.64.2 to 203.0.113.9
        >>> packet = bytearray.fromhex(header + "c350003500080000")
        >>> engine.translate(packet, NatDirection.OUTBOUND)
        NatResult.TRANSLATED
        >>> packet[12:16] == bytes([203, 0, 113, 1])
        True
        >>> [(c.internal[0].compressed, c.remote[1]) for c in engine.connections()]
        [('192.168.64.2', 53)]
    """

    def __init__(
        self,
        config: NatEngineConfig | IPv4Address | str,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.config = config if isinstance(config, NatEngineConfig) else NatEngineConfig(config)
        self._clock = clock
        """Nanoseconds; asked when a call gives no time."""
        self._native = _engine(_arguments(self.config))

    def _now(self, now: float | None) -> int:
        if now is None:
            return self._clock()
        try:
            return max(0, int(now * 1e9))
        except (OverflowError, ValueError):  # infinite, or no number (nan)
            raise ConfigError(f"now {now!r} is not a time: give seconds, such as time.monotonic().") from None

    def translate(
        self, packet: Any, direction: NatDirection, *, offset: int = 0, now: float | None = None
    ) -> NatResult:
        """Translates one IP packet.

        Unless the result is translated, hairpinned or fragmented, no byte of the buffer has changed.

        Args:
            packet: A writable buffer.
            direction: Which way the packet travels.
            offset: Where the IP packet starts: 0, or 14 behind an Ethernet header.
            now: The time in seconds. None asks the clock.

        Returns:
            What became of the packet.

        Raises:
            ConfigError: `now` is not a time.
            TypeError: `direction` is not a `NatDirection`, or the buffer is not writable.
        """
        return _RESULTS[self._native.translate(packet, _is_outbound(direction), self._now(now), offset)]

    def translate_frame(
        self, frame: Any, direction: NatDirection, *, now: float | None = None
    ) -> tuple[NatResult, int]:
        """Translates the IPv4 packet of an Ethernet frame. Other frames pass through.

        Args:
            frame: A writable buffer.
            direction: Which way the frame travels.
            now: The time in seconds. None asks the clock.

        Returns:
            What became of the packet, and the length of the frame in bytes.

        Raises:
            ConfigError: `now` is not a time.
            TypeError: `direction` is not a `NatDirection`, or the buffer is not writable.
        """
        code, length = self._native.translate_frame(frame, _is_outbound(direction), self._now(now))
        return _RESULTS[code], length

    def translate_batch(
        self,
        packets: Any,
        direction: NatDirection,
        *,
        offsets: Any = None,
        lengths: Any = None,
        indices: Any = None,
        now: float | None = None,
    ) -> NatResults:
        """Translates many packets without the interpreter's lock.

        Numbers may be an array of unsigned 32-bit integers or any sequence.

        Args:
            packets: A list of writable buffers; or one buffer, with `offsets`; or a `PacketPool`, with
                `indices`.
            direction: Which way the packets travel.
            offsets: Where each packet starts in the one buffer.
            lengths: How long each packet is. Without it, each packet ends where the next begins.
            indices: The buffers of the pool.
            now: The time in seconds. None asks the clock.

        Returns:
            The result for each packet.

        Raises:
            ConfigError: A pool was given without `indices`, an index is not held, or a number is out of
                range.
            TypeError: `direction` is not a `NatDirection`, or a buffer is not writable.
        """
        out, at = _is_outbound(direction), self._now(now)
        if isinstance(packets, PacketPool):
            if indices is None:
                raise ConfigError("A pool needs the indices of the packets.")
            return NatResults(self._native.translate_pool(packets, indices, out, at))
        if offsets is not None:
            return NatResults(self._native.translate_spans(packets, offsets, lengths, out, at))
        each = packets if isinstance(packets, list) else list(packets)
        return NatResults(self._native.translate_each(each, out, at))

    def output(self) -> Iterator[tuple[NatDirection, bytes]]:
        """Takes what the engine itself sends: ICMP errors, fragments, and fragments that waited.

        Returns:
            An iterator over packets, each with its direction.
        """
        while (item := self._native.poll_output()) is not None:
            yield NatDirection(item[0]), item[1]

    def expire(self, *, now: float | None = None, visits: int = _SLICE) -> int:
        """Does one slice of expiry work.

        Args:
            now: The time in seconds. None asks the clock.
            visits: How many records to look at.

        Returns:
            How many connections ended.

        Raises:
            ConfigError: `now` is not a time.
        """
        return self._native.expire(self._now(now), visits)

    def expire_connections(self, *, now: float | None = None) -> int:
        """Does all expiry work that is due, in slices between which other threads have their turn.

        Args:
            now: The time in seconds. None asks the clock.

        Returns:
            How many connections ended.

        Raises:
            ConfigError: `now` is not a time.
        """
        at, gone = self._now(now), 0
        while True:
            gone += self._native.expire(at, _SLICE)
            due = self._native.next_timer()
            if due is None or due > at:
                return gone

    @property
    def next_timer(self) -> float | None:
        """When expiry work is due next, in seconds of the clock; None when nothing expires."""
        at = self._native.next_timer()
        if at is None:
            return None
        seconds = at / 1e9
        # Rounded up, so that the work is due when this very number is given as `now`.
        while int(seconds * 1e9) < at:
            seconds = math.nextafter(seconds, math.inf)
        return seconds

    def add_forward(
        self,
        protocol: str,
        external: tuple[IPv4Address | str, int],
        internal: tuple[IPv4Address | str, int],
    ) -> None:
        """Publishes an external port as a port inside.

        Args:
            protocol: "tcp" or "udp".
            external: The external address and port.
            internal: The address and port inside.

        Raises:
            PortInUse: The external port is in use.
            BusyError: The table is full.
            ConfigError: A value is wrong, or the address is not one of the engine's.
            TypeError: An end is not an address and a port.
        """
        self._native.add_forward(_of_ports(protocol), _end("external", external), _end("internal", internal))

    def remove_forward(self, protocol: str, external: tuple[IPv4Address | str, int]) -> bool:
        """Takes a published port back. Connections through it stay.

        Args:
            protocol: "tcp" or "udp".
            external: The external address and port.

        Returns:
            Whether it was published.

        Raises:
            ConfigError: A value is wrong.
            TypeError: The end is not an address and a port.
        """
        return self._native.remove_forward(_of_ports(protocol), _end("external", external))

    @property
    def connection_count(self) -> int:
        """How many connections are tracked now."""
        return self._native.connection_count

    def connections(self) -> Iterable[Connection]:
        """Lists the live connections.

        Returns:
            One record for each.
        """
        return [Connection(*values) for values in self._native.connections()]

    def stats(self) -> NatStats:
        """Returns the counters since the engine was made. Two of them can be subtracted.

        Returns:
            The counters.
        """
        return NatStats(**self._native.stats())

    def conntrack(self) -> ConnTrackStats:
        """Returns what the engine holds now.

        Returns:
            The counters of the connection table.
        """
        return ConnTrackStats(**self._native.conntrack_stats())

    def __repr__(self) -> str:
        assert isinstance(self.config.external, tuple)
        external = ", ".join(map(str, self.config.external))
        return f"<NatEngine {self.config.internal} as {external}, {self.connection_count} connections>"
