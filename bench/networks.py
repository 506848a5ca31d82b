#!/usr/bin/env python3
"""networks.py [--count N]: many networks in one process, each with the same subnet and one guest.

Prints how long they take to start, what each costs in memory, and how many threads serve them. Each guest is
on a stream socket and resolves its gateway, so that every network has carried frames before its memory is
measured. Needs no root.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import struct
import time
from pathlib import Path

from guestnet import NatNetwork
from guestnet.model.ipam import parse_mac

ARP = struct.Struct("!HHBBH6s4s6s4s")
REPLY = 2


def memory() -> dict[str, int]:
    """Resident and proportional memory of this process in kilobytes."""
    fields = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {words[0].rstrip(":"): int(words[1]) for words in fields if words[0] in ("Rss:", "Pss:")}


def entries(directory: str) -> int:
    return len(os.listdir(f"/proc/self/{directory}"))


class Guest:
    """A guest on a stream socket of a network of its own."""

    def __init__(self) -> None:
        self.network = NatNetwork()
        self.network.start()
        endpoint = self.network.create_endpoint("vm1")
        self.mac, self.ip = parse_mac(endpoint.mac), endpoint.ip.packed
        self.sock, theirs = socket.socketpair()
        with theirs:
            self.network.attach("vm1", "stream", sock=theirs)

    def resolve_gateway(self) -> float:
        """Asks for the gateway's MAC; seconds until the answer."""
        gateway = self.network.gateway.packed
        request = ARP.pack(1, 0x0800, 6, 4, 1, self.mac, self.ip, bytes(6), gateway)
        frame = b"\xff" * 6 + self.mac + b"\x08\x06" + request
        start = time.perf_counter()
        self.sock.sendall(struct.pack("!I", len(frame)) + frame)
        self.sock.settimeout(10)
        (size,) = struct.unpack("!I", self._read(4))
        answer = ARP.unpack_from(self._read(size), 14)
        if (answer[4], answer[6], answer[7]) != (REPLY, gateway, self.mac):
            raise RuntimeError(f"the guest of another network answered, or nobody: {answer}")
        return time.perf_counter() - start

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self.sock.recv(size - len(data)) or self._closed()
        return data

    def _closed(self) -> bytes:
        raise RuntimeError("the network closed the connection of its guest")

    def stop(self) -> None:
        self.network.stop()
        self.sock.close()


def main() -> None:
    """Prints a table; with --json, writes the values too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="networks, default 1000")
    parser.add_argument("--json", type=Path, help="write the values to this file")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # What the first network costs (imports, threads) is no cost of each.
    first = Guest()
    first.resolve_gateway()
    before, descriptors = memory(), entries("fd")
    start = time.perf_counter()
    guests = [Guest() for _ in range(options.count)]
    started = time.perf_counter() - start
    times = [guest.resolve_gateway() for guest in guests]
    after = memory()
    values = {
        "start": started,
        "rss": (after["Rss"] - before["Rss"]) / options.count,
        "pss": (after["Pss"] - before["Pss"]) / options.count,
        "threads": entries("task"),
        "descriptors": (entries("fd") - descriptors) / options.count,
        "arp": statistics.median(times) * 1e6,
    }
    start = time.perf_counter()
    for guest in guests:
        guest.stop()
    values["stop"] = time.perf_counter() - start
    first.stop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(f"| {options.count} networks, one guest each | |\n|---|---|")
    for key, about, digits in (
        ("start", "start all, s", 2),
        ("rss", "resident memory of each, KB", 0),
        ("pss", "proportional memory of each, KB", 0),
        ("threads", "threads of the process", 0),
        ("descriptors", "descriptors of each, the guest's own included", 1),
        ("arp", "a guest resolves its gateway, median, us", 0),
        ("stop", "stop all, s", 2),
    ):
        print(f"| {about} | {values[key]:.{digits}f} |")
    if options.json:
        options.json.write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
