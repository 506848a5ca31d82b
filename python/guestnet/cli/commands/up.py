"""`guestnet up`: a network in the foreground, with sockets that guests attach to."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from guestnet.cli import EXIT_OK, UsageError, arguments, settled
from guestnet.cli.runner import confined, ready, supervise
from guestnet.cli.runner.event_log import Teller
from guestnet.cli.runner.late_modules import import_asyncio
from guestnet.cli.runner.session import (
    note_overlap,
    note_replaced,
    person,
    say_stats,
    start_asking,
    start_capture,
    start_policy_logs,
)
from guestnet.cli.runner.sockets import check_path, remove_stale
from guestnet.cli.terminal import tell_log

if TYPE_CHECKING:
    from guestnet.runtime.network import NatNetwork

_STOPPING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGQUIT})

_TAKEN = (supervise.FORWARDED | _STOPPING | {signal.SIGHUP}) - {signal.SIGWINCH, signal.SIGCONT}
"""Every signal that would end the process and leave its sockets behind."""

_KINDS = ("stream", "dgram", "unixgram", "vhost-user")
_ABOUT = """\
Runs a network until SIGINT or SIGTERM. Each guest that attaches to one of its sockets is an endpoint of its
own: vm1, vm2, ... or as its lease names it. With --name, namespaces join too. Guests reach each other by
name. SIGUSR1 prints the counters."""
_EXAMPLE = """\
  guestnet up --stream /tmp/net.sock --lease 52:54:00:12:34:56=192.168.64.10,web -p 2222:web:22
  qemu-system-x86_64 ... -netdev stream,id=n,server=off,addr.type=unix,addr.path=/tmp/net.sock \\
      -device virtio-net-pci,netdev=n,mac=52:54:00:12:34:56

  From QEMU 9.2 on, reconnect-ms=1000 in -netdev (8.0 to 9.1: reconnect=1) lets a machine outlive a restart
  of guestnet."""


def lease(text: str) -> dict[str, str]:
    """`mac=ip[,ip][,name]`, as the mapping that `NatConfig(static_leases=...)` checks."""
    mac, equals, rest = text.partition("=")
    found = {"mac": mac}
    for part in rest.split(","):
        address = "ip6" if ":" in part else "ip"
        # A name has no dot, and an address comes first.
        key = address if set(part) & set(":.") or len(found) == 1 else "name"
        if not equals or not part or key in found:
            raise UsageError(
                f"--lease {text!r} is not MAC=ADDRESS[,ADDRESS][,NAME], with one address of a family: "
                "write 02:00:5e:10:00:01=192.168.64.10,web."
            )
        found[key] = part
    return found


def _network_name(text: str) -> str:
    from guestnet.runtime.joining.network_socket import check_name

    return check_name(text)


def _pid_path(text: str) -> str:
    if text == "-":
        raise UsageError("--pid-file '-' is not a file name: write one such as /run/guestnet.pid.")
    return arguments.file_path("--pid-file", "/run/guestnet.pid")(text)


def parser() -> arguments.Parser:
    """The options of `guestnet up`."""
    made = arguments.Parser("up", "[OPTIONS]", _ABOUT, _EXAMPLE)
    path = arguments.checked(check_path)
    add = made.add_argument
    add(
        "--name",
        type=arguments.checked(_network_name),
        metavar="NAME",
        help="let guests of this user join by `guestnet join NAME` and `guestnet run --network NAME`",
    )
    add(
        "--stream",
        action="append",
        default=[],
        type=path,
        metavar="PATH",
        help="socket for QEMU's `-netdev stream`",
    )
    add(
        "--dgram",
        action="append",
        default=[],
        type=path,
        metavar="PATH",
        help="datagram socket, one frame each",
    )
    add(
        "--unixgram", action="append", default=[], type=path, metavar="PATH", help="datagram socket for vfkit"
    )
    add(
        "--vhost-user",
        action="append",
        default=[],
        type=path,
        metavar="PATH",
        help="socket for QEMU's `-netdev vhost-user`: the fastest",
    )
    arguments.add_network_options(made)
    add(
        "--lease",
        action="append",
        default=[],
        type=arguments.checked(lease),
        metavar="MAC=ADDRESS[,ADDRESS][,NAME]",
        help="the address of either family or of both, and the name, of the guest with this MAC (repeatable)",
    )
    add("--json", action="store_true", help="print events as JSON lines on stdout")
    add(
        "--ready-fd",
        type=arguments.checked(ready.descriptor),
        metavar="FD",
        help="write a line to this descriptor when guests can attach",
    )
    add(
        "--pid-file",
        type=arguments.checked(_pid_path),
        metavar="FILE",
        help="write the process id to FILE when guests can attach",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command line after `guestnet up`; returns the exit status."""
    options = parser().parse_args(argv)
    arguments.settle(options, command=False)
    listeners = [(kind, path) for kind in _KINDS for path in getattr(options, kind.replace("-", "_"))]
    _check(options, listeners)
    # Blocked before any thread starts, and taken by this one alone.
    signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)
    socket_path = _socket_path(options.name)
    paths = [*(path for _, path in listeners), *filter(None, (options.pid_file, socket_path))]
    confined.begin(options, paths=paths, by_path=bool(options.dgram or options.unixgram))
    teller = Teller(options)
    tell_log(quiet=options.quiet, verbose=options.verbose)
    note_overlap(options)
    note_replaced(options)

    import_asyncio()
    from guestnet.model.spec_diff import ForwardAdded
    from guestnet.runtime.network import NatNetwork

    network = NatNetwork(options.config)
    with ExitStack() as stack:
        if socket_path is not None:
            stack.callback(_remove_socket_directory)
        stack.callback(teller.close)
        network.on_event(teller.event)
        asker = person(options, stack)
        if listeners:
            _pin_guests(options, network, listeners[0][1], teller, stack)
        stack.enter_context(network)
        start_capture(network, options)
        start_policy_logs(network, options, stack)
        start_asking(network, asker)
        if options.verbose:
            from guestnet.cli.runner.monitor import Monitor

            stack.enter_context(Monitor(network, teller.say))
        # First the ports, then the sockets: no guest comes to a network that cannot start.
        network.apply([ForwardAdded(publication) for publication in options.publish])
        for forward in network.forwards:
            teller.tell("published", f"published {forward}", forward=str(forward))
        for kind, path in listeners:
            _listen(network, kind, path, teller, stack)
        if socket_path is not None:
            _let_guests_join(network, options.name, socket_path, teller, stack)
        if options.pid_file is not None:
            stack.enter_context(_pid_file(options.pid_file))
        reload = _follow_policy(network, options, teller, stack)
        confined.settle(network)
        if options.verbose and (in_force := confined.in_force()) is not None:
            teller.tell("confined", str(in_force), **in_force.details())
        settled()
        ready.announce(options.ready_fd)
        _tell_ready(teller, network, options)
        number = _wait_for_end(lambda: _tell_stats(teller, network, options), reload, teller)
        teller.tell("stopping", f"stopping on {signal.Signals(number).name}")
    if options.stats:
        say_stats(network)
    return EXIT_OK


