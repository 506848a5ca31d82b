"""The workloads: each gives a guest commands and returns numbers, one for each of its rows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import processes
from guests import OUTSIDE, Arena, Failed, Guest


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    id: str
    title: str
    unit: str
    more: bool = True
    """Is more better?"""
    digits: int = 2


@dataclass(frozen=True)
class Setting:
    """How thorough a run is."""

    seconds: float
    full: bool

    @property
    def ms(self) -> str:
        return str(int(self.seconds * 1000))


Measure = Callable[[Arena, Guest, Setting], dict[str, float]]


@dataclass(frozen=True)
class Workload:
    """`measure` gives a number for each row, by the row's id; it may leave rows out."""

    id: str
    rows: Sequence[Row]
    measure: Measure
    machine: bool = True
    """Is it for virtual machines too?"""
    namespace: bool = True
    once: bool = False
    """Too slow or too steady for more than one round."""


def _tcp(way: str, streams: int) -> Workload:
    name = f"tcp-{way}-{streams}"
    many = "1 stream" if streams == 1 else f"{streams} streams"
    rows = [Row(name, f"TCP {way}, {many}", "Gbit/s")]
    if streams == 1:
        rows += [
            Row(f"cpu-{name}", f"CPU of the contender, TCP {way}", "s/GB", more=False),
            Row(f"busy-{name}", f"CPU of the machine, TCP {way}", "s/GB", more=False),
        ]
    else:
        rows.append(Row(f"share-{name}", f"TCP {way}, {many}: slowest of fastest", "share"))

    def measure(_arena: Arena, guest: Guest, setting: Setting) -> dict[str, float]:
        own = guest.own()
        before, busy = processes.cpu_seconds(own), processes.machine_seconds()
        seen = guest.ask(["tcp", way, str(streams), setting.ms, OUTSIDE])
        values = {name: seen["gbits"]}
        if streams != 1:
            return values | {f"share-{name}": seen["least"] / seen["most"] if seen["most"] else 0.0}
        if seen["gigabytes"] > 0:
            values[f"busy-{name}"] = (processes.machine_seconds() - busy) / seen["gigabytes"]
            if own:
                values[f"cpu-{name}"] = (processes.cpu_seconds(own) - before) / seen["gigabytes"]
        return values

    return Workload(name, rows, measure)


def _udp(way: str, size: int, rate: int, *, machine: bool = False) -> Workload:
    """`rate` datagrams a second are offered."""
    offered = size * rate * 8 / 1e9
    name = f"udp-{way}-{size}-{rate // 1000}k"
    what = f"UDP {size} B {way}, {offered:.2g} Gbit/s offered"
    rows = [
        Row(name, f"{what}: received", "Gbit/s", digits=3),
        Row(f"lost-{name}", f"{what}: lost", "%", more=False, digits=1),
    ]
    if size == 64:
        rows.append(Row(f"cpu-{name}", f"CPU of the contender, {what}", "s/million", more=False))

    def measure(_arena: Arena, guest: Guest, setting: Setting) -> dict[str, float]:
        own = guest.own()
        before = processes.cpu_seconds(own)
        seen = guest.ask(["udp", way, str(size), str(rate), setting.ms, OUTSIDE])
        values = {name: seen["gbits"], f"lost-{name}": 100 * seen["lost"]}
        if size == 64 and own and seen["million"] > 0:
            values[f"cpu-{name}"] = (processes.cpu_seconds(own) - before) / seen["million"]
        return values

    return Workload(name, rows, measure, machine=machine)


def _latency(proto: str, busy: bool) -> Workload:
    name = f"rr-{proto}" + ("-busy" if busy else "")
    what = f"{proto.upper()} round trip" + (" beside a download" if busy else "")
    rows = [
        Row(name, f"{what}: median", "us", more=False, digits=0),
        Row(f"p99-{name}", f"{what}: 99th percentile", "us", more=False, digits=0),
    ]

    def measure(_arena: Arena, guest: Guest, setting: Setting) -> dict[str, float]:
        seen = guest.ask(["rr", proto, setting.ms, OUTSIDE, *(["busy"] if busy else [])])
        return {name: seen["median"], f"p99-{name}": seen["p99"]}

    return Workload(name, rows, measure)


