"""Who races: each one is a way to run a command in a guest whose only way out is the contender."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import Lab
from lab.kernel import add_kernel_guest
from lab.need import PATH

HERE = Path(__file__).resolve().parent
GUESTNET = str(Path(sys.prefix) / "bin" / "guestnet")


@dataclass(frozen=True)
class Contender:
    """`wrap` makes of a command the one that runs it in the guest, in namespace `ns` (None: host)."""

    name: str
    wrap: Callable[[Sequence[str]], list[str]]
    ns: str | None = None
    process: str | None = None
    """The name of its process, for memory; None where it is the kernel."""


def guestnet(mtu: int) -> Contender:
    return Contender(
        f"guestnet {mtu}",
        lambda command: [GUESTNET, "run", "--quiet", "--mtu", str(mtu), "--", *command],
        process="guestnet",
    )


def pasta(mtu: int) -> Contender:
    # Its default would map the outside's address, the host's gateway, to the host itself.
    options = ["--config-net", "--no-map-gw", "--quiet", "-m", str(mtu)]
    return Contender(f"pasta {mtu}", lambda command: ["pasta", *options, "--", *command], process="pasta")


def slirp4netns(mtu: int) -> Contender:
    script = str(HERE / "slirp.sh")
    return Contender(
        f"slirp4netns {mtu}", lambda command: [script, str(mtu), *command], process="slirp4netns"
    )


def all_present(lab: Lab) -> list[Contender]:
    """Kernel NAT, guestnet, and those of the peers that are installed."""
    found = [Contender("kernel 1500", list, ns=add_kernel_guest(lab)), guestnet(1500), guestnet(65520)]
    if shutil.which("pasta", path=PATH):
        found += [pasta(1500), pasta(65520)]
    if shutil.which("slirp4netns", path=PATH):
        found.append(slirp4netns(65520))
    return found
