"""A guest whose link delays and loses frames, as netem does where the kernel has it.

Each frame takes the same time, and each is lost with the same probability; a seed decides which. A process
carries the frames between the guest's TAP and guestnet, or a TAP of *host* where the kernel forwards.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from lab import tap
from lab.namespaces import Lab, ip
from lab.process import Process

FRAME_MAX = 65536
BURST = 64
"""Frames that are read at once before others are sent on."""


@dataclass
class Way:
    """One direction: from one descriptor to the other, each read and write one frame."""

    source: int
    target: int
    loss: float
    delay: float
    random: random.Random
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    passed: int = 0
    lost: int = 0
    refused: int = 0
    """Frames for which the target had no room; none are to be, or it is not the path that is measured."""

    def take(self, now: float) -> None:
        for _ in range(BURST):
            try:
                frame = os.read(self.source, FRAME_MAX)
            except (BlockingIOError, OSError):
                return
            if not frame:
                return
            if self.random.random() < self.loss:
                self.lost += 1
            else:
                self.waiting.append((now + self.delay, frame))

    def give(self, now: float) -> None:
        while self.waiting and self.waiting[0][0] <= now:
            _, frame = self.waiting.popleft()
            try:
                os.write(self.target, frame)
                self.passed += 1
            except OSError:
                self.refused += 1


def forward(a: int, b: int, *, loss: float, delay: float, seed: int, stop: int) -> tuple[Way, Way]:
    """Carries frames between two descriptors until `stop` is readable; returns what either way saw.
    `delay` is one way, in seconds; `loss` from 0 to 1."""
    chance = random.Random(seed)
    ways = Way(a, b, loss, delay, chance), Way(b, a, loss, delay, chance)
    for fd in (a, b):
        os.set_blocking(fd, False)
    while True:
        now = time.monotonic()
        due = [way.waiting[0][0] for way in ways if way.waiting]
        timeout = max(0.0, min(due) - now) if due else None
        ready: list[int] = []
        with contextlib.suppress(InterruptedError):
            ready, _, _ = select.select([a, b, stop], [], [], timeout)
        if stop in ready:
            return ways
        now = time.monotonic()
        for way in ways:
            if way.source in ready:
                way.take(now)
            way.give(now)


RULES = """
table ip guestnet_lossy {
    chain post { type nat hook postrouting priority 100; oifname "up0" masquerade; }
}
"""
SOCKET_BUFFER = 16 << 20
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
_numbers = itertools.count(1)


@dataclass
class LossyGuest:
    """A guest behind a path of its own, served by `contender`: "guestnet" or "kernel"."""

    contender: str
    ns: str
    path: Process


def forward_in_kernel(lab: Lab) -> None:
    """Lets *host* forward and masquerade for guests of the contender "kernel"."""
    lab.sysctl(lab.host, "net.ipv4.ip_forward", "1")
    done = lab.run(["nft", "-f", "-"], stdin=RULES)
    assert done.returncode == 0, done.stderr


def add_lossy_guest(lab: Lab, contender: str, loss: float, delay: float, seed: int) -> LossyGuest:
    """A guest with its path; `loss` from 0 to 1 and `delay` in seconds are of one way."""
    number = next(_numbers)
    ns = lab.add_namespace(f"{lab.host}-l{number}")
    words = [contender, ns, str(number), str(loss), str(delay), str(seed)]
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    path = lab.start([sys.executable, "-m", "lab.lossy", *words], env=env, ready="^ready$")
    ip("-n", ns, "address", "add", f"10.77.{number}.2/24", "dev", "eth0")
    ip("-n", ns, "link", "set", "eth0", "up")
    ip("-n", ns, "route", "add", "default", "via", f"10.77.{number}.1")
    if contender == "kernel":
        device = f"tap{number}"
        ip("-n", lab.host, "address", "add", f"10.77.{number}.1/24", "dev", device)
        ip("-n", lab.host, "link", "set", device, "up", "txqueuelen", "20000")
    return LossyGuest(contender, ns, path)


def _stop_descriptor() -> int:
    """A descriptor that is readable once SIGTERM came."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    ours, theirs = os.pipe()

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        os.close(theirs)

    threading.Thread(target=wait, daemon=True).start()
    return ours


def _serve(contender: str, ns: str, number: str, loss: float, delay: float, seed: int) -> None:
    """One guest's path, in *host*, until it is ended; prints what passed and what was lost."""
    stop = _stop_descriptor()
    guest = tap.open_tap(ns, "eth0", headers=False)
    if contender == "kernel":
        here = tap.open_tap(Path("/proc/self/ns/net"), f"tap{number}", headers=False)
        print("ready", flush=True)
        ways = forward(guest, here, loss=loss, delay=delay, seed=seed, stop=stop)
    else:
        from guestnet import NatConfig, NatNetwork

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (ours, theirs):
            for option in (SO_RCVBUFFORCE, SO_SNDBUFFORCE):
                end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        with NatNetwork(NatConfig(subnet=f"10.77.{number}.0/24")) as net:
            net.create_endpoint("guest")
            net.attach("guest", "dgram", sock=theirs)
            print("ready", flush=True)
            ways = forward(guest, ours.fileno(), loss=loss, delay=delay, seed=seed, stop=stop)
        print("retransmits", net.stats().retransmits, flush=True)
    for way in ways:
        print("way", way.passed, way.lost, way.refused, flush=True)


if __name__ == "__main__":
    _contender, _ns, _number, _loss, _delay, _seed = sys.argv[1:]
    _serve(_contender, _ns, _number, float(_loss), float(_delay), int(_seed))