def _follow_policy(
    network: NatNetwork, options: argparse.Namespace, teller: Teller, stack: ExitStack
) -> Callable[[], None] | None:
    """Follows the file of `--policy`; returns what reads it again at once."""
    if options.policy is None:
        return None
    from guestnet.cli.runner.policy_file import PolicyFile

    return stack.enter_context(PolicyFile(network, options, lambda text: teller.tell("policy", text))).reload


def _tell_ready(teller: Teller, network: NatNetwork, options: argparse.Namespace) -> None:
    out = network.external
    details = {"external": list(map(str, out)), "device": network.uplink_device} if out else {}
    teller.tell(
        "ready",
        f"the network {options.subnet} is up, gateway {network.gateway}"
        + (f", outside {', '.join(map(str, out))} by {network.uplink_device}" if out else ""),
        subnet=str(options.subnet),
        **details,
    )


def _wait_for_end(usr1: Callable[[], None], reload: Callable[[], None] | None, teller: Teller) -> int:
    """Takes signals until one says to stop; returns that one."""
    while True:
        number, from_kernel = _next_signal()
        # A hangup by the kernel means that the terminal is gone; one that somebody sent is for a reload.
        if number in _STOPPING or (number == signal.SIGHUP and from_kernel):
            return number
        if number == signal.SIGUSR1:
            usr1()
        elif number == signal.SIGHUP and reload is not None:
            reload()
        elif number == signal.SIGHUP:
            teller.tell(
                "signal_ignored", "SIGHUP is ignored: without --policy nothing is read again", signal="SIGHUP"
            )
        else:
            name = signal.strsignal(number) if number >= signal.SIGRTMIN else signal.Signals(number).name
            teller.tell("signal_ignored", f"{name} is ignored: SIGTERM stops guestnet", signal=name)


