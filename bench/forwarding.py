"""Compares packets that are forwarded through guestnet's uplink tun with packets through nftables masquerade.

    sudo .venv/bin/python bench/forwarding.py [--seconds 3] [--rounds 3] [--json FILE]

There is a guest's namespace and a server's, with *host* between them. Small: UDP datagrams of 64 bytes of
payload, as fast as one sender can send, counted at the receiver. Large: one TCP connection by iperf3, in each
direction. Both alternate, and the medians are printed side by side. Everything runs in its own namespaces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from lab import Lab, need, tap
from lab.kernel import add_kernel_guest
from lab.namespaces import OUT4, ip

PORT = 9200
COUNTER = f"""
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
s.bind(("0.0.0.0", {PORT}))
buffer = bytearray(2048)
print("ready", flush=True)
while True:
    n, first = 0, None
    while True:
        s.settimeout(0.3 if n else None)
        try:
            s.recv_into(buffer)
        except TimeoutError:
            break
        now = time.perf_counter()
        first = first or now
        last = now
        n += 1
    print("count", n, last - first, flush=True)
"""
SENDER = f"""
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect(("{OUT4}", {PORT}))
data = bytes(64)
end = time.perf_counter() + float(sys.argv[1])
n = 0
while time.perf_counter() < end:
    for _ in range(64):
        try:
            s.send(data)
            n += 1
        except OSError:
            pass
print(n)
"""


class Guestnet:
    """A guest on a TAP of a network with the uplink tun, in *host*."""

    def __init__(self, lab: Lab) -> None:
        self.ns = lab.add_namespace(f"{lab.host}-tun")
        command = [sys.executable, __file__, "--network", self.ns]
        self.process = lab.start(command, ready="^ready$")
        ip("-n", self.ns, "address", "add", "192.168.65.2/24", "dev", "eth0")
        ip("-n", self.ns, "link", "set", "eth0", "up")
        ip("-n", self.ns, "route", "add", "default", "via", "192.168.65.1")


def network(ns: str) -> None:
    """Runs the network, in *host*, until it is ended."""
    import signal

    from guestnet import NatConfig, NatNetwork

    config = NatConfig(subnet="192.168.65.0/24", uplink="tun", masquerade=True)
    with NatNetwork(config) as net:
        net.create_endpoint("guest")
        net.attach("guest", "tap", fd=tap.open_tap(ns, "eth0"))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        print("ready", flush=True)
        signal.sigwait({signal.SIGTERM})


def small(lab: Lab, ns: str, counter: object, seconds: float) -> float:
    """Datagrams a second that arrive, in thousands."""
    seen = len(counter.lines)  # type: ignore[attr-defined]
    lab.check([sys.executable, "-c", SENDER, str(seconds)], ns=ns, seconds=seconds + 30)
    found = counter.wait_line(r"^count (\d+) (\S+)$", start=seen)  # type: ignore[attr-defined]
    return int(found[1]) / float(found[2]) / 1000


def large(lab: Lab, ns: str, seconds: float, *flags: str) -> float:
    """Gigabits a second of one connection."""
    command = ["iperf3", "-c", OUT4, "-t", str(seconds), "-J", *flags]
    told = json.loads(lab.check(command, ns=ns, seconds=seconds + 30))
    return float(told["end"]["sum_received"]["bits_per_second"]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.network:
        network(options.network)
        return
    need.root()
    found: dict[str, dict[str, list[float]]] = {}
    with Lab() as lab:
        counter = lab.start([sys.executable, "-c", COUNTER], ns=lab.out, ready="^ready$")
        lab.start([need.program("iperf3"), "-s", "--forceflush"], ns=lab.out, ready="Server listening")
        guests = {"nftables": add_kernel_guest(lab), "guestnet": Guestnet(lab).ns}
        for _ in range(options.rounds):
            for name, ns in guests.items():
                rows = found.setdefault(name, {})
                rows.setdefault("small, thousand packets/s", []).append(
                    small(lab, ns, counter, options.seconds)
                )
                seconds = int(options.seconds) or 1
                rows.setdefault("large out, Gbit/s", []).append(large(lab, ns, seconds))
                rows.setdefault("large in, Gbit/s", []).append(large(lab, ns, seconds, "-R"))
                time.sleep(0.1)  # iperf3 makes ready for the next one
    medians = {name: {row: statistics.median(v) for row, v in rows.items()} for name, rows in found.items()}
    print(f"{'':28}{'guestnet tun':>14}{'nftables':>14}{'ratio':>8}")
    for row, ours in medians["guestnet"].items():
        theirs = medians["nftables"][row]
        print(f"{row:28}{ours:14.2f}{theirs:14.2f}{ours / theirs:8.2f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(medians, indent=2) + "\n", encoding="utf-8")


main()
