#!/usr/bin/env python3
"""polling.py [--rounds N] [--seconds S]: compares the three polling strategies, and one worker with two.

Guests are namespaces with a TAP, and the outside is another namespace. All share the processors of this
machine. Rounds alternate; a cell is the median with [lowest highest]. It needs root and iperf3.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from lab import Lab  # noqa: E402 - the path above makes it importable
from lab.namespaces import OUT4, sweep  # noqa: E402
from lab.taps import TapNetwork, address  # noqa: E402

ECHO = """
import socket
with socket.create_server(("0.0.0.0", 9100)) as server:
    print("ready", flush=True)
    while True:
        client, _ = server.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client:
            while data := client.recv(100):
                client.sendall(data)
"""
LATENCY = """
import socket, statistics, sys, time
times = []
with socket.create_connection((sys.argv[1], 9100), timeout=10) as s:
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(3000):
        start = time.perf_counter_ns()
        s.sendall(b"x")
        s.recv(1)
        times.append(time.perf_counter_ns() - start)
print(statistics.median(times) / 1000)
"""
STRATEGIES = ("busy", "adaptive", "event_driven")
Cells = defaultdict[tuple[str, str], list[float]]


def processor_seconds(pid: int) -> float:
    """What a process has used of the processors."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def gbits(out: str) -> float:
    return float(json.loads(out)["end"]["sum_received"]["bits_per_second"]) / 1e9


def iperf3(lab: Lab, ns: str, port: int, seconds: int, *words: str, to: str = OUT4) -> float:
    command = ["iperf3", "-J", "-c", to, "-p", str(port), "-t", str(seconds), *words]
    return gbits(lab.check(command, ns=ns, seconds=seconds + 30))


def strategy(lab: Lab, name: str, seconds: int, cells: Cells) -> None:
    with TapNetwork(lab, "p", 1, polling=name) as network:
        (ns,), pid = network.ns, network.process.pid
        start, at = processor_seconds(pid), time.monotonic()
        time.sleep(seconds)
        idle = (processor_seconds(pid) - start) / (time.monotonic() - at)
        cells[name, "processor, idle, %"].append(idle * 100)
        latency = [sys.executable, "-c", LATENCY, OUT4]
        start, at = processor_seconds(pid), time.monotonic()
        cells[name, "latency, µs"].append(float(lab.check(latency, ns=ns)))
        used = (processor_seconds(pid) - start) / (time.monotonic() - at)
        cells[name, "processor meanwhile, %"].append(used * 100)
        for way, words in (("up", ()), ("down", ("-R",))):
            start = processor_seconds(pid)
            rate = iperf3(lab, ns, 5201, seconds, *words)
            used = processor_seconds(pid) - start
            cells[name, f"TCP {way}, Gbit/s"].append(rate)
            cells[name, f"processor s/GB {way}"].append(used / (rate / 8 * seconds))


def at_once(lab: Lab, network: TapNetwork, seconds: int, *words: str) -> float:
    """Gbit/s of two guests together, each with a server of its own."""
    running = []
    for port, ns in zip((5201, 5202), network.ns, strict=True):
        command = lab.command(
            ["iperf3", "-J", "-c", OUT4, "-p", str(port), "-t", str(seconds), *words], ns=ns
        )
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    return sum(gbits(process.communicate(timeout=seconds + 30)[0]) for process in running)


def workers(lab: Lab, count: int, seconds: int, cells: Cells) -> None:
    name = f"{count} worker{'s' * (count > 1)}"
    with TapNetwork(lab, "k", 2, workers=count) as network:
        cells[name, "two guests up, Gbit/s"].append(at_once(lab, network, seconds))
        cells[name, "two guests down, Gbit/s"].append(at_once(lab, network, seconds, "-R"))
        server = lab.start(["iperf3", "-s", "--forceflush"], ns=network.ns[1], ready="Server listening")
        rate = iperf3(lab, network.ns[0], 5201, seconds, to=address(1))
        cells[name, "guest to guest, Gbit/s"].append(rate)
        server.stop()
        ping = lab.check(["ping", "-q", "-c", "300", "-i", "0.005", address(1)], ns=network.ns[0])
        cells[name, "ping guest to guest, µs"].append(float(ping.rpartition("= ")[2].split("/")[1]) * 1000)


def table(cells: Cells) -> str:
    columns = list(dict.fromkeys(name for name, _ in cells))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in dict.fromkeys(what for _, what in cells):
        texts = []
        for column in columns:
            values = cells[column, row]
            texts.append(f"{statistics.median(values):.3g} [{min(values):.3g} {max(values):.3g}]")
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    options = parser.parse_args()
    strategies, counts = Cells(list), Cells(list)
    sweep()
    with Lab() as lab:
        lab.start([sys.executable, "-c", ECHO], ns=lab.out, ready="^ready$")
        for port in (5201, 5202):
            command = ["iperf3", "-s", "-p", str(port), "--forceflush"]
            lab.start(command, ns=lab.out, ready="Server listening")
        for _ in range(options.rounds):
            for name in STRATEGIES:
                strategy(lab, name, options.seconds, strategies)
            for count in (1, 2):
                workers(lab, count, options.seconds, counts)
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} processors, load {load:.1f}, {options.rounds} rounds of {options.seconds} s\n")
    print(table(strategies), table(counts), sep="\n\n")


main()