def _next_signal() -> tuple[int, bool]:
    """A signal, and whether the kernel itself sent it, as far as the system tells."""
    if sys.platform == "linux":
        info = signal.sigwaitinfo(_TAKEN)
        return info.si_signo, info.si_code == supervise.SI_KERNEL
    return int(signal.sigwait(_TAKEN)), False


def _tell_stats(teller: Teller, network: NatNetwork, options: argparse.Namespace) -> None:
    stats = network.stats()
    if options.json:
        teller.tell("stats", "", **stats.as_dict())
        return
    from guestnet.cli.report import stats_lines

    for line in stats_lines(stats) or ["guestnet: no frame was carried yet"]:
        teller.say(line)


def _check(options: argparse.Namespace, listeners: list[tuple[str, str]]) -> None:
    if not listeners and options.name is None:
        raise UsageError(
            "Say where guests attach: --name NAME, --stream, --vhost-user, --dgram or --unixgram PATH."
        )
    paths = [os.path.abspath(path) for _, path in listeners]
    if len(set(paths)) != len(paths):
        raise UsageError("A socket path is given twice: give each listener its own.")
    if options.pcap == "-" and options.json:
        raise UsageError("--pcap - and --json both write to stdout: name a file for the capture.")
    ready.check(options.ready_fd)


def _pin_guests(
    options: argparse.Namespace, network: NatNetwork, path: str, teller: Teller, stack: ExitStack
) -> None:
    """A published port that names an automatic id leads to the same machine after a restart."""
    from guestnet.cli.runner.pinned import SUFFIX, PinnedGuests, automatic_ids

    ids = automatic_ids(options.publish, (lease.name for lease in options.config.static_leases))
    if not ids:
        return
    pinned = PinnedGuests(network, ids, path + SUFFIX)

    def close() -> None:
        pinned.close()
        if pinned.failure is not None:
            teller.tell(
                "not_pinned", f"{path}{SUFFIX} could not be written ({pinned.failure})", reason=pinned.failure
            )

    stack.callback(close)
    network.on_event(pinned.event)
    if pinned.set_aside is not None:
        teller.tell(
            "damaged", f"{path}{SUFFIX} was damaged and is now {pinned.set_aside}", path=pinned.set_aside
        )
    macs = {one["id"]: mac for mac, one in pinned.guests.items()}
    for name in ids:
        mac = macs.get(name)
        who = "the first guest that comes" if mac is None else f"the guest {mac}"
        if mac is None and name != "vm1":
            who = "a guest by its order of arrival"
        teller.tell(
            "pinned",
            f"{name} is {who}, as {path}{SUFFIX} remembers: --lease MAC=ADDRESS,NAME gives a machine a name "
            "of its own",
            id=name,
            mac=mac,
            path=path + SUFFIX,
        )


def _socket_path(name: str | None) -> str | None:
    """The path of the network's own socket, whose directory is there afterwards; None without a name."""
    if name is None:
        return None
    from guestnet.runtime.joining import network_socket

    network_socket.make_directory()
    return network_socket.path_of(name)


def _listen(network: NatNetwork, kind: str, path: str, teller: Teller, stack: ExitStack) -> None:
    if remove_stale(path):
        teller.tell("stale_socket_removed", f"replaced {path}, which a dead process left", path=path)
    network.listen(kind, path)
    stack.callback(_unlink, path)
    teller.tell("listening", f"guests can attach to {path} ({kind})", kind=kind, path=path)


def _remove_socket_directory() -> None:
    from guestnet.runtime.joining import network_socket

    network_socket.remove_directory()


def _let_guests_join(network: NatNetwork, name: str, path: str, teller: Teller, stack: ExitStack) -> None:
    from guestnet.runtime.joining.join_server import JoinServer

    stack.callback(JoinServer(network, path).close)
    teller.tell("joinable", f"guests can join by `guestnet join {name}`", name=name, path=path)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


@contextmanager
def _pid_file(path: str) -> Iterator[None]:
    """A file with our process id, complete from the moment that it has its name."""
    from guestnet.errors import GuestnetError

    temporary = f"{path}.{os.getpid()}"
    try:
        _unlink(temporary)
        # A new file, whatever somebody else may put there meanwhile.
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        with open(fd, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        os.replace(temporary, path)
    except OSError as error:
        raise GuestnetError(
            f"Cannot write the pid file {path!r} ({error.strerror}): choose another path."
        ) from error
    try:
        yield
    finally:
        _unlink(path)
