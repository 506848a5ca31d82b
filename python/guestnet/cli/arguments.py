"""Options that several commands share, and how their values are read.

Text is read here. What a value may be is decided by `guestnet.model.values` and `spec` alone, under the name
of the option.
`settle` makes the configuration of all options together, before anything is started.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from guestnet.cli import UsageError
from guestnet.cli.policy_options import add_policy_options, checked_policy_of
from guestnet.cli.terminal import answer
from guestnet.model.defaults import DEFAULT_SUBNET, DEFAULT_ZONE

if TYPE_CHECKING:
    from guestnet.model.forward_spec import ForwardSpec

_T = TypeVar("_T")


class _FixedWidth(argparse.RawDescriptionHelpFormatter):
    """Knows its width. argparse makes one for each option, to check it, and would otherwise look for the
    terminal's by `shutil`, which takes 2 ms to import."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=80)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one sentence and leaves the exit to `main`.

    None of argparse's own sentences reaches the user: values are read by functions that raise UsageError, and
    what is left (an option that is unknown, lacks its value or takes none) is said here.
    """

    def __init__(self, command: str, usage: str, about: str, example: str) -> None:
        self._names: list[str] = []
        self.network_settings: frozenset[str] = frozenset()
        """What the options that describe a network set."""
        self._command = command
        super().__init__(
            prog=f"guestnet {command}",
            usage=f"guestnet {command} {usage}",
            description=about,
            epilog=f"example:\n{example}",
            formatter_class=_FixedWidth,
            allow_abbrev=False,
            exit_on_error=False,
        )

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's, and remembers the options' names."""
        self._names += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **settings)

    def option_names(self) -> list[str]:
        """Every option of the command, long and short."""
        return list(self._names)

    def format_help(self) -> str:
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        return super().format_help()

    def print_help(self, file: Any = None) -> None:
        answer(self.format_help())

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        try:
            options, extra = self.parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            raise self._value_error(error) from None
        if extra:
            raise self.unknown(extra[0])
        return options

    def unknown(self, word: str) -> UsageError:
        """The error for a word that is no option of this command."""
        from guestnet.cli import hints

        if word.startswith("-") and word != "-":
            return hints.unknown_option(word, self._command, self._names)
        if "--stream" in self._names:
            return UsageError(
                f"`{self.prog}` takes options only: for a socket write --stream {word}, or see "
                f"`{self.prog} --help`."
            )
        return UsageError(f"`{self.prog}` has no use for {word!r}: see `{self.prog} --help`.")

    def _value_error(self, error: argparse.ArgumentError) -> UsageError:
        for action in self._actions:
            if error.argument_name == "/".join(action.option_strings):
                name = action.option_strings[-1]
                if action.nargs == 0:
                    return UsageError(f"{name} takes no value: write {name} alone.")
                return UsageError(f"{name} needs a value: write {name} {action.metavar or 'VALUE'}.")
        return UsageError(f"{error}: see `{self.prog} --help`.")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}: see `{self.prog} --help`.")


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts `OPTIONS -- CMD ARGS...` at the first `--`: what is left of it, and what is right of it."""
    words = list(argv)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def parse_with_command(
    parser: Parser, argv: Sequence[str], what: str
) -> tuple[argparse.Namespace, list[str]]:
    """Options, then a command of its own with its own options. The `--` between them may be left out."""
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    left, right = split_command(argv)
    options = parser.parse_args(left)
    command = list(options.command)
    if command and command[0].startswith("-"):
        raise parser.unknown(command[0])  # argparse takes `-6` for a number
    if command and right:
        command += ["--", *right]  # that `--` belongs to the command: `guestnet run sh -c '...' -- x`
    command = command or right
    if not command or not command[0]:
        raise UsageError(f"Say what to run: `{parser.prog} [OPTIONS] -- {what}`.")
    return options, command


def checked(read: Callable[[str], _T]) -> Callable[[str], _T]:
    """Makes a reader usable as argparse's `type`: its sentence reaches the user as it is."""

    def reader(text: str) -> _T:
        try:
            return read(text)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(str(error)) from error

    return reader


