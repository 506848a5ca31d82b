"""What `run` and `vm` share: a network of one guest for as long as one command runs."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from guestnet.cli import UsageError, arguments, confined, supervise
from guestnet.cli.terminal import complain, say, tell_log
from guestnet.errors import GuestnetError

if TYPE_CHECKING:
    from guestnet.forwards import ForwardSpec
    from guestnet.network import NatNetwork

ENDPOINT = "guest"


def check_guest(publication: ForwardSpec, options: argparse.Namespace) -> None:
    """Refuses a port for a guest that will never be there. Raises UsageError."""
    guest, address = publication.guest, arguments.plan(options.subnet).guest
    known = (ENDPOINT, str(address), (options.hostname or ENDPOINT).lower())
    if guest is not None and guest.lower() not in known:
        raise UsageError(
            f"The published port {publication} names another guest than the only one, {ENDPOINT!r} "
            f"({address}): write {publication.host_ports[0]}:{publication.guest_ports[0]}."
        )


def note_overlap(options: argparse.Namespace) -> None:
    """Says what guests will not reach, since it has addresses of their own network."""
    if options.quiet or options.bridge or options.mode == "host_only":
        return
    from guestnet._linux.links import routes_into

    if taken := routes_into(options.subnet):
        complain(
            f"Note: {options.subnet} overlaps this host's {', '.join(taken)}, which guests cannot reach: "
            "choose another with --subnet."
        )


_IMPATIENT = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_DRAIN_SECONDS = 5.0
_QUIET_SECONDS = 1.0
_LOOK_SECONDS = 0.01
_UNFINISHED = frozenset(("connecting", "syn_sent", "syn_received", "established", "fin_wait_1", "fin_wait_2"))
"""States of connections whose guest has not ended its side, or whose end the outside does not have yet."""


def let_connections_end(network: NatNetwork) -> None:
    """A command may end before the guest's kernel has sent what it wrote, as on any host. Waits as long as
    that still moves, no longer than some seconds, and not against a wish (signals are blocked here)."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    while time.monotonic() < deadline and not signal.sigpending() & _IMPATIENT:
        moving = (
            flow.protocol == "tcp" and flow.state in _UNFINISHED and flow.idle < _QUIET_SECONDS
            for flow in network.flows()
        )
        if not any(moving):
            return
        time.sleep(_LOOK_SECONDS)


@contextmanager
def network_of_one(
    options: argparse.Namespace,
    mac: bytes,
    attach: Callable[[NatNetwork], None],
    kept: Iterable[int] = (),
) -> Iterator[NatNetwork]:
    """A running network with the endpoint `guest`, attached by `attach`, its ports published.

    From here on the process is confined, but for the capabilities `kept`: the command was forked before.
    On leaving, what the command left running is ended first, so that it does not see its network fail.
    """
    from guestnet.config import NatConfig
    from guestnet.network import NatNetwork

    tell_log(quiet=options.quiet, verbose=options.verbose)
    note_overlap(options)
    confined.begin(options, kept=kept)
    network = NatNetwork(NatConfig(**arguments.network_settings(options)))
    try:
        network.start()
        network.create_endpoint(
            ENDPOINT,
            mac=arguments.format_mac(mac),
            ip=None if options.bridge else str(arguments.plan(options.subnet).guest),
            hostname=options.hostname,
        )
        attach(network)
        for publication in options.publish:
            check_guest(publication, options)
            forward = network.publish(publication)
            # A port that the kernel chose is of no use to who does not know it.
            if options.verbose or (not publication.host_ports[0] and not options.quiet):
                say(f"guestnet: published {forward}")
        confined.settle(network)
        if options.verbose and (in_force := confined.in_force()) is not None:
            say(f"guestnet: {in_force}")
        yield network
    finally:
        supervise.restore_terminal()
        try:
            if network.is_running:
                with suppress(GuestnetError):
                    let_connections_end(network)
        finally:
            _end(network, options)


def _end(network: NatNetwork, options: argparse.Namespace) -> None:
    try:
        supervise.end_descendants()
        supervise.restore_terminal()  # from what was left in the command's process group
        if options.stats and network.is_running:
            from guestnet.cli.report import stats_lines

            for line in stats_lines(network.stats()):
                say(line)
    finally:
        network.stop()
