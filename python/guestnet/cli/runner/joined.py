"""`guestnet run --network`: a command in a namespace of its own that joins a network that runs already.

This process starts no network and no thread: it makes the namespace, hands its TAP device to the network and
waits for the command.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress

from guestnet._linux.links import Interface
from guestnet._linux.namespace import Guest, launch
from guestnet.cli import settled
from guestnet.cli.runner import supervise
from guestnet.cli.runner.network_client import NetworkClient
from guestnet.cli.runner.session import HOST_IDS_NOTE, let_connections_end
from guestnet.cli.terminal import complain, say
from guestnet.errors import GuestnetError


def run_joined(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Runs a command as a guest of the network `options.network`; returns its exit status."""
    mask = supervise.block_signals()
    with NetworkClient(options.network) as client:
        got = client.reserve(id=options.id, hostname=options.hostname)
        guest = Guest(
            Interface(
                got.mac, got.address, got.gateway, got.mtu, address6=got.address6, gateway6=got.gateway6
            ),
            nameserver=got.nameserver,
            search=got.search,
            hostname=options.hostname,
            host_ids=options.host_ids,
        )
        before = supervise.take_terminal if supervise.holds_terminal_alone() else None
        namespace = launch(guest, command, mask, before)
        try:
            tap = namespace.take_tap()
            published = client.attach(tap, (one.text for one in options.publish))
            os.close(tap)
            if not options.quiet:
                for note in (*((HOST_IDS_NOTE,) if options.host_ids else ()), *namespace.notes):
                    complain(note)
            if options.verbose:
                where = "gets its address from the segment" if got.address is None else f"is {got.address.ip}"
                say(f"guestnet: the guest {got.id} of {options.network} {where}")
                for one in published:
                    say(f"guestnet: published {one}")
            settled()
            namespace.go()
            return supervise.wait(namespace.pid)
        finally:
            supervise.restore_terminal()
            try:
                with suppress(GuestnetError):
                    let_connections_end(client.is_moving)
            finally:
                supervise.end_descendants()
                supervise.restore_terminal()
                namespace.close()
