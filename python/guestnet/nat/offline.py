"""Translates a capture with the NAT engine, at the times of the capture."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import BinaryIO

from guestnet.nat.capture_file import CaptureFile, Chunk, Packet, ip_offset
from guestnet.nat.engine import NatDirection, NatEngine, NatEngineConfig, NatResult

_STEP = 50_000_000
"""Nanoseconds that packets of one call may lie apart: far below every timeout."""
_KEPT = (0, 2)
"""Codes of results whose packet goes on: translated, and none of the engine's business."""


@dataclass
class Report:
    """What was done with the packets."""

    packets: int = 0
    bytes: int = 0
    results: Counter[NatResult] = field(default_factory=Counter)
    not_ip: int = 0
    """No IPv4: copied as it was."""
    not_ours: int = 0
    """Neither from inside nor to an external address: copied as it was."""
    cut: int = 0
    """Captured without their end: translated as far as they are there."""
    made: int = 0
    """Packets of the engine's own: fragments, ICMP errors."""
    written: int = 0
    connections: int = 0

    def as_dict(self) -> dict[str, object]:
        """The report for JSON."""
        kinds: Counter[str] = Counter()
        dropped: dict[str, int] = {}
        for result, count in self.results.items():
            if result.reason is not None:
                dropped[result.reason] = count
            else:
                kinds[result.kind] += count
        own = {name: value for name, value in vars(self).items() if name != "results"}
        return {**own, **kinds, "dropped": dict(sorted(dropped.items()))}


