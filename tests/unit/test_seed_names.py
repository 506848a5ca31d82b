"""Every name of the document that the project began with, used as its own tests use them."""

from __future__ import annotations

import ctypes
import os
import socket
import time
import timeit
from array import array
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
    NatConfig,
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
from guestnet.datapath import FdUplink
from guestnet.model.ipam import parse_mac
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
    with pytest.raises(guestnet.ConfigError, match="batch_size 0"):
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


def test_counting_costs_little_beside_translating() -> None:
    network = datapath()
    packet = udp(GUEST, OUTSIDE)
    frame = ethernet(packet)
    untouched, buffer = bytes(packet), bytearray(frame)

    def translate() -> None:
        packet[:] = untouched
        network.engine.translate(packet, NatDirection.OUTBOUND)

    def process() -> None:
        buffer[:] = frame
        network.process_tx_packet(buffer)

    best = [min(timeit.repeat(f, number=2000, repeat=20)) for f in (translate, process)]
    assert best[1] < 5 * best[0], best
    assert network.stats().tx_packets == 40_000


def test_sizes_and_histogram_are_those_of_the_seed() -> None:
    network = datapath()
    assert (PacketPool().capacity, Ring().capacity) == (8192, 4096)
    assert (network.packet_pool.capacity, network.tx_ring.capacity, network.rx_ring.capacity) == (
        8192,
        4096,
        4096,
    )
    for size in (1, 3, 64, 100):
        for port in range(size):
            put(network, ethernet(udp((GUEST[0], 50000 + port), OUTSIDE)))
        assert DatapathPoller(batch_size=size).poll_once(network)
    first = network.stats()
    assert (first.batches, first.batched, first.largest_batch) == (4, 168, 100)
    assert first.batch_histogram == (0, 1, 1, 0, 0, 0, 0, 2)
    network.uplink.deliver(udp(OUTSIDE, ("203.0.113.1", 50000)))
    DatapathPoller().poll_once(network)
    assert (network.stats() - first).batch_histogram == (0, 1, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "config",
    [
        NatConfig(),
        NatConfig(uplink="tun"),
        NatConfig(mode="host_only"),
        NatConfig(mode="bridged", bridge="br0"),
        NatConfig(subnet="100.64.0.0/10"),
        NatConfig(subnet="192.168.64.0/30", workers=2),
    ],
)
def test_every_network_answers_to_the_names_of_the_seed(config: NatConfig) -> None:
    network = NatNetwork(config)
    guest, gateway = (str(config.subnet[2]), 50000), network.gateway
    assert (network.packet_pool.capacity, network.tx_ring.capacity, network.rx_ring.capacity) == (
        8192,
        4096,
        4096,
    )
    frame = bytearray(ethernet(udp(guest, OUTSIDE)))
    assert network.process_tx_packet(frame) is NatResult.TRANSLATED
    external = source(frame[14:])
    answer = bytearray(ethernet(udp(OUTSIDE, external)))
    assert network.process_rx_packet(answer) is NatResult.TRANSLATED
    assert destination(answer[14:]) == guest
    assert network.connection_count == network.conntrack_stats().connections == 1
    assert (network.nat_stats().outbound, network.nat_stats().inbound) == (1, 1)
    assert not DatapathPoller().poll_once(network)
    network.maintenance()
    assert network.expire_connections() == 0
    assert network.gateway == gateway
    assert not network.is_running