def _http(kind: str) -> Workload:
    name = "connections" if kind == "close" else "keep-alive"
    title = "HTTP, a connection for each request" if kind == "close" else "HTTP, keep-alive"

    def measure(_arena: Arena, guest: Guest, setting: Setting) -> dict[str, float]:
        return {name: guest.ask(["http", kind, "32", setting.ms, OUTSIDE])["rate"]}

    return Workload(name, [Row(name, title, "1/s", digits=0)], measure)


def _dns(_arena: Arena, guest: Guest, setting: Setting) -> dict[str, float]:
    return {"dns": guest.ask(["dns", "8", setting.ms, f"{guest.dns}:53"])["rate"]}


def _published(name: str, title: str, unit: str, words: Sequence[str], key: str, digits: int = 2) -> Workload:
    def measure(arena: Arena, guest: Guest, setting: Setting) -> dict[str, float]:
        return {name: arena.outside([*words, setting.ms, guest.published])[key]}

    return Workload(name, [Row(name, title, unit, digits=digits)], measure)


IDLE_WATCH = 1.0
"""Seconds that idle connections are watched for processor time."""


IDLE_SPAN, IDLE_SPAN_FULL = 12, 120
"""Seconds for opening idle connections: slirp4netns takes some 90 for 10,000."""


def _idle(count: int) -> Workload:
    rows = [
        Row("memory", "Memory, one guest", "MB", more=False, digits=1),
        Row("idle-memory", f"Memory with {count} idle connections", "MB", more=False, digits=1),
        Row("idle-each", "Memory for each idle connection", "kB", more=False, digits=2),
        Row("idle-cpu", f"CPU while {count} connections are idle", "ms/s", more=False, digits=1),
        Row("idle-open", f"Opening {count} connections", "s", more=False),
        Row("idle-count", f"Idle connections opened, of {count}", "connections", digits=0),
    ]

    def measure(arena: Arena, guest: Guest, setting: Setting) -> dict[str, float]:
        own = guest.own()
        before = processes.memory_kilobytes(own)
        span = IDLE_SPAN_FULL if setting.full else IDLE_SPAN
        try:
            seen = guest.ask(["idle", str(count), str(span * 1000), OUTSIDE], span + 15)
        except Failed:
            with contextlib.suppress(Failed):
                arena.outside(["forget", OUTSIDE])
            raise
        opened = seen["open"]
        values = {"idle-count": opened}
        # A contender that is slow or has too few descriptors is measured at what it opened; rows that name a
        # number of connections are for those that reached it.
        reached = opened >= 0.99 * count
        if reached:
            values["idle-open"] = seen["seconds"]
        if own:
            own = guest.own()
            cpu = processes.cpu_seconds(own)
            time.sleep(IDLE_WATCH)
            used = (processes.cpu_seconds(own) - cpu) * 1000 / IDLE_WATCH
            after = processes.memory_kilobytes(own)
            values |= {"memory": before / 1024, "idle-each": (after - before) / opened}
            if reached:
                values |= {"idle-memory": after / 1024, "idle-cpu": used}
        # The outside lets go first, so that ends linger there and not at the contender; then the guest.
        arena.outside(["forget", OUTSIDE])
        try:
            guest.ask(["forget", OUTSIDE])
        except Failed:
            guest.worn = True
        return values

    return Workload("idle", rows, measure, machine=False, once=True)


def all_workloads(full: bool) -> list[Workload]:
    """Every workload, in the order of the table. The full run offers UDP at a quarter of the rate too."""
    loads = [(64, 200_000), (1400, 200_000), (8000, 50_000)]
    if full:
        loads += [(size, rate // 4) for size, rate in loads]
    return [
        *(_tcp(way, streams) for streams in (1, 4) for way in ("up", "down")),
        *(_udp(way, size, rate) for size, rate in sorted(loads) for way in ("up", "down")),
        *(_latency(proto, busy) for busy in (False, True) for proto in ("tcp", "udp")),
        _http("close"),
        _http("keep"),
        Workload("dns", [Row("dns", "DNS queries", "1/s", digits=0)], _dns),
        _published(
            "published-in", "Published port, TCP into the guest", "Gbit/s", ["tcp", "up", "1"], "gbits"
        ),
        _published(
            "published-out", "Published port, TCP out of the guest", "Gbit/s", ["tcp", "down", "1"], "gbits"
        ),
        _published(
            "published-connections",
            "Published port, a connection for each request",
            "1/s",
            ["http", "close", "32"],
            "rate",
            digits=0,
        ),
        _idle(10_000),
    ]