class Offline:
    """Translates captures.

    In a capture of the inside, packets from inside are translated outbound, and packets to an external
    address inbound. In a capture of the outside (`reverse`), packets to an external address are translated
    inbound. Other packets are copied unchanged, and packets that the engine drops are left out.
    """

    def __init__(self, config: NatEngineConfig, *, reverse: bool = False, keep_others: bool = True) -> None:
        self._now = 0
        self.engine = NatEngine(config, clock=lambda: self._now)
        self._reverse = reverse
        self._keep_others = keep_others
        network = IPv4Network(config.internal)
        self._net = int(network.network_address)
        self._mask = int(network.netmask)
        assert isinstance(config.external, tuple)
        self._external = {IPv4Address(a).packed for a in config.external}
        self._start: int | None = None
        self.report = Report()

    def run(
        self,
        source: CaptureFile,
        target: BinaryIO,
        *,
        inside: CaptureFile | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Report:
        """Translates `source` to `target`.

        `inside` is a capture of the inside. Its packets are translated at their times too, and not written:
        they open the connections of which `source` has the other side. `progress` is called with the number
        of bytes read so far.
        """
        lessons = None if inside is None else _Lessons(self, inside)
        for chunk in source.chunks():
            self._write(chunk, self._translate(chunk, source, lessons), target)
            if progress is not None:
                progress(source.taken)
        self.report.connections = self.engine.conntrack().created
        return self.report

    # ---- translating ------------------------------------------------------------------------------------

    def direction(self, data: bytearray, ip: int) -> NatDirection | None:
        """Which way the packet at `ip` travels; None: it is not one for the engine."""
        if not self._reverse and int.from_bytes(data[ip + 12 : ip + 16], "big") & self._mask == self._net:
            return NatDirection.OUTBOUND
        if bytes(data[ip + 16 : ip + 20]) in self._external:
            return NatDirection.INBOUND
        return None

    def at(self, time: int) -> float:
        """The engine's time, in seconds, for that of a capture; it never goes back."""
        if self._start is None:
            self._start = time
        self._now = max(self._now, time - self._start)
        return self._now / 1e9

    def _translate(self, chunk: Chunk, source: CaptureFile, lessons: _Lessons | None) -> _Changes:
        data, report, changes = chunk.data, self.report, _Changes()
        batch = _Batch(self, chunk, source, changes)
        for number, packet in enumerate(chunk.packets):
            _, _, at, length, time, link, _ = packet
            offset = ip_offset(data, at, length, link)
            way = None if offset < 0 else self.direction(data, at + offset)
            if way is None:
                if offset < 0:
                    report.not_ip += 1
                else:
                    report.not_ours += 1
                if not self._keep_others:
                    changes.left_out.add(number)
                continue
            if lessons is not None and lessons.due(time):
                batch.flush()
                lessons.learn(time)
            batch.add(number, packet, offset, way)
        batch.flush()
        report.packets += len(chunk.packets)
        report.bytes += chunk.used
        return changes

    def translate_cut(self, data: bytearray, ip: int, there: int, way: NatDirection, now: float) -> NatResult:
        """A packet of which only the first bytes were captured: the rest does not matter to its headers."""
        whole = bytearray(int.from_bytes(data[ip + 2 : ip + 4], "big"))
        whole[:there] = data[ip : ip + there]
        result = self.engine.translate(whole, way, now=now)
        if result.send:
            data[ip : ip + there] = whole[:there]
        self.report.cut += 1
        return result

    def made(self) -> Iterator[bytes]:
        """What the engine itself sends to the side that is written."""
        wanted = NatDirection.INBOUND if self._reverse else NatDirection.OUTBOUND
        for way, packet in self.engine.output():
            if way is wanted:
                yield packet

    # ---- writing ----------------------------------------------------------------------------------------

    def _write(self, chunk: Chunk, changes: _Changes, target: BinaryIO) -> None:
        self.report.written += len(chunk.packets) - len(changes.left_out) + changes.count
        with memoryview(chunk.data) as view:
            at = 0
            for number in sorted(changes.left_out | changes.added.keys()):
                packet = chunk.packets[number]
                target.write(view[at : packet.start if number in changes.left_out else packet.end])
                for record in changes.added.get(number, ()):
                    target.write(record)
                at = packet.end
            target.write(view[at : chunk.used])


@dataclass
class _Changes:
    """What a chunk is written without, and with more."""

    left_out: set[int] = field(default_factory=set)
    added: dict[int, list[bytes]] = field(default_factory=dict)
    """Records that come after a packet."""

    @property
    def count(self) -> int:
        return sum(map(len, self.added.values()))


class _Batch:
    """Packets of one direction and about one time."""

    def __init__(self, owner: Offline, chunk: Chunk, source: CaptureFile, changes: _Changes) -> None:
        self._owner, self._chunk, self._source, self._changes = owner, chunk, source, changes
        self._offsets, self._lengths, self._numbers = array("I"), array("I"), array("I")
        self._way = NatDirection.OUTBOUND
        self._first = 0
        self._last = (0, 0)

    def add(self, number: int, packet: Packet, offset: int, way: NatDirection) -> None:
        ip, there, time = packet.at + offset, packet.length - offset, packet.time
        if not self._numbers:
            self._way, self._first = way, time
        elif way is not self._way or not 0 <= time - self._first < _STEP:
            self.flush()
            self._way, self._first = way, time
        data = self._chunk.data
        if data[ip + 2] << 8 | data[ip + 3] > there:
            self.flush()
            result = self._owner.translate_cut(data, ip, there, way, self._owner.at(time))
            self._owner.report.results[result] += 1
            if result not in (NatResult.TRANSLATED, NatResult.PASS_THROUGH):
                self._changes.left_out.add(number)
            self._collect(number, offset)
            return
        self._offsets.append(ip)
        self._lengths.append(there)
        self._numbers.append(number)
        self._last = (number, offset)

    def flush(self) -> None:
        if not self._numbers:
            return
        owner = self._owner
        results = owner.engine.translate_batch(
            self._chunk.data,
            self._way,
            offsets=self._offsets,
            lengths=self._lengths,
            now=owner.at(self._first),
        )
        codes = results.codes
        if codes.count(0) == len(codes):
            owner.report.results[NatResult.TRANSLATED] += len(codes)
        else:
            owner.report.results.update(results.counts())
            out = (n for n, code in zip(self._numbers, codes, strict=True) if code not in _KEPT)
            self._changes.left_out.update(out)
        self._collect(*self._last)
        del self._offsets[:], self._lengths[:], self._numbers[:]

    def _collect(self, number: int, offset: int) -> None:
        """What the engine sends goes behind the last packet, with that one's link header."""
        packet = self._chunk.packets[number]
        for made in self._owner.made():
            link = bytes(self._chunk.data[packet.at : packet.at + offset])
            record = self._source.record(link + made, packet)
            self._changes.added.setdefault(number, []).append(record)
            self._owner.report.made += 1


class _Lessons:
    """A capture of the inside, translated outbound for the connections that it opens."""

    def __init__(self, owner: Offline, capture: CaptureFile) -> None:
        self._owner = owner
        self._chunks = capture.chunks()
        self._chunk = Chunk(bytearray(), 0, [])
        self._next = 0
        self._more()

    def _more(self) -> None:
        while self._next >= len(self._chunk.packets):
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            self._chunk, self._next = chunk, 0

    def due(self, time: int) -> bool:
        """Whether there are packets of up to that time."""
        packets = self._chunk.packets
        return self._next < len(packets) and packets[self._next].time <= time

    def learn(self, time: int) -> None:
        """Translates those."""
        while self.due(time):
            packets = self._chunk.packets
            end = bisect_right(packets, time, self._next, key=lambda p: p.time)
            data, owner = self._chunk.data, self._owner
            for packet in packets[self._next : max(end, self._next + 1)]:
                offset = ip_offset(data, packet.at, packet.length, packet.link)
                if offset < 0:
                    continue
                ip, there = packet.at + offset, packet.length - offset
                if data[ip + 2] << 8 | data[ip + 3] > there:
                    owner.translate_cut(data, ip, there, NatDirection.OUTBOUND, owner.at(packet.time))
                    continue
                with memoryview(data) as view:
                    owner.engine.translate(
                        view[ip : ip + there], NatDirection.OUTBOUND, now=owner.at(packet.time)
                    )
            for _ in owner.engine.output():
                pass
            self._next = max(end, self._next + 1)
            self._more()