def subnet(text: str) -> IPv4Network:
    """An IPv4 subnet, `10.1.2.0/24`, with room for a gateway and a guest."""
    from guestnet.model.values import ipv4_subnet

    return ipv4_subnet("--subnet", text)


def number(option: str, text: str, lowest: int, highest: int, example: object) -> int:
    """A whole number of a range."""
    digits = text.isascii() and text.isdigit() and len(text) <= 20
    if not digits or not lowest <= int(text) <= highest:
        raise UsageError(f"{option} {text!r} is not between {lowest} and {highest}: write {example}.")
    return int(text)


def choice(option: str, known: Sequence[str]) -> Callable[[str], str]:
    """A reader for one of several words."""

    def reader(text: str) -> str:
        if text in known:
            return text
        from guestnet.cli import hints

        raise UsageError(f"{option} {text!r} is not known{hints.closest(text, known)}")

    return reader


def file_path(option: str, example: str = "guests.pcapng") -> Callable[[str], str]:
    """A reader for a file's name; what is wrong with the file itself shows when it is opened."""

    def reader(text: str) -> str:
        if not text or "\0" in text:
            raise UsageError(f"{option} {text!r} is not a file name: write one such as {example}.")
        return text

    return reader


def mtu(text: str) -> int:
    """An IP MTU in bytes."""
    from guestnet.model.spec import MTU_HIGHEST, MTU_LOWEST

    return number("--mtu", text, MTU_LOWEST, MTU_HIGHEST, 1500)


def dns_record(text: str) -> tuple[str, str]:
    """`name=address`, the address IPv4 or IPv6, or `name=TYPE:value`."""
    from guestnet.services.dns.records import parse_record

    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--dns-record {text!r} is not name=address: write web.example=192.0.2.1.")
    try:
        parse_record(name, value)
    except ValueError as error:
        raise UsageError(f"--dns-record {text!r}: {error}") from None
    return name.rstrip("."), value


def mac(text: str, option: str = "--mac") -> bytes:
    """A hardware address of one station, `02:00:5e:10:00:01`."""
    from guestnet.model.ipam import parse_mac

    return parse_mac(text, option)


def random_mac() -> bytes:
    """A locally administered address of one station."""
    return bytes((0x02, *os.urandom(5)))


def hostname(text: str, option: str = "--hostname") -> str:
    """A host name: one label of letters, digits and hyphens."""
    from guestnet.model.values import domain

    return domain(option, text, one_label=True)


def format_mac(address: bytes) -> str:
    """A MAC address as people write it."""
    return ":".join(f"{byte:02x}" for byte in address)


def publication(text: str) -> Any:
    """A published port in Docker's grammar."""
    from guestnet.errors import ConfigError
    from guestnet.model.forward_spec import ForwardSpec

    try:
        return ForwardSpec.parse(text)
    except ConfigError:
        from guestnet.cli import hints

        if (hint := hints.publication(text)) is not None:
            raise UsageError(f"The published port {text!r} is not right: {hint}.") from None
        raise


def host_address(text: str) -> IPv4Address | IPv6Address:
    """The address of the host that ports are published on."""
    try:
        return ip_address({"localhost": "127.0.0.1", "*": "0.0.0.0"}.get(text, text.strip("[]")))
    except ValueError:
        raise UsageError(
            f"--publish-address {text!r} is not an address of the host: write one such as 127.0.0.1."
        ) from None


