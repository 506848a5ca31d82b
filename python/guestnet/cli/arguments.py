"""Options that several commands share, and how their values are read.

Values are checked here, before anything is started, with a sentence that names the wrong one; importing the
configuration model for that would take longer than the rest of the start.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_address
from typing import Any, NoReturn, TypeVar

from guestnet.cli import UsageError
from guestnet.cli.terminal import answer

ZONE = "guestnet.internal"
DEFAULT_SUBNET = "192.168.64.0/24"
MTU_LOWEST, MTU_HIGHEST = 68, 65520
WORKERS_MOST = 64
# Network, gateway, one guest and the broadcast address.
_LONGEST_PREFIX = 30

_T = TypeVar("_T")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says what is wrong in one sentence and leaves the exit to `main`."""

    def __init__(self, command: str, usage: str, about: str, example: str) -> None:
        super().__init__(
            prog=f"guestnet {command}",
            usage=f"guestnet {command} {usage}",
            description=about,
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def print_help(self, file: Any = None) -> None:
        answer(self.format_help())

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
    if command and right:
        command += ["--", *right]  # that `--` belongs to the command: `guestnet run sh -c '...' -- x`
    command = command or right
    if not command:
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
    try:
        network = IPv4Network(text, strict=False)
    except ValueError:
        raise UsageError(
            f"--subnet {text!r} is not an IPv4 subnet: write one such as {DEFAULT_SUBNET}."
        ) from None
    if "/" not in text or network.prefixlen > _LONGEST_PREFIX or network.prefixlen < 8:
        raise UsageError(
            f"--subnet {text!r} must have a prefix of /8 to /{_LONGEST_PREFIX}: write {DEFAULT_SUBNET}."
        )
    if str(network.network_address) != text.split("/", maxsplit=1)[0]:
        raise UsageError(f"--subnet {text!r} is an address within a subnet: write {network}.")
    if (
        network.is_loopback
        or network.is_multicast
        or network.network_address.packed[0] in (0, *range(240, 256))
    ):
        raise UsageError(f"--subnet {text!r} is not for hosts: write a private one such as {DEFAULT_SUBNET}.")
    return network


def mtu(text: str) -> int:
    """An IP MTU in bytes."""
    if not text.isascii() or not text.isdigit() or not MTU_LOWEST <= int(text) <= MTU_HIGHEST:
        raise UsageError(f"--mtu {text!r} is not between {MTU_LOWEST} and {MTU_HIGHEST}: write 1500.")
    return int(text)


def dns_record(text: str) -> tuple[str, str]:
    """`name=address`, the address IPv4 or IPv6, or `name=TYPE:value`, which the configuration reads."""
    name, equals, value = text.partition("=")
    name = name.rstrip(".")
    if not equals or not _is_name(name):
        raise UsageError(f"--dns-record {text!r} is not name=address: write web.example=192.0.2.1.")
    try:
        ip_address(value)
    except ValueError:
        kind, colon, _ = value.partition(":")
        if not colon or not kind.isascii() or not kind.isalnum() or not kind[0].isalpha():
            raise UsageError(
                f"--dns-record {text!r}: {value!r} is not an address, write {name}=192.0.2.1."
            ) from None
    return name, value


def _is_name(name: str) -> bool:
    labels = name.split(".")
    return (
        name.isascii()
        and len(name) <= 253
        and all(0 < len(label) <= 63 and not set(label) & set(" \t/=\\") for label in labels)
    )


def mac(text: str) -> bytes:
    """A hardware address of one station, `02:00:5e:10:00:01`."""
    parts = text.replace("-", ":").split(":")
    try:
        if len(parts) != 6 or any(not 1 <= len(part) <= 2 for part in parts):
            raise ValueError
        address = bytes(int(part, 16) for part in parts)
    except ValueError:
        raise UsageError(f"{text!r} is not a MAC address: write one such as 02:00:5e:10:00:01.") from None
    if address[0] & 1 or not any(address):
        raise UsageError(
            f"The MAC address {text!r} is not one station's: write one such as 02:00:5e:10:00:01."
        )
    return address


def random_mac() -> bytes:
    """A locally administered address of one station."""
    return bytes((0x02, *os.urandom(5)))


def hostname(text: str) -> str:
    """A host name: one label of letters, digits and hyphens."""
    if not text.isascii() or not 0 < len(text) <= 63 or text[0] == "-" or not text.replace("-", "").isalnum():
        raise UsageError(
            f"--hostname {text!r} is not a host name: write letters, digits and hyphens, such as web1."
        )
    return text


def format_mac(address: bytes) -> str:
    """A MAC address as people write it."""
    return ":".join(f"{byte:02x}" for byte in address)


def publication(text: str) -> Any:
    """A published port in Docker's grammar."""
    from guestnet.forwards import ForwardSpec

    return ForwardSpec.parse(text)


def add_network_options(parser: Parser) -> None:
    """The options that describe a network."""
    add = parser.add_argument
    add(
        "-p",
        "--publish",
        action="append",
        default=[],
        type=checked(publication),
        metavar="SPEC",
        help="publish a guest's port: [HOST_IP:]PORT[-END]:[GUEST:]PORT[-END][/tcp|/udp] (repeatable)",
    )
    add(
        "--subnet",
        type=checked(subnet),
        default=IPv4Network(DEFAULT_SUBNET),
        help=f"default {DEFAULT_SUBNET}",
    )
    add("--mtu", type=checked(mtu), default=1500, metavar="BYTES", help="default 1500")
    add(
        "--mode",
        choices=("nat", "host_only"),
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
    add(
        "--filtering",
        choices=("endpoint_independent", "address_dependent", "address_and_port_dependent"),
        default="address_dependent",
        help="who may send to a UDP port that a guest uses (RFC 4787 section 5; default address_dependent)",
    )
    add(
        "--uplink",
        choices=("sockets", "tun"),
        default="sockets",
        help="sockets (default), or tun: packets leave through a device (needs CAP_NET_ADMIN)",
    )
    add(
        "--external",
        action="append",
        default=[],
        type=checked(external),
        metavar="ADDRESS",
        help="tun: what guests have outside, routed to this host; default one of 100.64.0.0/10 (repeatable)",
    )
    add("--forwarding", action="store_true", help="tun: let this host forward while guestnet runs")
    add(
        "--masquerade",
        action="store_true",
        help="tun: forward, and give what leaves the host's own address (needs nft)",
    )
    add(
        "--pcp",
        type=checked(guest_ports),
        metavar="[HOST_IP:]FIRST-LAST",
        help="let guests open these ports of the host to themselves, by PCP or NAT-PMP (default: none)",
    )
    add(
        "--bridge",
        metavar="IF",
        help="join guests to this bridge or Ethernet interface of the host, without a gateway "
        "(mode bridged; needs CAP_NET_ADMIN or CAP_NET_RAW)",
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
        choices=("adaptive", "busy", "event_driven"),
        default="adaptive",
        help="adaptive (default): poll a moment after work, then sleep; busy: one processor for the "
        "shortest delay; event_driven: sleep at once",
    )
    add("--pcap", metavar="FILE", help="write every frame to FILE (pcapng, for Wireshark)")
    add("--stats", action="store_true", help="print the counters at the end, on stderr")
    add("-q", "--quiet", action="store_true", help="say nothing but errors")
    add("-v", "--verbose", action="store_true", help="say what happens")


def resolver(text: str) -> str:
    """The address of a name server."""
    try:
        return str(ip_address(text))
    except ValueError:
        raise UsageError(f"--dns {text!r} is not an address: write one such as 192.0.2.53.") from None


def search(text: str) -> str:
    """A domain."""
    name = text.rstrip(".").lower()
    if not _is_name(name):
        raise UsageError(f"--search {text!r} is not a domain: write one such as corp.example.")
    return name


def workers(text: str) -> int:
    """A number of packet threads."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= WORKERS_MOST:
        raise UsageError(f"--workers {text!r} is not between 1 and {WORKERS_MOST}: write 1.")
    return int(text)


def guest_ports(text: str) -> tuple[IPv4Address | None, int, int]:
    """Ports of the host that guests may open, and the address of the host that they are on: None for all."""
    host, colon, ports = text.rpartition(":")
    try:
        address = IPv4Address(host) if colon else None
    except ValueError:
        raise UsageError(f"--pcp {text!r}: {host!r} is not an IPv4 address of the host.") from None
    first, dash, last = ports.partition("-")
    numbers = [first, last] if dash else [first]
    if not all(number.isascii() and number.isdigit() and len(number) <= 5 for number in numbers):
        raise UsageError(f"--pcp {text!r} is not a range of ports: write one such as 40000-40999.")
    lowest, highest = int(numbers[0]), int(numbers[-1])
    if not 1 <= lowest <= highest <= 65535:
        raise UsageError(
            f"--pcp {text!r} is upside down or not between 1 and 65535: write a range such as 40000-40999."
        )
    return address, lowest, highest


def external(text: str) -> IPv4Address:
    """An address that guests have outside."""
    try:
        return IPv4Address(text)
    except ValueError:
        raise UsageError(
            f"--external {text!r} is not an IPv4 address: write one such as 192.0.2.9."
        ) from None


@dataclass(frozen=True)
class Plan:
    """The addresses that a network of one guest will have: known before the network is made."""

    subnet: IPv4Network
    gateway: IPv4Address
    guest: IPv4Address


def plan(network: IPv4Network) -> Plan:
    """The gateway is the first address of the subnet, the guest the next."""
    return Plan(network, network[1], network[2])


def search_list(options: argparse.Namespace) -> tuple[str, ...]:
    """The domains that guests try for short names."""
    return tuple(dict.fromkeys((*options.search, ZONE)))


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
        "filtering": options.filtering,
        "workers": options.workers,
        "io_uring": options.io_uring,
        "polling": options.polling,
        "capture": options.pcap,
        "uplink": options.uplink,
        "external": options.external,
        "forwarding": options.forwarding,
        "masquerade": options.masquerade,
        "pcp_ports": None if options.pcp is None else options.pcp[1:],
        "pcp_address": None if options.pcp is None else options.pcp[0],
    }
