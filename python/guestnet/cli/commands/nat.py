"""`guestnet nat`: a capture through the NAT engine, offline."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, BinaryIO

from guestnet.cli import EXIT_OK, UsageError, arguments
from guestnet.errors import ConfigError, GuestnetError
from guestnet.model.defaults import DEFAULT_SUBNET
from guestnet.model.spec import Filtering

if TYPE_CHECKING:
    from guestnet.model.forward_spec import ForwardSpec
    from guestnet.nat.engine import NatEngine, NatEngineConfig
    from guestnet.nat.offline import Report

_ABOUT = """\
Translates a capture (pcap or pcapng; Ethernet, raw IP, Linux cooked) as a NAT between --internal and
--external would have done, at the times of the capture. Packets from inside go out, packets to an external
address come in; other packets are copied unchanged, and what a NAT drops is left out. IN and OUT may be - for
stdin and stdout.

With --reverse, IN was captured outside: packets to an external address come in. --inside is a capture of the
inside that opens the connections which IN has the other side of; the same --seed gives the same ports."""
_EXAMPLE = """\
  guestnet nat --external 203.0.113.1 --internal 192.168.64.0/24 inside.pcap outside.pcap
  guestnet nat --external 203.0.113.1 --reverse --inside inside.pcap replies.pcap back.pcap"""
TABLE_LARGEST = 0xFFFFFE
_MAGICS = ("0a0d0d0a", "d4c3b2a1", "a1b2c3d4", "4d3cb2a1", "a1b23c4d")
"""The first four bytes of a capture: pcapng, and pcap in both byte orders and resolutions."""
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def _address(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise UsageError(f"--external {text!r} is not an IPv4 address: write 203.0.113.1.") from None


def _network(text: str) -> IPv4Network:
    try:
        return IPv4Network(text)
    except ValueError:
        pass
    try:
        inside = IPv4Network(text, strict=False)
    except ValueError:
        raise UsageError(f"--internal {text!r} is not an IPv4 network: write {DEFAULT_SUBNET}.") from None
    raise UsageError(f"--internal {text!r} is an address within a network: write {inside}.")


def _ports(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not dash:
        raise UsageError(f"--ports {text!r} is not FIRST-LAST: write 49152-65535.")
    low, high = (arguments.number("--ports", one, 1, 65535, "49152-65535") for one in (first, last))
    if low > high:
        raise UsageError(f"--ports {text!r} starts after its end: write {high}-{low}.")
    return low, high


def _table_size(text: str) -> int:
    return arguments.number("--table-size", text, 1, TABLE_LARGEST, 1 << 20)


def parser() -> arguments.Parser:
    """The options of `guestnet nat`."""
    made = arguments.Parser("nat", "--external IP [OPTIONS] IN OUT", _ABOUT, _EXAMPLE)
    add = made.add_argument
    checked = arguments.checked
    add("source", nargs="?", metavar="IN", help="the capture to read")
    add("target", nargs="?", metavar="OUT", help="the capture to write, in the same format")
    add(
        "--external",
        type=checked(_address),
        action="append",
        default=[],
        metavar="IP",
        help="external address (repeatable)",
    )
    add(
        "--internal",
        type=checked(_network),
        default=IPv4Network(DEFAULT_SUBNET),
        metavar="CIDR",
        help=f"the inside (default {DEFAULT_SUBNET})",
    )
    add("--reverse", action="store_true", help="IN was captured outside: translate inbound")
    add(
        "--inside",
        type=checked(arguments.file_path("--inside", "inside.pcap")),
        metavar="FILE",
        help="with --reverse: a capture of the inside that opens connections",
    )
    add(
        "-p",
        "--publish",
        type=checked(arguments.publication),
        action="append",
        default=[],
        metavar="SPEC",
        help="a published port: [EXTERNAL_IP:]PORT:GUEST_IP:PORT[/tcp|/udp] (repeatable)",
    )
    add(
        "--ports",
        type=checked(_ports),
        default=(49152, 65535),
        metavar="FIRST-LAST",
        help="external ports (default 49152-65535)",
    )
    behaviours = [str(one) for one in Filtering]
    add(
        "--mapping",
        type=checked(arguments.choice("--mapping", behaviours)),
        default=str(Filtering.ENDPOINT_INDEPENDENT),
        metavar="HOW",
        help=f"{', '.join(behaviours)} (RFC 4787 section 4.1; default {behaviours[0]})",
    )
    add(
        "--filtering",
        type=checked(arguments.choice("--filtering", behaviours)),
        default=str(Filtering.ADDRESS_DEPENDENT),
        metavar="HOW",
        help=f"the same words (RFC 4787 section 5; default {behaviours[1]})",
    )
    add("--mtu", type=checked(arguments.mtu), metavar="BYTES", help="MTU outside (default: no limit)")
    add(
        "--table-size",
        type=checked(_table_size),
        default=1 << 20,
        metavar="N",
        help="connections at once (default 1048576)",
    )
    add("--seed", default="guestnet", metavar="TEXT", help="determines the random ports")
    add("--only-translated", action="store_true", help="leave out packets that do not concern the NAT")
    add("--json", action="store_true", help="print the report as JSON, on stderr")
    add("-q", "--quiet", action="store_true", help="print errors only")
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command line after `guestnet nat`; returns the exit status."""
    options = parser().parse_args(argv)
    if options.source is None or options.target is None:
        raise UsageError("Say what to read and what to write: `guestnet nat --external IP IN OUT`.")
    if not options.external:
        raise UsageError("Say the address that packets leave with: --external 203.0.113.1.")
    for spec in options.publish:
        _check_publication(spec)
    if options.source == options.inside == "-":
        raise UsageError("IN and --inside cannot both be stdin: name a file for one of them.")
    if options.target == "-" and os.isatty(1):
        raise UsageError("OUT is binary data and stdout is a terminal: redirect it, or name a file.")
    if options.inside is not None and not options.reverse:
        raise UsageError("--inside goes with --reverse: without it, IN itself is the capture of the inside.")
    from guestnet.nat.capture_file import CaptureFile
    from guestnet.nat.offline import Offline

    work = Offline(_config(options), reverse=options.reverse, keep_others=not options.only_translated)
    for spec in options.publish:
        _publish(work.engine, spec, options.external[0])
    with contextlib.ExitStack() as stack:
        source = CaptureFile(stack.enter_context(_reading(options.source)), options.source)
        inside = None
        if options.inside is not None:
            inside = CaptureFile(stack.enter_context(_reading(options.inside)), options.inside)
        target = stack.enter_context(_writing(options.target, options.source))
        began = time.monotonic()
        with _progress(options) as progress:
            report = work.run(source, target, inside=inside, progress=progress)
        seconds = time.monotonic() - began
    if options.json:
        sys.stderr.write(json.dumps({**report.as_dict(), "seconds": round(seconds, 3)}) + "\n")
    elif not options.quiet:
        sys.stderr.write(_told(report, seconds))
    return EXIT_OK


