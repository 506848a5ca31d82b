"""Every name of the document that the project began with, used as its own tests use them."""

from __future__ import annotations

from ipaddress import IPv4Address

import guestnet
import pytest
from guestnet import (
    Datapath,
    DatapathPoller,
    DatapathStats,
    EndpointExists,
    EndpointNotFound,
    IpAllocator,
    NatDirection,
    NatEngine,
    NatEngineConfig,
    NatNetwork,
    NatResult,
    NetMode,
    PacketPool,
    PollingStrategy,
    Ring,
    generate_mac,
)
from unit.packets import check, destination, ethernet, source, tcp, udp

GUEST, OUTSIDE = ("192.168.64.2", 50000), ("198.51.100.7", 80)


def datapath() -> Datapath:
    return Datapath(NatEngineConfig("203.0.113.1", secret=bytes(32)))


def test_nat_network_creation() -> None:
    network = NatNetwork.with_defaults()
    assert not network.is_running
    assert network.endpoint_count == 0
    assert network.gateway == IPv4Address("192.168.64.1")


def test_endpoint_lifecycle() -> None:
    network = NatNetwork.with_defaults()
    endpoint = network.create_endpoint("vm1")
    assert endpoint.ip is not None
    assert endpoint.mode == NetMode.NAT
    assert network.endpoint_count == 1
    network.create_endpoint("vm2")
    assert network.endpoint_count == 2
    assert {e.id for e in network.endpoints} == {"vm1", "vm2"}
    with pytest.raises(EndpointExists):
        network.create_endpoint("vm1")
    network.remove_endpoint("vm1")
    assert network.endpoint_count == 1
    assert network.get_endpoint("vm1") is None
    with pytest.raises(EndpointNotFound):
        network.remove_endpoint("vm1")


def test_poller_creation() -> None:
    poller = DatapathPoller().with_batch_size(32).with_strategy(PollingStrategy.BUSY)
    assert (poller.batch_size, poller.strategy, poller.max_spins) == (32, PollingStrategy.BUSY, 1000)
    assert DatapathPoller().batch_size == 64
    assert DatapathPoller().strategy == PollingStrategy.ADAPTIVE
    with pytest.raises(guestnet.ConfigError, match="batch size 0"):
        DatapathPoller(0)


def test_engine_config_builder() -> None:
    config = NatEngineConfig("10.0.0.1", internal="192.168.64.0/24")
    assert config.port_range == (49152, 65535)
    config = config.with_port_range(10000, 20000).with_timeout(600)
    assert config.port_range == (10000, 20000)
    assert config.timeouts["udp"] == 600


def test_frames_on_the_tx_ring_come_out_translated_at_the_uplink_and_answers_arrive_on_the_rx_ring() -> None:
    network = datapath()
    index = network.packet_pool.put(ethernet(udp(GUEST, OUTSIDE)))
    assert index is not None
    assert network.tx_ring.enqueue(index)
    poller = DatapathPoller()
    assert poller.poll_once(network)
    assert network.packet_pool.available == network.packet_pool.capacity
    [out] = network.uplink.sent
    check(out)
    assert source(out) == ("203.0.113.1", 50000)

    network.uplink.deliver(udp(OUTSIDE, source(out), b"answer"))
    assert poller.poll_once(network)
    index = network.rx_ring.dequeue()
    assert index is not None
    frame = network.packet_pool.get(index)
    network.packet_pool.free(index)
    assert frame[:6] == b"\x02guest"
    check(frame[14:])
    assert destination(frame[14:]) == GUEST
    assert not poller.poll_once(network)
    stats = network.stats()
    assert (stats.tx_packets, stats.rx_packets, stats.nat_outbound, stats.nat_inbound) == (1, 1, 1, 1)
    assert (stats.polls, stats.busy_polls) == (3, 2)
    assert network.connection_count == 1
    assert network.nat_stats().outbound == 1
    assert network.conntrack_stats().connections == 1


