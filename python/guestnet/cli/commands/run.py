"""`guestnet run`: a command in new user, network and mount namespaces whose only way out is guestnet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import IPv4Interface
from typing import TYPE_CHECKING

from guestnet.cli import UsageError, arguments
from guestnet.cli.runner import supervise
from guestnet.cli.runner.family6 import address6, router6
from guestnet.cli.runner.session import ENDPOINT, HOST_IDS_NOTE, network_of_one, person
from guestnet.cli.terminal import complain, say

if TYPE_CHECKING:
    import argparse

    from guestnet._linux.namespace import Guest
    from guestnet.runtime.network import NatNetwork

_ABOUT = """\
Runs CMD in a namespace of its own, as an ordinary user or as root. The namespace has an address, a route
and names. Everything that leaves it goes through guestnet, and only published ports lead into it. Exits
with CMD's status."""
_EXAMPLE = """\
  guestnet run -- curl https://example.org
  guestnet run -p 8080:80 -- python3 -m http.server 80"""


def parser() -> arguments.Parser:
    """The options of `guestnet run`."""
    made = arguments.Parser("run", "[OPTIONS] -- CMD [ARGS...]", _ABOUT, _EXAMPLE)
    arguments.add_network_options(made)
    made.add_argument(
        "--network",
        metavar="NETWORK",
        help="join this network, started by `guestnet up --name NETWORK`, instead of having one alone",
    )
    made.add_argument("--id", metavar="ID", help="with --network: the guest's id")
    made.add_argument("--hostname", type=arguments.checked(arguments.hostname), help="the guest's host name")
    made.add_argument(
        "--host-ids",
        action="store_true",
        help="when root runs this: CMD is root of this host's files too (default: it owns none of them)",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command line after `guestnet run`; returns the exit status."""
    made = parser()
    options, command = arguments.parse_with_command(made, argv, "CMD")
    if options.host_ids and os.geteuid() != 0:
        raise UsageError("--host-ids is for root: CMD has the rights of an ordinary user without it.")
    if options.network is not None:
        if options.network in ("none", "host", "bridge"):  # Docker's words
            raise UsageError(
                f"--network {options.network}: it takes the name of a network that runs. To cut the guest "
                "off write --mode host_only."
            )
        arguments.refuse_network_settings(made, options)
        from guestnet.cli.runner.joined import run_joined

        return run_joined(options, command)
    if options.id is not None:
        raise UsageError(
            "--id is for a guest of a network that runs: add --network NETWORK, or leave it out."
        )
    arguments.settle(options, command=True)
    config = options.config
    mac = arguments.random_mac()
    mask = supervise.block_signals()

    from guestnet._linux.links import Interface
    from guestnet._linux.namespace import Guest

    interface = Interface(
        mac=mac,
        # A segment that is there already gives addresses itself.
        address=None if options.bridge else IPv4Interface((config.first_guest_address, config.prefix_len)),
        gateway=None if options.bridge else config.gateway,
        mtu=config.mtu,
        address6=address6(config),
        gateway6=router6(config),
    )
    nameserver = None if options.bridge else str(config.gateway)
    guest = Guest(
        interface,
        nameserver=nameserver,
        search=config.search,
        hostname=options.hostname,
        host_ids=options.host_ids,
        ends_first=True,
    )
    with ExitStack() as at_end:
        return _run(options, command, guest, mask, at_end)


def _run(
    options: argparse.Namespace, command: list[str], guest: Guest, mask: set[int], at_end: ExitStack
) -> int:
    """Runs the command in the guest; `mask` is the signal mask that it gets."""
    from guestnet._linux.namespace import launch

    config = options.config
    asker = person(options, at_end)
    terminal = None if asker is None else asker.lend()
    before = supervise.take_terminal if supervise.holds_terminal_alone() else None
    if terminal is not None:
        before = terminal.enter
    # The child sets its namespace up while this process imports and starts the network.
    namespace = launch(guest, command, mask, before)
    if terminal is not None:
        terminal.start()

    def attach(network: NatNetwork) -> None:
        network.attach(ENDPOINT, "tap", fd=namespace.take_tap())
        if options.host_ids and not options.quiet:
            complain(HOST_IDS_NOTE)
        for note in namespace.notes:
            complain(note)

    try:
        with network_of_one(options, guest.interface.mac, attach, asker=asker):
            if options.verbose:
                about = (
                    f"on {options.bridge}"
                    if options.bridge
                    else f"{config.first_guest_address}, its gateway {config.gateway}"
                )
                say(f"guestnet: the guest is {about}")
            namespace.go()
            return supervise.wait(namespace.pid, None if terminal is None else terminal.resize)
    finally:
        namespace.close()