def _config(options: argparse.Namespace) -> NatEngineConfig:
    from guestnet.nat.engine import NatEngineConfig

    return NatEngineConfig(
        external=options.external,
        internal=options.internal,
        port_range=options.ports,
        table_size=options.table_size,
        mapping_udp=Filtering(options.mapping),
        mapping_tcp=Filtering(options.mapping),
        filtering_udp=Filtering(options.filtering),
        filtering_tcp=Filtering(options.filtering),
        mtu_outside=options.mtu or 65535,
        secret=hashlib.sha256(options.seed.encode()).digest(),
    )


def _check_publication(spec: ForwardSpec) -> None:
    if spec.guest_address is None:
        raise UsageError("A port that --publish gives needs the guest's address: write 80:192.168.64.2:80.")
    if not spec.host_ports[0]:
        raise UsageError(
            f"{spec} does not say which external port: write 80:{spec.guest}:{spec.guest_ports[0]}."
        )


def _publish(engine: NatEngine, spec: object, external: IPv4Address) -> None:
    from guestnet.model.forward_spec import ForwardSpec

    assert isinstance(spec, ForwardSpec)
    host = external if spec.host_ip is None or IPv4Address(0) == spec.host_ip else spec.host_ip
    assert spec.guest_address is not None
    for port, inner in zip(spec.host_ports, spec.guest_ports, strict=True):
        engine.add_forward(spec.protocol, (str(host), port), (spec.guest_address, inner))


