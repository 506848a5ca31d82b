"""two_guests.py NS: a network with a steady guest on a TAP device in namespace NS, and another on a socket
that floods when it is told to. Takes words on stdin: burn MAC, flood MAC, quiet, stats."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from guestnet import NatConfig, NatNetwork
from lab.tap import open_tap

FLOOD = str(Path(__file__).with_name("flood.py"))


def start(how: str, fd: int | None, mac: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, FLOOD, str(fd) if how == "flood" else "burn", mac]
    child = subprocess.Popen(command, pass_fds=[fd] if fd is not None else [], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    return child


def main() -> None:
    tap = open_tap(sys.argv[1], "eth0")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with NatNetwork(NatConfig()) as network, contextlib.ExitStack() as stack:
        network.create_endpoint("steady")
        network.create_endpoint("hostile")
        network.attach("steady", "tap", fd=tap)
        network.attach("hostile", "dgram", fd=ours.detach())
        print("ready", flush=True)
        child = None
        for line in sys.stdin:
            word, mac = [*line.split(), ""][:2]
            if child is not None:
                child.kill()
                child.wait()
                child = None
            if word in ("burn", "flood"):
                child = start(word, theirs.fileno(), mac)
                stack.callback(child.kill)
            if word == "stats":
                print(network.stats(), flush=True)
            print(f"done {word}", flush=True)


os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
main()