def test_a_batch_over_64_works() -> None:
    network = datapath()
    for port in range(200):
        index = network.packet_pool.put(ethernet(udp((GUEST[0], 50000 + port), OUTSIDE)))
        assert index is not None
        network.tx_ring.enqueue(index)
    assert DatapathPoller(batch_size=200).poll_once(network)
    assert len(network.uplink.sent) == 200
    assert len({source(p) for p in network.uplink.sent}) == 200
    assert network.stats().largest_batch == 200


def test_process_packets_in_place() -> None:
    network = datapath()
    frame = bytearray(ethernet(tcp(GUEST, OUTSIDE)))
    assert network.process_tx_packet(frame) is NatResult.TRANSLATED
    check(frame[14:])
    answer = bytearray(ethernet(tcp(OUTSIDE, source(frame[14:]), 0x12)))
    assert network.process_rx_packet(answer) is NatResult.TRANSLATED
    assert destination(answer[14:]) == GUEST
    arp = bytearray(ethernet(b"\0" * 28))
    arp[12:14] = b"\x08\x06"
    assert network.process_tx_packet(arp) is NatResult.PASS_THROUGH
    before = network.stats()
    network.maintenance()
    assert network.expire_connections() == 0
    assert network.stats() - before == DatapathStats()


def test_polling_strategies_without_work() -> None:
    for strategy in PollingStrategy:
        poller = DatapathPoller(strategy=strategy, max_spins=2)
        network = datapath()
        assert not any(poller.poll_once(network, patience=0.001) for _ in range(10))


def test_expire_connections_with_a_clock_object() -> None:
    class Clock:
        now = 0

        def __call__(self) -> int:
            return self.now

    clock = Clock()
    network = Datapath(NatEngineConfig("203.0.113.1"), clock=clock)
    network.process_tx_packet(bytearray(ethernet(udp(GUEST, OUTSIDE))))
    assert network.connection_count == 1
    clock.now = 302 * 10**9
    assert network.expire_connections() == 1
    assert network.connection_count == 0
    assert network.stats().nat_expired == 1


def test_packet_pool() -> None:
    pool = PacketPool(4, 128)
    indices = [pool.alloc() for _ in range(4)]
    assert None not in indices
    assert pool.alloc() is None
    assert pool.available == 0
    index = indices[0]
    assert index is not None
    pool.set(index, b"bytes")
    assert pool.get(index) == b"bytes"
    pool.free(index)
    with pytest.raises(guestnet.ConfigError, match="already free"):
        pool.free(index)
    with pytest.raises(guestnet.ConfigError, match="no buffer 99"):
        pool.get(99)
    with pytest.raises(guestnet.ConfigError, match="128"):
        pool.set(indices[1] or 1, b"x" * 129)
    with pytest.raises(guestnet.ConfigError):
        PacketPool(0)


def test_ring() -> None:
    ring = Ring(4)
    assert ring.is_empty
    assert ring.enqueue_batch(list(range(6))) == 4
    assert ring.is_full
    assert not ring.enqueue(9)
    assert ring.dequeue() == 0
    assert ring.dequeue_batch(10) == [1, 2, 3]
    assert ring.dequeue() is None
    assert (len(ring), ring.capacity) == (0, 4)


def test_ip_allocator_and_macs() -> None:
    pool: IpAllocator[IPv4Address] = IpAllocator("192.168.64.1", "192.168.64.3")
    assert pool.allocate_specific("192.168.64.1")
    assert pool.allocate() == IPv4Address("192.168.64.2")
    first = int(generate_mac().split(":")[0], 16)
    assert first & 3 == 2


def test_engine_directions() -> None:
    engine = NatEngine("203.0.113.1")
    assert engine.translate(udp(OUTSIDE, ("203.0.113.1", 5)), NatDirection.INBOUND).reason == "no_flow"
    assert engine.translate(udp(("10.1.1.1", 5), OUTSIDE), NatDirection.OUTBOUND) is NatResult.PASS_THROUGH