@contextlib.contextmanager
def _reading(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be read ({error.strerror}): name a capture that can.") from error
    with file:
        try:
            yield file
        except IsADirectoryError:
            raise ConfigError(f"{path} is a directory: name a capture in it.") from None


@contextlib.contextmanager
def _writing(path: str, source: str) -> Iterator[BinaryIO]:
    """A file that is complete if everything went well, and unchanged if not."""
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "wb", buffering=0) as file:  # a pipe or a device
                yield file
            return
        if source != "-" and os.path.exists(path) and os.path.samefile(path, source):
            raise ConfigError(f"{path!r} is the capture that is read: choose another file to write to.")
        if _has_other_content(path):
            raise ConfigError(f"{path!r} exists and is not a capture: remove it, or choose another file.")
        folder, name = os.path.split(os.path.abspath(path))
        number, unfinished = _unfinished(folder, name)
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be written ({error.strerror}): choose another file.") from error
    try:
        with open(number, "wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fchmod(number, 0o666 & ~_umask())
            if unfinished is None:
                unfinished = _give_name(number, folder, name)
            os.replace(unfinished, path)
    except BaseException as error:
        if unfinished is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)
        if isinstance(error, OSError):
            raise GuestnetError(
                f"{path!r} cannot be written ({error.strerror}): make room, or choose another file."
            ) from error
        raise


def _has_other_content(path: str) -> bool:
    """Whether there is a file that is neither empty nor a capture. It is not overwritten."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except FileNotFoundError:
        return False
    return bool(head) and head.hex() not in _MAGICS


def _unfinished(folder: str, name: str) -> tuple[int, str | None]:
    """A file in `folder` without a name, so that nothing is left when the process ends for any reason.

    If the file system has no such files, it is a file with a name of its own.
    """
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600), None
    except (OSError, AttributeError):
        return tempfile.mkstemp(prefix=f".{name}.", dir=folder)


def _give_name(number: int, folder: str, name: str) -> str:
    """Gives the file without a name an unused name."""
    path = os.path.join(folder, f".{name}.{os.urandom(8).hex()}")
    # With a directory, though no path here needs one, this is linkat(), which follows the link in /proc.
    os.link(f"/proc/self/fd/{number}", path, src_dir_fd=number, follow_symlinks=True)
    return path


def _umask() -> int:
    mask = os.umask(0o77)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _progress(options: argparse.Namespace) -> Iterator[Callable[[int], object] | None]:
    """A progress bar on a terminal, for a file whose size is known."""
    if options.quiet or options.source == "-" or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=os.stat(options.source).st_size)
        yield lambda taken: bar.update(task, completed=taken)


def _size(count: float) -> str:
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f} {_UNITS[0]}" if not power else f"{count:.2f} {_UNITS[power]}"


def _told(report: Report, seconds: float) -> str:
    lines = [
        f"{report.packets:>12,} packets read, {_size(report.bytes)} in {seconds:.1f} s",
        f"{report.written:>12,} written",
    ]
    for result, count in sorted(report.results.items(), key=lambda item: (item[0].is_dropped, -item[1])):
        what = f"dropped: {result.reason}" if result.is_dropped else result.kind.replace("_", " ")
        lines.append(f"{count:>12,} {what}")
    more = (
        (report.not_ip, "not IPv4, left as they were"),
        (report.not_ours, "neither from inside nor to an external address, left as they were"),
        (report.cut, "captured without their end, translated as far as they go"),
        (report.made, "made by the NAT: fragments, ICMP errors"),
        (report.connections, "connections"),
    )
    lines += [f"{count:>12,} {what}" for count, what in more if count]
    return "\n".join(lines) + "\n"
