"""The world of the demo: a host, an outside and a guest, each in its own namespaces, without any other link.

    guest --TAP-- guestnet --(sockets of the host)-- uplink0 ==veth== outside0

No frame can leave the machine. The process of the demo becomes the host: it moves to a network namespace
whose only neighbour is the outside.
"""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from ipaddress import IPv4Interface

from guestnet._linux import libc, links, mounts
from guestnet._linux.child_process import READY, Held, fork_held
from guestnet._linux.namespace import Guest, Namespace, launch
from guestnet.cli.demo import actions, peer
from guestnet.cli.runner.session import ENDPOINT

# Addresses for documentation (RFC 5737): they cannot be anyone's.
OUTSIDE = IPv4Interface("198.51.100.1/24")
HOST = IPv4Interface("198.51.100.2/24")


@dataclass
class World:
    """The processes that the demo talks to."""

    guest: peer.Peer
    outside: peer.Peer
    namespace: Namespace
    outside_process: Held

    def close(self) -> None:
        """Ends both."""
        self.guest.close()
        self.outside.close()
        self.namespace.kill()
        self.outside_process.kill()


def become_host() -> None:
    """Moves this process to new namespaces as root of them. Raises OSError where the system forbids it."""
    uid, gid = os.geteuid(), os.getegid()
    libc.unshare(libc.CLONE_NEWUSER | libc.CLONE_NEWNET | libc.CLONE_NEWNS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    mounts.make_private()
    links.set_up("lo")
    mounts.NameFiles(mounts.resolv_conf_text(str(OUTSIDE.ip), ())).lay()
    links.write_sysctl("net/ipv4/ping_group_range", "0 0")


def build(interface: links.Interface, nameserver: str, search: tuple[str, ...]) -> World:
    """Makes outside and guest. The guest is held until its network is there; call `namespace.go()` then."""
    outside, process = _outside()
    ours, theirs = socket.socketpair()

    def be_guest() -> int:
        ours.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        return peer.serve(theirs, actions.ACTIONS)

    try:
        namespace = launch(
            Guest(interface, nameserver=nameserver, search=search, hostname=ENDPOINT), be_guest
        )
    except BaseException:
        process.kill()
        raise
    theirs.close()
    return World(peer.Peer(ours), outside, namespace, process)


def _outside() -> tuple[peer.Peer, Held]:
    ours, theirs = socket.socketpair()

    def prepare(control: socket.socket) -> None:
        libc.unshare(libc.CLONE_NEWNET)
        control.send(READY)
        control.recv(1)  # the veth is here now
        links.set_up("lo")
        links.set_address("outside0", OUTSIDE)
        links.set_up("outside0")

    def be_outside() -> int:
        ours.close()
        return peer.serve(theirs, actions.ACTIONS)

    held = fork_held(prepare, be_outside)
    try:
        held.receive()
        links.add_veth("uplink0", "outside0", held.pid)
        links.set_address("uplink0", HOST)
        links.set_up("uplink0")
        held.answer()
        held.go()
    except BaseException:
        held.kill()
        raise
    theirs.close()
    return peer.Peer(ours), held
