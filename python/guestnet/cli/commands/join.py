"""`guestnet join`: a network for a namespace that somebody else made, such as a rootless container's."""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import threading
from collections.abc import Sequence
from ipaddress import IPv4Interface
from typing import TYPE_CHECKING

from guestnet.cli import EXIT_OK, UsageError, arguments
from guestnet.cli.runner import ready
from guestnet.cli.terminal import answer, say

if TYPE_CHECKING:
    from guestnet._linux.join_namespace import Target
    from guestnet.runtime.network import NatNetwork

_ABOUT = """\
Makes a TAP interface in the network namespace of process PID, or in that of the file PATH, and connects it.
With NETWORK, a name given to `guestnet up --name` or the path of its socket, the guest joins that network:
the command prints the guest's id and address and ends. Without NETWORK this process serves the namespace.
The guest stays until PID ends or PATH is removed, and without NETWORK until SIGINT or SIGTERM."""
_EXAMPLE = """\
  guestnet up --name lab &
  guestnet join lab --pid 4242 --id web -p 8080:80
  guestnet join --netns /run/netns/blue"""
_GONE = signal.SIGRTMIN + 1
"""Sent by this process to itself when the guest's namespace is gone."""
_STOPPING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP})
_INTERFACE = re.compile(r"[^\s/:.][^\s/:]{0,14}")


def _pid(text: str) -> int:
    return arguments.number("--pid", text, 1, 0x3FFFFF, os.getpid())


def _interface(text: str) -> str:
    if not text.isascii() or not _INTERFACE.fullmatch(text):
        raise UsageError(f"--interface {text!r} is not a name of 1 to 15 characters: write one such as eth0.")
    return text


def parser() -> arguments.Parser:
    """The options of `guestnet join`."""
    made = arguments.Parser("join", "[NETWORK] (--pid PID | --netns PATH) [OPTIONS]", _ABOUT, _EXAMPLE)
    add = made.add_argument
    add("network", nargs="?", help=argparse.SUPPRESS)
    add("--pid", type=arguments.checked(_pid), metavar="PID", help="a process in the namespace")
    add("--netns", type=arguments.checked(arguments.file_path("--netns")), metavar="PATH", help="its file")
    add(
        "--interface",
        type=arguments.checked(_interface),
        metavar="NAME",
        default="eth0",
        help="the name of the interface in the namespace (default: eth0)",
    )
    arguments.add_guest_options(made)
    arguments.add_network_options(made)
    add(
        "--ready-fd",
        type=arguments.checked(ready.descriptor),
        metavar="FD",
        help="without NETWORK: write a line to this descriptor when the guest has its network",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command line after `guestnet join`; returns the exit status."""
    made = parser()
    options = made.parse_args(argv)
    if (options.pid is None) == (options.netns is None):
        raise UsageError("Say which namespace: `guestnet join [NETWORK] --pid PID`, or `--netns PATH`.")

    from guestnet._linux.join_namespace import Target

    target = Target(options.pid, options.netns)
    if options.network is not None:
        arguments.refuse_network_settings(made, options, besides=("ready_fd",))
        return _join(options, target)
    arguments.settle(options, command=False)
    ready.check(options.ready_fd)
    return _serve(options, target)


def _join(options: argparse.Namespace, target: Target) -> int:
    from guestnet._linux.join_namespace import Watch, make_tap, open_namespace
    from guestnet._linux.links import Interface
    from guestnet.cli.runner.network_client import NetworkClient

    watch = Watch.of(target)  # before the namespace is opened: a process id may be given again
    namespace = open_namespace(target)
    with NetworkClient(options.network) as client:
        got = client.reserve(**arguments.guest_settings(options))
        own6 = (got.address6, got.gateway6)
        interface = Interface(got.mac, got.address, got.gateway, got.mtu, options.interface, *own6)
        tap = make_tap(target, namespace, interface)
        published = client.attach(tap, (one.text for one in options.publish))
        client.keep(watch.fileno(), watch.name)
    answer(f"{got.id} {got.address.ip if got.address is not None else '-'}\n")
    if options.verbose:
        for one in published:
            say(f"guestnet: published {one}")
    return EXIT_OK


def _serve(options: argparse.Namespace, target: Target) -> int:
    from guestnet._linux.join_namespace import Watch, make_tap, open_namespace
    from guestnet._linux.links import Interface
    from guestnet.cli.runner.family6 import address6, router6
    from guestnet.cli.runner.session import ENDPOINT, network_of_one

    if options.id not in (None, ENDPOINT):
        raise UsageError(f"--id {options.id!r}: without NETWORK the guest is {ENDPOINT!r}; leave it out.")
    config = options.config
    mac = options.mac or arguments.random_mac()
    watch = Watch.of(target)
    namespace = open_namespace(target)
    bridged = options.bridge is not None
    interface = Interface(
        mac=mac,
        address=None if bridged else IPv4Interface((config.first_guest_address, config.prefix_len)),
        gateway=None if bridged else config.gateway,
        mtu=config.mtu,
        name=options.interface,
        address6=address6(config),
        gateway6=router6(config),
    )
    tap = make_tap(target, namespace, interface)
    os.close(namespace)

    def wait_for_end() -> None:
        while True:
            select.select([watch], [], [])
            if watch.is_gone():
                os.kill(os.getpid(), _GONE)
                return

    def attach(network: NatNetwork) -> None:
        network.attach(ENDPOINT, "tap", fd=tap)
        threading.Thread(target=wait_for_end, name="guestnet-watch", daemon=True).start()

    taken = _STOPPING | {_GONE}
    signal.pthread_sigmask(signal.SIG_BLOCK, taken)  # before any thread starts
    with network_of_one(options, mac, attach):
        if options.verbose:
            about = (
                f"on {options.bridge}"
                if bridged
                else f"{config.first_guest_address}, its gateway {config.gateway}"
            )
            say(f"guestnet: the guest in {target} is {about}")
        ready.announce(options.ready_fd)
        signal.sigwaitinfo(taken)
    return EXIT_OK
