"""Which capabilities a command needs, by its options. The rest is dropped (`guestnet._linux.confinement`)."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guestnet._linux.in_force import InForce
    from guestnet.runtime.network import NatNetwork


def begin(
    options: argparse.Namespace, *, paths: Iterable[str] = (), by_path: bool = False, kept: Iterable[int] = ()
) -> None:
    """Confines the process: see `confinement.begin`. `paths` are of files that are removed at the end,
    `by_path` says that guests are answered by the path of their sockets, `kept` is what is needed besides."""
    if not sys.platform.startswith("linux"):
        return
    from guestnet._linux import confinement as c

    start: set[int] = set()
    keep = set(kept)
    if options.uplink == "tun":
        # Rules and the switch for forwarding are taken back at the end.
        (keep if options.masquerade or options.forwarding else start).add(c.CAP_NET_ADMIN)
    if options.bridge is not None:
        start |= {c.CAP_NET_ADMIN, c.CAP_NET_RAW}
    if _low(port for one in options.publish for port in one.host_ports):
        start.add(c.CAP_NET_BIND_SERVICE)
    if options.pcp is not None and _low([options.pcp[1]]):
        keep.add(c.CAP_NET_BIND_SERVICE)
    if not _may_ping():
        start.add(c.CAP_NET_RAW)  # the packet threads' own, which they keep
    if by_path or _are_others(paths):
        keep.add(c.CAP_DAC_OVERRIDE)
    elif options.pcap not in (None, "-") and _are_others([options.pcap]):
        start.add(c.CAP_DAC_OVERRIDE)
    if c.CAP_DAC_OVERRIDE not in keep and os.geteuid() == 0:
        # What guests may need later is imported while root can read every file.
        import_module("guestnet.services.dhcp")
    c.begin(start, keep)


def settle(network: NatNetwork) -> None:
    """Drops what only the start needed, when everything is open."""
    if not sys.platform.startswith("linux"):
        return
    from guestnet._linux import confinement

    confinement.settle_thread()
    network.runtime.call_in_threads(confinement.settle_thread)


def in_force() -> InForce | None:
    """What is in force for this process."""
    if not sys.platform.startswith("linux"):
        return None
    from guestnet._linux import in_force

    return in_force.in_force()


def settle_thread() -> None:
    """Drops in the calling thread what only the start needed."""
    if sys.platform.startswith("linux"):
        from guestnet._linux import confinement

        confinement.settle_thread()


def _low(ports: Iterable[int]) -> bool:
    """Whether the ports include one that needs a capability."""
    from guestnet._linux.links import read_sysctl

    first = int(read_sysctl("net/ipv4/ip_unprivileged_port_start") or 1024)
    return any(0 < port < first for port in ports)


def _may_ping() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except OSError:
        return False
    return True


def _are_others(paths: Iterable[str]) -> bool:
    """Whether a file is in, or below, a directory of a user other than this one and root."""
    us = (0, os.geteuid())
    for path in paths:
        parent = os.path.realpath(path)
        while parent != "/":
            parent = os.path.dirname(parent)
            try:
                if os.stat(parent).st_uid not in us:
                    return True
            except OSError:
                return True
    return False