def test_the_engine_by_hand_is_one_engine_whether_the_network_runs_or_not() -> None:
    network = NatNetwork(NatConfig(dhcp=False, dns=False, host_loopback=True))
    engine = network.datapath.engine

    def look(sent: int) -> None:
        frame = bytearray(ethernet(udp((GUEST[0], 50000 + sent), OUTSIDE)))
        assert network.process_tx_packet(frame) is NatResult.TRANSLATED
        assert network.nat_stats() == engine.stats()
        assert network.nat_stats().outbound == sent
        assert network.conntrack_stats() == engine.conntrack()
        assert network.connection_count == network.conntrack_stats().connections == sent

    look(1)
    with network, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
        outside.bind(("127.0.0.1", 0))
        outside.settimeout(10)
        me = network.create_endpoint("me")
        guest = network.attach("me", "memory")
        macs = parse_mac(network.config.gateway_mac) + parse_mac(me.mac)
        loopback = (str(network.config.subnet[-2]), outside.getsockname()[1])
        guest.send(macs + b"\x08\x00" + udp((str(me.ip), 4000), loopback, b"x"))
        outside.recv(10)
        # A flow of a guest is the network's, and none of the engine by hand.
        assert len(network.flows()) == 1
        look(2)
        with pytest.raises(guestnet.UnsupportedError, match="no NAT engine"):
            network.uplink_nat_stats()
    look(3)
    with pytest.raises(guestnet.NotRunning):
        network.uplink_conntrack_stats()


@pytest.mark.parametrize(
    "settings",
    [
        {"mtu": 68},
        {"mtu": 65520},
        {"subnet": "10.0.0.0/8"},
        {"subnet": "192.168.64.0/30"},
        {"subnet": "198.18.0.0/15"},
        {"uplink": "tun", "external": ("203.0.113.1", "203.0.113.2"), "port_range": (1024, 1024)},
        {"gateway": "192.168.64.254"},
        {"filtering": "endpoint_independent"},
        {"limits": {}, "workers": 64},
    ],
)
def test_no_attribute_raises(settings: dict[str, object]) -> None:
    """So that debuggers and `hasattr` can look at every network."""
    network = NatNetwork(NatConfig(**settings))  # type: ignore[arg-type]
    names = [name for name in dir(network) if isinstance(getattr(type(network), name, None), property)]
    assert {"packet_pool", "tx_ring", "rx_ring", "connection_count", "forwards"} <= set(names)
    for name in names:
        getattr(network, name)
    if settings.get("uplink") != "tun":
        with network:
            for name in names:
                getattr(network, name)


