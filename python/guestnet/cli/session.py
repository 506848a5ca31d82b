"""What `run` and `vm` share: a network of one guest for as long as one command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from guestnet.cli import UsageError, arguments, supervise
from guestnet.cli.terminal import say, tell_log

if TYPE_CHECKING:
    from guestnet.forwards import ForwardSpec
    from guestnet.network import NatNetwork

ENDPOINT = "guest"


def check_guest(publication: ForwardSpec, options: argparse.Namespace) -> None:
    """Refuses a port for a guest that will never be there. Raises UsageError."""
    guest, address = publication.guest, arguments.plan(options.subnet).guest
    known = (None, ENDPOINT, str(address), options.hostname)
    if guest not in known:
        raise UsageError(
            f"The published port {publication} names another guest than the only one, {ENDPOINT!r} "
            f"({address}): write {publication.host_ports[0]}:{publication.guest_ports[0]}."
        )


@contextmanager
def network_of_one(
    options: argparse.Namespace, mac: bytes, attach: Callable[[NatNetwork], None]
) -> Iterator[NatNetwork]:
    """A running network with the endpoint `guest`, attached by `attach`, its ports published.

    On leaving, what the command left running is ended first, so that it does not see its network fail.
    """
    from guestnet.config import NatConfig
    from guestnet.network import NatNetwork

    tell_log(quiet=options.quiet, verbose=options.verbose)
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
        yield network
    finally:
        supervise.restore_terminal()
        supervise.end_descendants()
        if options.stats and network.is_running:
            from guestnet.cli.report import stats_lines

            for line in stats_lines(network.stats()):
                say(line)
        network.stop()
