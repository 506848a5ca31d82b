"""`guestnet vm`: QEMU with a network card whose other end is guestnet."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from guestnet.cli import arguments, supervise
from guestnet.cli.session import ENDPOINT, network_of_one
from guestnet.cli.terminal import complain, say

if TYPE_CHECKING:
    from guestnet.network import NatNetwork

NETDEV = "guestnet0"

_ABOUT = """\
Runs the QEMU command with a network card attached to guestnet: the guest gets its address by DHCP. A
command that has a `-device ...,netdev=guestnet0` of its own keeps it. Needs QEMU 7.2 or newer. Exits with
QEMU's status."""
_EXAMPLE = """\
  guestnet vm -p 2222:22 -- qemu-system-x86_64 -m 1G -nographic disk.img"""


def parser() -> arguments.Parser:
    """The options of `guestnet vm`."""
    made = arguments.Parser("vm", "[OPTIONS] -- QEMU [ARGS...]", _ABOUT, _EXAMPLE)
    arguments.add_network_options(made)
    made.add_argument(
        "--mac", type=arguments.checked(arguments.mac), help="the guest's MAC address (default: a random one)"
    )
    made.add_argument(
        "--hostname", type=arguments.checked(arguments.hostname), help="the guest's name for DNS"
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command line after `guestnet vm`; returns the exit status."""
    options, command = arguments.parse_with_command(parser(), argv, "qemu-system-x86_64 ARGS...")
    # The guest's card has the MAC that the user's own device names, else ours.
    mac = options.mac or own_mac(command) or arguments.random_mac()
    if not options.quiet and (other := other_network(command)):
        complain(f"Note: the command has another network ({other}), and the guest can leave by that one too.")
    mask = supervise.block_signals()
    supervise.become_subreaper()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def attach(network: NatNetwork) -> None:
        network.attach(ENDPOINT, "stream", fd=ours.detach())

    def prepare(_control: socket.socket) -> None:
        os.set_inheritable(theirs.fileno(), True)  # in the child alone, which closes ours on exec

    from guestnet._linux.held import fork_held

    # Forked before the network starts threads, and held until it is attached and its ports are published.
    child = fork_held(prepare, qemu_command(command, theirs.fileno(), mac), mask)
    theirs.close()
    try:
        with network_of_one(options, mac, attach):
            if options.verbose:
                say(f"guestnet: the guest's MAC is {arguments.format_mac(mac)}")
            child.go()
            return supervise.wait(child.pid)
    finally:
        ours.close()
        child.close()


def qemu_command(command: Sequence[str], fd: int, mac: bytes) -> list[str]:
    """The user's command with guestnet's netdev, and a card on it unless the user gave one."""
    added = ["-netdev", f"stream,id={NETDEV},server=off,addr.type=fd,addr.str={fd}"]
    if _own_device(command) is None:
        card = "virtio-net-device" if _machine(command).startswith("microvm") else "virtio-net-pci"
        added += ["-device", f"{card},netdev={NETDEV},mac={arguments.format_mac(mac)}"]
    return [*command, *added]


def own_mac(command: Sequence[str]) -> bytes | None:
    """The MAC that the user's own device on guestnet's netdev names."""
    for part in (_own_device(command) or "").split(","):
        key, _, value = part.partition("=")
        if key == "mac":
            return arguments.mac(value)
    return None


def other_network(command: Sequence[str]) -> str | None:
    """A network of the command's own, by which the guest could leave without guestnet."""
    for option, value in _options(command):
        if option in ("netdev", "nic", "net") and value.split(",")[0] not in ("none", "nic"):
            return f"-{option} {value}"
    return None


def _options(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """QEMU's options with their values: it takes `-x` and `--x` alike."""
    words = [*command[1:], ""]
    for word, value in pairwise(words):
        if word.startswith("-"):
            yield word.lstrip("-"), value


def _own_device(command: Sequence[str]) -> str | None:
    for option, value in _options(command):
        if option == "device" and f"netdev={NETDEV}" in value.split(","):
            return value
    return None


def _machine(command: Sequence[str]) -> str:
    for option, value in _options(command):
        if option in ("M", "machine"):
            for part in value.split(","):
                key, equals, name = part.partition("=")
                if not equals or key == "type":
                    return name or key
    return ""
