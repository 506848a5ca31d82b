"""What `run` and `vm` share: a network of one guest for as long as one command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from guestnet.cli import arguments, supervise
from guestnet.cli.terminal import say

if TYPE_CHECKING:
    from guestnet.network import NatNetwork

ENDPOINT = "guest"


@contextmanager
def network_of_one(
    options: argparse.Namespace, mac: bytes, attach: Callable[[NatNetwork], None]
) -> Iterator[NatNetwork]:
    """A running network with the endpoint `guest`, attached by `attach`, its ports published.

    On leaving, what the command left running is ended first, so that it does not see its network fail.
    """
    from guestnet.config import NatConfig
    from guestnet.network import NatNetwork

    network = NatNetwork(NatConfig(**arguments.network_settings(options)))
    try:
        network.start()
        network.create_endpoint(
            ENDPOINT,
            mac=arguments.format_mac(mac),
            ip=str(arguments.plan(options.subnet).guest),
            hostname=options.hostname,
        )
        attach(network)
        for publication in options.publish:
            forward = network.publish(publication)
            if options.verbose:
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
