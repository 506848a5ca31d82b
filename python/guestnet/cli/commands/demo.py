"""`guestnet demo`: a network and a guest, and what happens between them, step by step."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from guestnet.cli import EXIT_OK, EXIT_PROBLEM, UsageError, arguments
from guestnet.cli.report import stats_rows
from guestnet.cli.runner.session import ENDPOINT

if TYPE_CHECKING:
    from rich.console import Console

    from guestnet.cli.demo.guests import DemoGuest
    from guestnet.runtime.network import NatNetwork

_ABOUT = """\
Starts a network and a guest in namespaces of their own, so that nothing leaves the machine, and shows what
happens: a lease, a name, a page through NAT, a published port, throughput both ways, the counters. Exits
with 1 when a step failed."""
_EXAMPLE = """\
  guestnet demo
  guestnet demo --seconds 5 --no-namespace"""
NAME = "web.example"
GUEST_PORT = 80
HOST_PORT = 8080


def parser() -> arguments.Parser:
    """The options of `guestnet demo`."""
    made = arguments.Parser("demo", "[OPTIONS]", _ABOUT, _EXAMPLE)
    made.add_argument(
        "--seconds",
        type=arguments.checked(_seconds),
        default=2.0,
        metavar="SECONDS",
        help="how long to measure each way (0.1 to 60, default 2)",
    )
    made.add_argument(
        "--no-namespace", action="store_true", help="an in-memory guest even where namespaces can be made"
    )
    return made


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 60:
        raise UsageError(f"--seconds {text!r} is not between 0.1 and 60: write 2.")
    return seconds


class Steps:
    """Runs steps, shows each, and remembers whether all of them succeeded."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.failed = 0

    def run(self, title: str, step: Callable[[], str]) -> bool:
        """Runs one step and shows its result, or why it failed."""
        start = time.monotonic()
        try:
            with (
                self._console.status(f"{title} ...")
                if self._console.is_terminal
                else contextlib.nullcontext()
            ):
                told = step()
        except Exception as error:
            self.failed += 1
            self._show("[bold red]failed[/]", title, str(error) or type(error).__name__, start)
            return False
        self._show("[bold green]ok[/]    ", title, told, start)
        return True

    def _show(self, mark: str, title: str, told: str, start: float) -> None:
        from rich.markup import escape

        spent = (time.monotonic() - start) * 1000
        text = f"{mark} [bold]{title:<18}[/] {escape(told)} [dim]({spent:.0f} ms)[/]"
        self._console.print(text, highlight=False, soft_wrap=True)


def main(argv: Sequence[str]) -> int:
    """Runs the command line after `guestnet demo`; returns the exit status."""
    options = parser().parse_args(argv)
    from guestnet.cli.demo import guests

    # The guest comes first: it forks, and nothing may have started a thread by then.
    guest = guests.make(in_memory=options.no_namespace)
    if sys.platform.startswith("linux"):
        from guestnet._linux import confinement

        confinement.begin(kept=[confinement.CAP_NET_RAW])
    try:
        return _show(guest, options.seconds)
    finally:
        guest.close()


def _show(guest: DemoGuest, seconds: float) -> int:
    from rich.console import Console
    from rich.panel import Panel

    from guestnet.model.spec import NatConfig
    from guestnet.runtime.network import NatNetwork

    console = Console(file=sys.stdout)
    console.print(Panel.fit(guest.picture, title="guestnet demo", border_style="cyan"))
    steps = Steps(console)
    network = NatNetwork(NatConfig(**guest.settings))
    with network:
        _steps(steps, network, guest, seconds)
        rows = stats_rows(network.stats())
    _table(console, rows)
    if steps.failed:
        console.print(
            f"[bold red]{steps.failed} of the steps failed[/]: `guestnet doctor` shows what lacks here."
        )
        return EXIT_PROBLEM
    console.print(
        "[bold green]All steps went well.[/] Next: [bold]guestnet run -- COMMAND[/]", highlight=False
    )
    return EXIT_OK


def _steps(steps: Steps, network: NatNetwork, guest: DemoGuest, seconds: float) -> None:
    def attach() -> str:
        endpoint = network.create_endpoint(ENDPOINT, mac=guest.mac)
        guest.attach(network)
        return f"{endpoint.id} with MAC {guest.mac}, gateway {network.gateway}"

    def publish() -> str:
        from guestnet.errors import PortInUse

        try:
            forward = network.publish(f"{guest.publish_on}:{HOST_PORT}:{GUEST_PORT}")
        except PortInUse:  # by somebody else's server; the kernel knows a free one
            forward = network.publish(f"{guest.publish_on}:0:{GUEST_PORT}")
        guest.serve(GUEST_PORT, "Hello from the guest")
        answer = guest.fetch_from_outside(forward.host_port)
        return f"outside asked for {guest.publish_on}:{forward.host_port}, the guest said: {answer}"

    if not steps.run("guest attached", attach):
        return
    if not steps.run("lease by DHCP", guest.lease):
        return  # without an address nothing else can work
    steps.run("name resolved", lambda: guest.resolve(NAME))
    steps.run("own name resolved", lambda: guest.resolve(f"{ENDPOINT}.guestnet.internal"))
    steps.run("page through NAT", lambda: guest.fetch(NAME))
    steps.run("published port", publish)
    steps.run("throughput up", lambda: guest.transfer("up", seconds))
    steps.run("throughput down", lambda: guest.transfer("down", seconds))


def _table(console: Console, rows: list[tuple[str, str]]) -> None:
    from rich.table import Table

    table = Table(title="What the network counted", show_header=False, border_style="dim")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
