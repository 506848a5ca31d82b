"""What `run` and `vm` share: a network of one guest for as long as one command runs."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv6Network
from typing import TYPE_CHECKING

from guestnet.cli import UsageError, arguments, settled
from guestnet.cli.runner import confined, supervise
from guestnet.cli.runner.late_modules import import_asyncio
from guestnet.cli.terminal import complain, say, tell_log
from guestnet.errors import GuestnetError

if TYPE_CHECKING:
    from guestnet.cli.runner.asker import TerminalAsker
    from guestnet.model.forward_spec import ForwardSpec
    from guestnet.runtime.network import NatNetwork

HOST_IDS_NOTE = (
    "Note: with --host-ids the command is root of this host's files and can change anything on it: leave "
    "--host-ids out unless you trust the command."
)
"""Printed before the command of `guestnet run` starts, unless --quiet is given."""
ENDPOINT = "vm1"
"""The guest's id, as that of the first guest of `guestnet up`."""


def check_guest(publication: ForwardSpec, options: argparse.Namespace) -> None:
    """Refuses a port for a guest that will never be there. Raises UsageError."""
    guest, address = publication.guest, options.config.first_guest_address
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
    from guestnet._linux.links import routes6_into, routes_into

    if taken := routes_into(options.subnet):
        complain(
            f"Note: {options.subnet} overlaps this host's {', '.join(taken)}, which guests cannot reach: "
            "choose another with --subnet."
        )
    prefix = options.prefix
    if prefix is not None and (taken := routes6_into(IPv6Network(prefix))):
        complain(
            f"Note: {prefix} overlaps this host's {', '.join(taken)}, which guests cannot reach: "
            "choose another with --prefix."
        )


_IMPATIENT = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
_DRAIN_SECONDS = 5.0
_QUIET_SECONDS = 1.0
_LOOK_SECONDS = 0.01
_UNFINISHED = frozenset(("connecting", "syn_sent", "syn_received", "established", "fin_wait_1", "fin_wait_2"))
"""States of connections whose guest has not ended its side, or whose end the outside does not have yet."""


def let_connections_end(is_moving: Callable[[], bool]) -> None:
    """Waits while connections still carry what a command wrote before it ended, as on any host: no longer
    than some seconds, and not against a signal to end (signals are blocked here)."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    while time.monotonic() < deadline and not signal.sigpending() & _IMPATIENT:
        if not is_moving():
            return
        time.sleep(_LOOK_SECONDS)


def _is_moving(network: NatNetwork) -> bool:
    return any(
        flow.protocol == "tcp" and flow.state in _UNFINISHED and flow.idle < _QUIET_SECONDS
        for flow in network.flows()
    )


@contextmanager
def network_of_one(
    options: argparse.Namespace,
    mac: bytes,
    attach: Callable[[NatNetwork], None],
    kept: Iterable[int] = (),
    asker: TerminalAsker | None = None,
) -> Iterator[NatNetwork]:
    """A running network with the endpoint `vm1`, attached by `attach`, its ports published.

    From here on the process is confined, but for the capabilities `kept`: the command was forked before.
    On leaving, what the command left running is ended first, so that it does not see its network fail.
    """
    import_asyncio()
    from guestnet.runtime.network import NatNetwork

    tell_log(quiet=options.quiet, verbose=options.verbose)
    note_overlap(options)
    note_replaced(options)
    confined.begin(options, kept=kept)
    network = NatNetwork(options.config)
    started = False
    with ExitStack() as monitoring:
        try:
            network.start()
            started = True
            start_capture(network, options)
            start_policy_logs(network, options, monitoring)
            start_asking(network, asker)
            network.create_endpoint(
                ENDPOINT,
                mac=arguments.format_mac(mac),
                ip=None if options.bridge else options.config.first_guest_address,
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
            if options.verbose:
                if (in_force := confined.in_force()) is not None:
                    say(f"guestnet: {in_force}")
                from guestnet.cli.runner.monitor import Monitor

                monitoring.enter_context(Monitor(network, say))
            _follow_policy(network, options, monitoring)
            settled()
            yield network
        finally:
            supervise.restore_terminal()
            try:
                if network.is_running:
                    with suppress(GuestnetError):
                        let_connections_end(lambda: _is_moving(network))
            finally:
                try:
                    supervise.end_descendants()
                    supervise.restore_terminal()  # from what was left in the command's process group
                    monitoring.close()
                finally:
                    network.stop()
        if options.stats and started:
            say_stats(network)


def note_replaced(options: argparse.Namespace) -> None:
    """Says that an earlier capture is about to be replaced. What is no capture is refused later."""
    if options.quiet or options.pcap in (None, "-"):
        return
    from guestnet.runtime.capture import is_capture

    with suppress(OSError):
        if os.path.isfile(options.pcap) and is_capture(options.pcap):
            complain(f"Note: the capture {options.pcap!r} exists and is replaced.")


def start_capture(network: NatNetwork, options: argparse.Namespace) -> None:
    """Starts the capture of `--pcap -`; that to a file belongs to the configuration."""
    if options.pcap == "-":
        network.start_capture(options.capture_fd)


def start_policy_logs(network: NatNetwork, options: argparse.Namespace, stack: ExitStack) -> None:
    """Starts what `--audit` and `--learn` ask for. Their files are complete when the network has stopped."""
    if options.audit is not None:
        # Not by the stack: the last flows end with the network.
        network.audit(options.audit)
    if options.learn is not None:
        from guestnet.policy.files import check_writable

        check_writable(options.learn)
        learner = network.learn()

        def write() -> None:
            policy = learner.policy()
            policy.save(options.learn)
            if not options.quiet:
                complain(f"Note: {options.learn} has {len(policy.rules)} rules that allow what was done.")

        stack.callback(write)


def person(options: argparse.Namespace, stack: ExitStack) -> TerminalAsker | None:
    """The person at the terminal, with `--ask`. `stack` is closed after the network has stopped.

    Raises:
        UsageError: There is no terminal.
    """
    if not options.ask:
        return None
    from guestnet.cli.runner.asker import TerminalAsker

    asker = TerminalAsker(options.policy)
    stack.callback(asker.close)
    return asker


def start_asking(network: NatNetwork, asker: TerminalAsker | None) -> None:
    """Has the person decide."""
    if asker is None:
        return
    policy = network.policy
    if policy is None or not policy.asks:
        complain("Note: --ask asks nothing: the policy allows what no rule decides, and no rule asks.")
        return
    network.decide(asker, seconds=policy.ask_seconds)


def _follow_policy(network: NatNetwork, options: argparse.Namespace, stack: ExitStack) -> None:
    """Reads the file of `--policy` again when it changes."""
    if options.policy is not None:
        from guestnet.cli.runner.policy_file import PolicyFile

        report = complain if not options.quiet else _say_nothing
        stack.enter_context(PolicyFile(network, options, report))


def _say_nothing(_text: str) -> None:
    pass


def say_stats(network: NatNetwork) -> None:
    """The counters of a network that has stopped: nothing is added to them any more."""
    from guestnet.cli.report import stats_lines

    for line in stats_lines(network.stats()) or ["guestnet: no frame was carried"]:
        say(line)
