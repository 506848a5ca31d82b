#!/usr/bin/env python3
"""Measures how much of the NAT engine's rate a Python program gets from `translate_batch`.

Each call has 10,000 packets. The packets and their 10,000 flows are those of `make bench-engine`. Rust and
Python translate them in alternating rounds, and the best round of each counts. The rows are added to the JSON
of `make bench-engine`.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import subprocess
import tempfile
import time
from array import array
from ipaddress import IPv4Address
from pathlib import Path

from guestnet import NatDirection, NatEngine, NatEngineConfig, PacketPool

FLOWS = COUNT = 10_000
ETH, LENGTH, STRIDE = 14, 50, 64


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(i: int) -> bytes:
    """The IP packet of a 64-byte frame of flow `i`, as benches/engine makes it."""
    guest = 2 + i // 2000
    port = 1024 + (i % 2000 * 40_503 + guest * 9973) % 64_512
    source = (0x0A000000 | guest).to_bytes(4, "big")
    target = (0xC6330000 | (i * 2_654_435_761 & 0xFFFFFFFF) >> 20).to_bytes(4, "big")
    udp = struct.pack("!HHHH", port, 4433, LENGTH - 20, 0) + bytes(LENGTH - 28)
    whole = checksum(source + target + struct.pack("!BBH", 0, 17, len(udp)) + udp) or 0xFFFF
    udp = udp[:6] + struct.pack("!H", whole) + udp[8:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, LENGTH, 7, 0x4000, 64, 17, 0) + source + target
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + udp


class Batch:
    """An engine that knows all flows, and a way to hand it 10,000 packets."""

    def __init__(self) -> None:
        external = [IPv4Address("203.0.113.1") + i for i in range(32)]
        config = NatEngineConfig(
            external=external,
            internal="10.0.0.0/8",
            port_range=(1024, 65535),
            table_size=FLOWS,
            prefault=True,
        )
        self.engine = NatEngine(config, clock=lambda: 0)
        self.packets = [packet(i) for i in range(FLOWS)]
        self.engine.translate_batch([bytearray(p) for p in self.packets], NatDirection.OUTBOUND, now=1)
        rng = random.Random(1)
        self.order = [rng.randrange(FLOWS) for _ in range(COUNT)]

    def restore(self) -> None: ...
    def call(self) -> bytes: ...

    def round(self) -> float:
        """Millions of packets a second."""
        self.restore()
        began = time.perf_counter()
        codes = self.call()
        took = time.perf_counter() - began
        assert codes == bytes(COUNT), "not everything was translated"
        return COUNT / took / 1e6


class Spans(Batch):
    """One buffer with offsets."""

    def __init__(self) -> None:
        super().__init__()
        laid = (bytes(ETH) + self.packets[i] for i in self.order)
        self.master = b"".join(p.ljust(STRIDE, b"\0") for p in laid)
        self.buffer = bytearray(self.master)
        self.offsets = array("I", range(ETH, COUNT * STRIDE, STRIDE))
        self.lengths = array("I", [LENGTH] * COUNT)

    def restore(self) -> None:
        self.buffer[:] = self.master

    def call(self) -> bytes:
        return self.engine.translate_batch(
            self.buffer, NatDirection.OUTBOUND, offsets=self.offsets, lengths=self.lengths, now=3
        ).codes


class Pool(Batch):
    """Buffers of a pool, by index."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PacketPool(COUNT)
        self.indices = array("I", (self.pool.put(self.packets[i]) for i in self.order))

    def restore(self) -> None:
        for index, i in zip(self.indices, self.order, strict=True):
            self.pool.set(index, self.packets[i])

    def call(self) -> bytes:
        return self.engine.translate_batch(
            self.pool, NatDirection.OUTBOUND, indices=self.indices, now=3
        ).codes


class Each(Batch):
    """A list of bytearrays."""

    def restore(self) -> None:
        self.buffers = [bytearray(self.packets[i]) for i in self.order]

    def call(self) -> bytes:
        return self.engine.translate_batch(self.buffers, NatDirection.OUTBOUND, now=3).codes


def rust(binary: str) -> float:
    """The engine's own figure, by the race."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([binary, file.name, "udp64_10k"], check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(Path(file.name).read_text())
    return next(float(row["guestnet"]) for row in rows if row["name"] == "hit_udp64_10k_flows")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rust", required=True, help="the race's program")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ways = {"spans": Spans(), "pool": Pool(), "list": Each()}
    best = dict.fromkeys(ways, 0.0)
    engine = 0.0
    for _ in range(options.rounds):
        engine = max(engine, rust(options.rust))
        for name, way in ways.items():
            best[name] = max(best[name], *(way.round() for _ in range(100)))
    print(f"{'translate_batch of 10,000 packets':34} {engine:8.2f} Mpps in Rust")
    rows = []
    for name, rate in best.items():
        print(f"  from Python, {name:20} {rate:8.2f} Mpps, Rust is {engine / rate:.2f} times as fast")
        rows.append(
            {"name": f"python_batch_{name}", "guestnet": round(rate, 3), "arcbox": None, "unit": "Mpps"}
        )
    if options.json is not None:
        known = json.loads(options.json.read_text()) if options.json.exists() else []
        options.json.write_text(json.dumps(known + rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
