"""NatEngine against a model of a few lines, over long random histories of UDP: endpoint-independent mapping,
address-dependent filtering, 300 s of idle time, no port for two (RFC 4787 REQ-1, 3, 5, 8)."""

from __future__ import annotations

from dataclasses import dataclass, field

from guestnet import NatDirection, NatEngine, NatEngineConfig, NatResult
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from unit.packets import check, destination, source, udp

EXTERNAL, LIFE = "203.0.113.1", 300.0
UNSURE = 5.0
"""Seconds around the end of a session in which either answer is right, and nothing is asked: coarse ticks."""
guests = st.tuples(
    st.sampled_from(["192.168.64.2", "192.168.64.3", "192.168.64.4"]), st.sampled_from([4000, 4001, 50001])
)
remotes = st.tuples(st.sampled_from(["198.51.100.1", "198.51.100.2"]), st.sampled_from([80, 443]))
Socket = tuple[str, int]


@dataclass
class Mapping:
    """One internal socket's external port, and when each conversation through it ends."""

    port: int
    sessions: dict[Socket, float] = field(default_factory=dict)

    def ends(self) -> float:
        return max(self.sessions.values())


class Model(RuleBasedStateMachine):
    @initialize(seed=st.binary(min_size=32, max_size=32), preserve=st.booleans())
    def begin(self, seed: bytes, preserve: bool) -> None:
        self.now = 1000.0
        self.engine = NatEngine(
            NatEngineConfig(EXTERNAL, secret=seed, port_preservation=preserve, port_range=(49152, 65535)),
            clock=lambda: 0,
        )
        self.mappings: dict[Socket, Mapping] = {}

    def alive(self, end: float) -> bool:
        return end > self.now

    def unsure(self) -> bool:
        """Whether something may or may not have ended by now; an `assume` would give the whole history up."""
        ends = (end for m in self.mappings.values() for end in m.sessions.values())
        return any(abs(end - self.now) <= UNSURE for end in ends)

    @rule(seconds=st.sampled_from([0.1, 7.0, 60.0, 150.0, 280.0, 320.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        while self.unsure():
            self.now += 2 * UNSURE + 1

    @rule()
    def expire(self) -> None:
        self.engine.expire_connections(now=self.now)

    @rule(guest=guests, remote=remotes, size=st.integers(0, 40))
    def out(self, guest: Socket, remote: Socket, size: int) -> None:
        known = self.mappings.get(guest)
        kept = known is not None and self.alive(known.ends())
        others = {m.port for g, m in self.mappings.items() if g != guest and m.ends() > self.now}
        packet = udp(guest, remote, bytes(size))
        assert self.engine.translate(packet, NatDirection.OUTBOUND, now=self.now) is NatResult.TRANSLATED
        check(packet)
        address, port = source(packet)
        assert (address, destination(packet)) == (EXTERNAL, remote)
        if known is not None and kept:
            assert port == known.port
        else:
            assert 49152 <= port <= 65535
            assert port not in others
            known = self.mappings[guest] = Mapping(port)
        known.sessions[remote] = self.now + LIFE

    @rule(guest=guests, remote=remotes)
    def come(self, guest: Socket, remote: Socket) -> None:
        """A datagram to the external port that a guest has, or had."""
        known = self.mappings.get(guest)
        # The port of one that is gone may be another's by now.
        if known is None or any(m.port == known.port for g, m in self.mappings.items() if g != guest):
            return
        allowed = [end for (host, _), end in known.sessions.items() if host == remote[0]]
        passes = any(map(self.alive, allowed))
        packet = udp(remote, (EXTERNAL, known.port))
        before = bytes(packet)
        result = self.engine.translate(packet, NatDirection.INBOUND, now=self.now)
        if passes:
            assert result is NatResult.TRANSLATED
            check(packet)
            assert (source(packet), destination(packet)) == (remote, guest)
            # Only a conversation of the guest's own lives longer by it (RFC 4787 REQ-6).
            if remote in known.sessions and self.alive(known.sessions[remote]):
                known.sessions[remote] = self.now + LIFE
        else:
            assert not result.send, result
            assert packet == before

    @invariant()
    def books(self) -> None:
        if not hasattr(self, "engine"):
            return
        sure = sum(end > self.now for m in self.mappings.values() for end in m.sessions.values())
        assert self.engine.connection_count >= sure
        stats = self.engine.conntrack()
        assert stats.mappings <= stats.connections


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestModel = Model.TestCase