def test_the_rings_of_a_running_network_lead_to_its_uplink() -> None:
    """Whichever that is: here sockets of the host, with an echo service behind them."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside,
        NatNetwork(NatConfig(dhcp=False, dns=False, host_loopback=True)) as network,
    ):
        outside.bind(("127.0.0.1", 0))
        outside.settimeout(10)
        me = network.create_endpoint("me")
        loopback = (str(network.config.subnet[-2]), outside.getsockname()[1])
        macs = parse_mac(network.config.gateway_mac) + parse_mac(me.mac)
        index = network.packet_pool.put(macs + b"\x08\x00" + udp((str(me.ip), 4000), loopback, b"question"))
        assert index is not None
        assert network.tx_ring.enqueue_batch([index, 5000]) == 2
        poller = DatapathPoller(strategy="event_driven")
        assert poller.poll_once(network)
        question, peer = outside.recvfrom(100)
        outside.sendto(question.upper(), peer)
        deadline = time.monotonic() + 10
        while True:
            assert time.monotonic() < deadline
            poller.poll_once(network)
            while (index := network.rx_ring.dequeue()) is not None:
                frame = network.packet_pool.take(index)
                assert frame is not None
                if frame[12:14] == b"\x08\x00" and frame.endswith(b"QUESTION"):
                    assert destination(frame[14:]) == (str(me.ip), 4000)
                    stats = network.datapath.stats()
                    assert (stats.tx_packets, stats.nat_outbound, stats.tx_errors) == (1, 1, 1)
                    assert network.packet_pool.available == network.packet_pool.capacity
                    return


def put(network: Datapath, frame: bytes) -> int:
    """Puts a frame on the ring for frames from guests."""
    index = network.packet_pool.put(frame)
    assert index is not None
    assert network.tx_ring.enqueue(index)
    return index


@pytest.mark.parametrize("wrong", ["foreign", "of no pool", "twice", "free"])
def test_an_index_that_nobody_holds_costs_no_other_frame(wrong: str) -> None:
    network = datapath()
    free = network.packet_pool.alloc()
    assert free is not None
    for port in range(5):
        first = put(network, ethernet(udp((GUEST[0], 50000 + port), OUTSIDE)))
    network.packet_pool.free(free)
    network.tx_ring.enqueue({"foreign": 8000, "of no pool": 2**32 - 1, "twice": first, "free": free}[wrong])
    for port in range(5):
        put(network, ethernet(udp((GUEST[0], 50005 + port), OUTSIDE)))
    assert DatapathPoller().poll_once(network)
    assert [source(p)[1] for p in network.uplink.sent] == list(range(50000, 50010))
    assert network.packet_pool.available == network.packet_pool.capacity
    stats = network.stats()
    assert (stats.tx_packets, stats.tx_errors, stats.nat_outbound) == (10, 1, 10)


def test_an_error_of_the_uplink_costs_no_packet_that_came_before_it() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        uplink = FdUplink(near.fileno())
        network = Datapath(NatEngineConfig("203.0.113.1", secret=bytes(32)), uplink=uplink)
        put(network, ethernet(udp(GUEST, OUTSIDE)))
        poller = DatapathPoller()
        assert poller.poll_once(network)
        answer = far.recv(100)
        for _ in range(3):
            far.send(udp(OUTSIDE, source(answer)))
        # Three packets, and then nothing but errors.
        read, reads = os.read, 0

        def failing(fd: int, size: int) -> bytes:
            nonlocal reads
            reads += 1
            if reads > 3:
                raise OSError(5, "no device")
            return read(fd, size)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "read", failing)
            assert poller.poll_once(network)
            with pytest.raises(OSError, match="no device"):
                poller.poll_once(network)
        assert (network.stats().rx_packets, len(network.rx_ring)) == (3, 3)
        uplink.close()


def test_what_is_not_translated_goes_on_or_is_counted() -> None:
    config = NatEngineConfig("203.0.113.1", secret=bytes(32), no_nat=["100.64.0.0/10"])
    network = Datapath(config)
    network.add_guest("192.168.64.3", "02:00:00:00:00:03")
    plain, other, far = ("100.64.7.7", 53), ("192.168.64.3", 9), ("10.9.9.9", 9)
    packets = {
        "to no_nat": udp(GUEST, plain),
        "to a guest": udp(GUEST, other),
        "to a guest that is not known": udp(GUEST, ("192.168.64.77", 9)),
        "from elsewhere": udp(far, OUTSIDE),
        "from elsewhere to no_nat": udp(far, plain),
    }
    for packet in packets.values():
        put(network, ethernet(packet))
    put(network, ethernet(bytes(40)))  # no IPv4 packet, whatever its header says
    put(network, b"\x02" * 12 + b"\x08\x06" + bytes(28))  # ARP
    put(network, b"\x02" * 9)
    poller = DatapathPoller()
    assert poller.poll_once(network)
    assert list(network.uplink.sent) == [bytes(packets["to no_nat"])]
    index = network.rx_ring.dequeue()
    assert index is not None
    frame = network.packet_pool.take(index)
    assert frame is not None
    assert (frame[:6].hex(), frame[14:]) == ("020000000003", bytes(packets["to a guest"]))
    assert network.rx_ring.dequeue() is None
    stats = network.stats()
    assert (stats.tx_packets, stats.tx_passed, stats.tx_errors, stats.nat_outbound) == (8, 2, 6, 0)

    answer = udp(plain, GUEST)
    for packet in (answer, udp(OUTSIDE, GUEST), udp(plain, far), bytes(40), b"\x60" + bytes(50)):
        network.uplink.deliver(packet)
    assert poller.poll_once(network)
    index = network.rx_ring.dequeue()
    assert index is not None
    assert network.packet_pool.take(index) == b"\x02guest" + network.gateway_mac + b"\x08\x00" + answer
    stats = network.stats()
    assert (stats.rx_packets, stats.rx_passed, stats.rx_errors) == (5, 1, 4)
    assert network.packet_pool.available == network.packet_pool.capacity


def frame_from(ip: str, mac: bytes) -> bytes:
    return b"\x02gatew" + mac + b"\x08\x00" + bytes(udp((ip, 5000), OUTSIDE))


def answered(network: Datapath, ip: str) -> bytes | None:
    """The hardware address that an answer for a guest goes to."""
    packet = udp((ip, 5000), OUTSIDE)
    network.engine.translate(packet, NatDirection.OUTBOUND)
    network.uplink.deliver(udp(OUTSIDE, source(packet)))
    network.poll_rx(64)
    index = network.rx_ring.dequeue()
    return None if index is None else (network.packet_pool.take(index) or b"")[:6]


def test_hardware_addresses_are_learned_once_and_not_over_what_was_said() -> None:
    network = datapath()
    network.add_guest("192.168.64.2", "02:00:00:00:00:02")
    put(network, frame_from("192.168.64.2", b"\x02thief"))
    put(network, frame_from("192.168.64.3", b"\x02three"))
    put(network, frame_from("192.168.64.3", b"\x02thief"))
    put(network, frame_from("192.168.64.4", b"\x03group"))
    put(network, frame_from("192.168.64.4", network.gateway_mac))
    network.poll_tx(64)
    assert answered(network, "192.168.64.2") == bytes.fromhex("020000000002")
    assert answered(network, "192.168.64.3") == b"\x02three"
    assert answered(network, "192.168.64.4") is None
    # What is said counts more than what was learned.
    network.add_guest("192.168.64.3", "02:00:00:00:00:03")
    assert answered(network, "192.168.64.3") == bytes.fromhex("020000000003")
    with pytest.raises(guestnet.ConfigError, match="inside 192"):
        network.add_guest("10.0.0.1", "02:00:00:00:00:03")
    with pytest.raises(guestnet.ConfigError, match="not an IPv4 address"):
        network.add_guest("192.168.64.2.1", "02:00:00:00:00:03")


def test_only_addresses_inside_are_learned_and_not_without_bound() -> None:
    network = Datapath(NatEngineConfig("203.0.113.1", internal="10.0.0.0/8", secret=bytes(32)))
    for n in range(6000):
        put(network, frame_from(f"10.0.{n >> 8}.{n & 255}", b"\x02guest"))
        put(network, frame_from(f"20.0.{n >> 8}.{n & 255}", b"\x02guest"))
        network.poll_tx(2)
    assert answered(network, "10.0.0.7") == b"\x02guest"
    assert answered(network, "10.0.23.7") is None
    network.add_guest("10.0.23.7", b"\x02named")
    assert answered(network, "10.0.23.7") == b"\x02named"
    learned = [ip for ip in (f"10.0.{n >> 8}.{n & 255}" for n in range(6000)) if answered(network, ip)]
    assert len(learned) == 4097


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
    assert pool.take(index) == b"bytes"
    assert pool.available == 1
    assert pool.take(index) is None
    assert pool.take(99) is None
    with pytest.raises(guestnet.ConfigError, match="already free"):
        pool.free(index)
    with pytest.raises(guestnet.ConfigError, match="no buffer 99"):
        pool.get(99)
    with pytest.raises(guestnet.ConfigError, match="128"):
        pool.set(indices[1] or 1, b"x" * 129)
    with pytest.raises(guestnet.ConfigError):
        PacketPool(0)


def test_a_pool_takes_any_bytes_in_one_piece() -> None:
    pool = PacketPool(16, 128)
    data = bytes(range(100))
    copy = (ctypes.c_ubyte * 100)(*data)
    for given in (data, bytearray(data), memoryview(data), array("B", data), copy, memoryview(data)[0:100]):
        index = pool.put(given)
        assert index is not None
        assert pool.get(index) == data
        pool.set(index, memoryview(given)[50:])
        assert pool.take(index) == data[50:]
    index = pool.put(b"")
    assert index is not None
    pool.set(index, array("H", [0x0102] * 10))
    assert pool.take(index) == array("H", [0x0102] * 10).tobytes()
    wrong: object
    for wrong in ("text", 5, None, [1, 2]):
        with pytest.raises(TypeError):
            pool.put(wrong)  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        pool.put(memoryview(data)[::2])
    with pytest.raises(guestnet.ConfigError, match="128"):
        pool.put(bytearray(129))
    assert pool.available == 16


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