def add_network_options(parser: Parser) -> None:
    """The options that describe a network."""
    others = {action.dest for action in parser._actions}
    add = parser.add_argument
    add(
        "-p",
        "--publish",
        action="append",
        default=[],
        type=checked(publication),
        metavar="SPEC",
        help="publish a guest's port: [[HOST_IP:]PORT[-END]:][GUEST:]PORT[-END][/tcp|/udp]. Without HOST_IP "
        "on every address of the host, without the first PORT on a free one (repeatable)",
    )
    add(
        "--publish-address",
        type=checked(host_address),
        metavar="HOST_IP",
        help="the host's address for published ports (and --pcp) that name none, such as 127.0.0.1",
    )
    add(
        "--subnet",
        type=checked(subnet),
        default=IPv4Network(DEFAULT_SUBNET),
        metavar="SUBNET",
        help=f"default {DEFAULT_SUBNET}",
    )
    add(
        "--prefix",
        type=checked(prefix6),
        metavar="PREFIX",
        help="an IPv6 /64 for guests, such as fd12:3456:789a::/64 (default: no IPv6)",
    )
    add("--mtu", type=checked(mtu), default=1500, metavar="BYTES", help="default 1500")
    add(
        "--mode",
        type=checked(choice("--mode", ("nat", "host_only"))),
        metavar="MODE",
        default="nat",
        help="nat (default), or host_only: guests and the gateway's services, nothing outside",
    )
    add(
        "--dns-record",
        action="append",
        default=[],
        type=checked(dns_record),
        metavar="NAME=ADDRESS",
        help="a name that guests resolve to this address, or NAME=TYPE:VALUE (repeatable)",
    )
    add(
        "--dns",
        action="append",
        default=[],
        type=checked(resolver),
        metavar="ADDRESS",
        help="ask this name server, not the host's, for names outside (repeatable)",
    )
    add(
        "--search",
        action="append",
        default=[],
        type=checked(search),
        metavar="DOMAIN",
        help="a domain that guests try for short names, before guestnet.internal (repeatable)",
    )
    add(
        "--host-loopback",
        action="store_true",
        help="let guests reach the host's 127.0.0.1 as host.guestnet.internal, the subnet's last address",
    )
    add_policy_options(parser)
    add(
        "--filtering",
        type=checked(
            choice("--filtering", ("endpoint_independent", "address_dependent", "address_and_port_dependent"))
        ),
        metavar="HOW",
        default="address_dependent",
        help="who may send to a UDP port that a guest uses: endpoint_independent, address_dependent "
        "(default) or address_and_port_dependent (RFC 4787 section 5)",
    )
    add(
        "--uplink",
        type=checked(choice("--uplink", ("sockets", "tun"))),
        metavar="HOW",
        default="sockets",
        help="sockets (default), or tun: packets leave through a device (needs CAP_NET_ADMIN)",
    )
    add(
        "--source",
        metavar="ADDRESS|IF",
        help="sockets: have flows leave from this address or interface of the host, or not at all",
    )
    add(
        "--proxy",
        metavar="URL",
        help="sockets: make all connections through this proxy (socks5:// or http://), or that of the host's "
        "environment (host), or the one in a file (@FILE)",
    )
    add(
        "--external",
        action="append",
        default=[],
        type=checked(external),
        metavar="ADDRESS",
        help="tun: an external address of the guests, routed to this host (default: one of 100.64.0.0/10; "
        "repeatable)",
    )
    add("--forwarding", action="store_true", help="tun: enable forwarding on this host while guestnet runs")
    add(
        "--masquerade",
        action="store_true",
        help="tun: enable forwarding, and give packets that leave the host's own address (needs nft)",
    )
    add(
        "--pcp",
        type=checked(guest_ports),
        metavar="[HOST_IP:]FIRST-LAST",
        help="let guests open these ports of the host for themselves, by PCP or NAT-PMP (default: none)",
    )
    add(
        "--bridge",
        metavar="IF",
        help="join guests to this bridge or Ethernet interface of the host, without a "
        "gateway (mode bridged; needs CAP_NET_ADMIN or CAP_NET_RAW)",
    )
    add(
        "--workers",
        type=checked(workers),
        default=1,
        metavar="N",
        help="packet threads that share the guests, 1 (default) to 64",
    )
    add(
        "--no-io-uring",
        dest="io_uring",
        action="store_false",
        help="do not gather small writes in one call of io_uring",
    )
    add(
        "--polling",
        type=checked(choice("--polling", ("adaptive", "busy", "event_driven"))),
        metavar="HOW",
        default="adaptive",
        help="adaptive (default): poll for a moment after work, then sleep; busy: poll "
        "all the time, for the shortest delay; event_driven: sleep at once",
    )
    add(
        "--pcap",
        type=checked(file_path("--pcap")),
        metavar="FILE",
        help="write every frame to FILE (pcapng, for Wireshark), - for stdout",
    )
    add("--stats", action="store_true", help="print the counters at the end, on stderr")
    add("-q", "--quiet", action="store_true", help="print errors only")
    add(
        "-v",
        "--verbose",
        action="store_true",
        help="print refusals, drops, name servers that fail, and guests",
    )
    parser.network_settings = frozenset(action.dest for action in parser._actions) - others


