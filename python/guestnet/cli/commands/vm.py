"""`guestnet vm`: QEMU with a network card that is connected to guestnet."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING

from guestnet.cli import UsageError, arguments
from guestnet.cli.runner import supervise
from guestnet.cli.runner.session import ENDPOINT, network_of_one, person
from guestnet.cli.terminal import complain, say
from guestnet.runtime.attachments import listening_socket

if TYPE_CHECKING:
    import argparse

    from guestnet.runtime.network import NatNetwork

NETDEV = "guestnet0"
_UNITS = {"": 1 << 20, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

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
        "--vhost-user",
        action="store_true",
        help="share the guest's memory with guestnet instead of copying frames through a socket: faster",
    )
    made.add_argument(
        "--hostname", type=arguments.checked(arguments.hostname), help="the guest's name for DNS"
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command line after `guestnet vm`; returns the exit status."""
    options, command = arguments.parse_with_command(parser(), argv, "qemu-system-x86_64 ARGS...")
    arguments.settle(options, command=True)
    if any(option == "daemonize" for option, _ in _options(command)):
        raise UsageError(
            "With -daemonize the command ends at once, and its network with it: leave that out, "
            "and put `guestnet vm` into the background."
        )
    # The guest's card has the MAC that the user's own device names, else ours.
    mac = options.mac or own_mac(command) or arguments.random_mac()
    if not options.quiet and (other := other_network(command)):
        complain(f"Note: the command has another network ({other}), and the guest can leave by that one too.")
    if not options.quiet and not _looks_like_qemu(command[0]):
        complain(
            f"Note: {command[0]!r} does not look like QEMU, whose options -netdev and -device are added to "
            "it: use `guestnet run` for other programs."
        )
    if options.vhost_user:
        ours, theirs = _nameless_listener()
        attached, added = "vhost-user", vhost_user_options(command, f"/proc/self/fd/{theirs}")
    else:
        ours, pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        theirs = pair.detach()
        attached, added = "stream", stream_options(theirs)
    added += card_options(command, mac, vhost_user=options.vhost_user)
    with ours:
        return _run(options, mac, attached, ours, theirs, [*command, *added])


def _looks_like_qemu(program: str) -> bool:
    name = os.path.basename(program).lower()
    return "qemu" in name or "kvm" in name


def _run(
    options: argparse.Namespace,
    mac: bytes,
    attached: str,
    ours: socket.socket,
    theirs: int,
    command: list[str],
) -> int:
    """Runs QEMU, whose network is attached by `ours`. QEMU inherits the descriptor `theirs`."""
    mask = supervise.block_signals()
    supervise.become_subreaper()

    def attach(network: NatNetwork) -> None:
        network.attach(ENDPOINT, attached, fd=ours.detach())

    with ExitStack() as at_end:
        asker = person(options, at_end)
        terminal = None if asker is None else asker.lend()

        def prepare(_control: socket.socket) -> None:
            os.set_inheritable(theirs, True)  # in the child alone, which closes ours on exec
            if terminal is not None:
                terminal.enter()

        from guestnet._linux.child_process import fork_held
        from guestnet._linux.confinement import CAP_KILL

        # Forked before the network starts threads, and held until it is attached and its ports are published.
        child = fork_held(prepare, command, mask)
        os.close(theirs)
        if terminal is not None:
            terminal.start()
        try:
            # QEMU may become another user.
            with network_of_one(options, mac, attach, [CAP_KILL], asker):
                if options.verbose:
                    say(f"guestnet: the guest's MAC is {arguments.format_mac(mac)}")
                child.go()
                return supervise.wait(child.pid, None if terminal is None else terminal.resize)
        finally:
            child.close()


def _nameless_listener() -> tuple[socket.socket, int]:
    """A listening socket, and a descriptor that is the only way to connect to it.

    Its name is removed again, so no other process finds it, and nothing is left behind.
    """
    with tempfile.TemporaryDirectory(prefix="guestnet-") as directory:
        path = os.path.join(directory, "vhost.sock")
        return listening_socket("vhost-user", path), os.open(path, os.O_PATH | os.O_CLOEXEC)


def stream_options(fd: int) -> list[str]:
    """The options of guestnet's netdev over a socket that QEMU inherits."""
    return ["-netdev", f"stream,id={NETDEV},server=off,addr.type=fd,addr.str={fd}"]


def vhost_user_options(command: Sequence[str], path: str) -> list[str]:
    """The options of a vhost-user netdev, and of shared memory unless the user has it."""
    made = ["-chardev", f"socket,id={NETDEV}c,path={path.replace(',', ',,')}"]
    made += ["-netdev", f"vhost-user,id={NETDEV},chardev={NETDEV}c"]
    if not _shares_memory(command):
        size = memory_size(command)
        made += ["-object", f"memory-backend-memfd,id={NETDEV}m,size={size},share=on"]
        made += ["-machine", f"memory-backend={NETDEV}m"]
    return made


def card_options(command: Sequence[str], mac: bytes, *, vhost_user: bool = False) -> list[str]:
    """A card on guestnet's netdev, unless the user gave one."""
    if _own_device(command) is not None:
        return []
    options = f"netdev={NETDEV},mac={arguments.format_mac(mac)}"
    if _machine(command).startswith("microvm"):
        return ["-device", f"virtio-net-device,{options}"]
    if vhost_user and not _uses_kvm(command):
        # QEMU 7.2 without KVM ends with a memory fault when a vhost-user card has MSI-X.
        options += ",vectors=0"
    return ["-device", f"virtio-net-pci,{options}"]


def _uses_kvm(command: Sequence[str]) -> bool:
    for option, value in _options(command):
        if option == "enable-kvm" or (option == "accel" and value.startswith("kvm")):
            return True
        if option in ("machine", "M") and "accel=kvm" in value:
            return True
    return False


def memory_size(command: Sequence[str]) -> int:
    """How many bytes of memory the command gives its guest."""
    text = "128"  # QEMU's own default
    for option, value in _options(command):
        if option == "m":
            fields = dict(part.split("=", 1) for part in value.split(",")[1:] if "=" in part)
            first = value.split(",")[0]
            key, equals, rest = first.partition("=")
            if equals:
                fields[key] = rest
            text = fields.get("size", text) if equals else first or text
    match = re.fullmatch(r"(\d+)([bkmgt]?)", text.lower())
    if match is None:
        raise UsageError(
            f"The memory size {text!r} is not understood: write -m 1G, or share memory yourself."
        )
    return int(match[1]) * _UNITS[match[2]]


def _shares_memory(command: Sequence[str]) -> bool:
    """Whether the user configures the guest's memory. guestnet then leaves it alone."""
    for option, value in _options(command):
        if option in ("machine", "M") and "memory-backend=" in value:
            return True
        if option == "numa" and "memdev=" in value:
            return True
    return False


def own_mac(command: Sequence[str]) -> bytes | None:
    """The MAC of the user's own device on guestnet's netdev."""
    for part in (_own_device(command) or "").split(","):
        key, _, value = part.partition("=")
        if key == "mac":
            return arguments.mac(value, "The device's mac")
    return None


def other_network(command: Sequence[str]) -> str | None:
    """Another network in the command, by which the guest could bypass guestnet."""
    for option, value in _options(command):
        if option in ("netdev", "nic", "net") and value.split(",")[0] not in ("none", "nic"):
            return f"-{option} {value}"
    return None


def _options(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """QEMU's options with their values. QEMU accepts `-x` and `--x` alike."""
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