def add_guest_options(parser: Parser) -> None:
    """The options that describe one guest of a network."""
    add = parser.add_argument
    add("--id", metavar="ID", help="the guest's id (default: vm1, vm2 and so on)")
    add("--hostname", type=checked(hostname), metavar="NAME", help="the guest's host name")
    add("--mac", type=checked(mac), metavar="MAC", help="its MAC address (default: a random one)")


def guest_settings(options: argparse.Namespace) -> dict[str, str | None]:
    """The options of `add_guest_options` as what a network is asked for."""
    mac = None if options.mac is None else format_mac(options.mac)
    return {"id": options.id, "mac": mac, "hostname": options.hostname}


OF_A_GUEST = frozenset(("publish", "publish_address", "quiet", "verbose"))
"""Options of `add_network_options` that are about a guest, or about the command itself."""


def refuse_network_settings(parser: Parser, options: argparse.Namespace, besides: Iterable[str] = ()) -> None:
    """Raises UsageError if an option is given that a network that runs has decided already."""
    decided = parser.network_settings - OF_A_GUEST | set(besides)
    for action in parser._actions:
        if action.dest in decided and getattr(options, action.dest) != action.default:
            raise UsageError(
                f"{action.option_strings[-1]} is a setting of the network {options.network!r}, which runs "
                "already: give it to its `guestnet up`."
            )
    if options.publish_address is not None:
        settle(options, command=True)


def prefix6(text: str) -> str:
    """An IPv6 prefix for guests."""
    from guestnet.model.spec6 import ipv6_prefix

    return str(ipv6_prefix("--prefix", text))


def resolver(text: str) -> str:
    """The address of a name server."""
    from guestnet.model.values import any_address

    return any_address("--dns", text)


def search(text: str) -> str:
    """A domain."""
    from guestnet.model.values import domain

    return domain("--search", text)


def workers(text: str) -> int:
    """A number of packet threads."""
    from guestnet.model.spec import WORKERS_MOST

    return number("--workers", text, 1, WORKERS_MOST, 1)


def guest_ports(text: str) -> tuple[IPv4Address | None, int, int]:
    """Ports of the host that guests may open, and the address of the host that they are on: None for all."""
    from guestnet.model.values import check_port_range, ipv4_address

    host, colon, ports = text.rpartition(":")
    first, dash, last = ports.partition("-")
    numbers = [first, last] if dash else [first, first]
    if not all(one.isascii() and one.isdigit() and len(one) <= 5 for one in numbers):
        raise UsageError(f"--pcp {text!r} is not a range of ports: write one such as 40000-40999.")
    lowest, highest = check_port_range(tuple(map(int, numbers)), "--pcp", "40000-40999")
    return ipv4_address("--pcp", host) if colon else None, lowest, highest


def external(text: str) -> IPv4Address:
    """An address that guests have outside."""
    from guestnet.model.values import ipv4_address

    return ipv4_address("--external", text)


def settle(options: argparse.Namespace, *, command: bool) -> None:
    """Applies options that change others, and refuses those that contradict each other. Raises UsageError.

    Sets `config`, the NatConfig that the options describe. `command`: whether a command is going to run with
    the same stdout. With `--pcap -` it gets stderr instead.
    """
    if options.quiet and options.verbose:
        raise UsageError("--quiet and --verbose contradict each other: leave one out.")
    if options.publish_address is not None:
        from dataclasses import replace

        options.publish = [
            spec if spec.host_ip is not None else replace(spec, host_ip=options.publish_address)
            for spec in options.publish
        ]
        if options.pcp is not None and options.pcp[0] is None:
            if options.publish_address.version == 6:
                raise UsageError(
                    "--pcp opens ports on IPv4 addresses only: write --pcp 127.0.0.1:FIRST-LAST, "
                    "with the address of the host that you mean."
                )
            options.pcp = (options.publish_address, *options.pcp[1:])
    if len(options.publish) > 1:
        _check_published_once(options.publish)
    from guestnet.model.spec import NatConfig

    options.config = NatConfig(**network_settings(options))
    if options.pcap == "-":
        if os.isatty(1):
            raise UsageError(
                "--pcap - writes binary data to stdout, which is a terminal: redirect it, or name a file."
            )
        options.capture_fd = os.dup(1)
        if command:
            os.dup2(2, 1)


def _check_published_once(published: Sequence[ForwardSpec]) -> None:
    """Two options for one port: the kernel would call the second one "in use"."""
    taken: dict[tuple[str, int], list[ForwardSpec]] = {}
    for spec in published:
        for port in spec.host_ports:
            others = taken.setdefault((spec.protocol, port), [])
            if port and (other := next((one for one in others if _share_address(one, spec)), None)):
                raise UsageError(
                    f"-p publishes {spec.protocol.upper()} port {port} of the host twice, as {other} and as "
                    f"{spec}: choose another port of the host for one of them."
                )
            others.append(spec)


def _share_address(one: ForwardSpec, other: ForwardSpec) -> bool:
    a, b = one.host_ip, other.host_ip
    if a is None or b is None:
        return True
    return a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)


def search_list(options: argparse.Namespace) -> tuple[str, ...]:
    """The domains that guests try for short names."""
    return tuple(dict.fromkeys((*options.search, DEFAULT_ZONE)))


def network_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_network_options` as keywords of NatConfig."""
    records: dict[str, str | list[str]] = {}
    for name, value in options.dns_record:
        known = records.setdefault(name, [])
        if isinstance(known, list):
            known.append(value)
    return {
        "subnet": str(options.subnet),
        "mtu": options.mtu,
        "mode": options.mode if options.bridge is None else "bridged",
        "bridge": options.bridge,
        "dns_records": records,
        "resolvers": options.dns or None,
        "search": search_list(options),
        "host_loopback": options.host_loopback,
        "policy": checked_policy_of(options),
        "isolated": options.isolate,
        "limit": options.limit,
        "guest_limit": options.guest_limit,
        "filtering": options.filtering,
        "workers": options.workers,
        "io_uring": options.io_uring,
        "polling": options.polling,
        "capture": None if options.pcap == "-" else options.pcap,
        "uplink": options.uplink,
        "source": options.source,
        "proxy": options.proxy,
        "external": options.external,
        "forwarding": options.forwarding,
        "masquerade": options.masquerade,
        "pcp_ports": None if options.pcp is None else options.pcp[1:],
        "pcp_address": None if options.pcp is None else options.pcp[0],
        "subnet6": options.prefix,
        "static_leases": getattr(options, "lease", ()),
    }
