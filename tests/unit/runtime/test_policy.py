"""The rules of a running network change: flows that are no longer allowed are cut, refusals are reported."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address

import pytest
from guestnet import (
    ConfigError,
    FlowDenied,
    Forward,
    NatConfig,
    NatNetwork,
    NetMode,
    NotRunning,
    UnsupportedError,
)
from guestnet.runtime.services.pcp_ports import GuestPorts
from guestnet.testing.guest import GuestError

from .conftest import PATIENCE, AddGuest, Events, add_memory_guest, until

LOOPBACK = "192.168.64.254"


@pytest.mark.parametrize("workers", [1, 3])
def test_host_only_resets_connections_and_can_be_ended_again(workers: int, echo: int) -> None:
    config = NatConfig(dhcp=False, dns=False, host_loopback=True, workers=workers)
    with NatNetwork(config) as network:
        guests = [add_memory_guest(network, name) for name in ("vm1", "vm2")]
        connections = [guest.connect(LOOPBACK, echo) for guest in guests]
        for connection in connections:
            connection.send(b"hello")
            assert connection.recv(5) == b"hello"
        assert network.set_mode("host_only") == 2
        assert network.mode is NetMode.HOST_ONLY
        for connection in connections:
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        with pytest.raises(GuestError):
            guests[0].ping(LOOPBACK, patience=PATIENCE)
        assert network.set_mode(NetMode.NAT) == 0
        guests[1].connect(LOOPBACK, echo).close()
    assert network.mode is NetMode.NAT


async def test_the_asynchronous_twins_do_the_same(echo: int) -> None:
    async with NatNetwork(NatConfig(dhcp=False, dns=False, host_loopback=True)) as network:
        add_memory_guest(network, "vm1").connect(LOOPBACK, echo)
        assert await network.aset_mode("host_only") == 1
        assert await network.aset_isolation(True) == 0


def test_denials_come_as_typed_events(network: NatNetwork, add_guest: AddGuest) -> None:
    seen = Events(network, flows=True)
    guest = add_guest("vm1")
    own = IPv4Address("192.168.64.2")
    network.set_mode("host_only")
    guest.send_udp("192.0.2.1", 53, 5000, b"x")
    denial = seen.next(FlowDenied)
    assert (denial.endpoint, denial.direction, denial.protocol) == ("vm1", "outbound", 17)
    assert (denial.guest, denial.remote) == ((own, 5000), (IPv4Address("192.0.2.1"), 53))
    assert (denial.rule, denial.reason, denial.unreported) == ("host_only", "policy", 0)
    assert denial.details()["remote"] == ["192.0.2.1", 53]
    assert denial.details()["rule"] == "host_only"
    guest.send_udp("169.254.169.254", 80, 5000, b"x")
    denial = seen.next(FlowDenied)
    assert (denial.rule, denial.reason) == ("metadata", "bad_destination")


def test_a_cut_flow_is_reported_with_its_rule(network: NatNetwork, add_guest: AddGuest, echo: int) -> None:
    seen = Events(network, flows=True)
    add_guest("vm1").connect(LOOPBACK, echo)
    assert network.set_mode("host_only") == 1
    denial = seen.next(FlowDenied)
    assert (denial.rule, denial.remote) == ("host_only", (IPv4Address(LOOPBACK), echo))
    assert denial.name == "host.guestnet.internal"


@pytest.mark.parametrize("workers", [1, 2])
def test_isolated_guests_do_not_reach_each_other(workers: int) -> None:
    with NatNetwork(NatConfig(dhcp=False, dns=False, isolated=True, workers=workers)) as network:
        seen = Events(network, flows=True)
        one, two = add_memory_guest(network, "vm1"), add_memory_guest(network, "vm2")
        two.ping(str(network.gateway))
        with pytest.raises(GuestError):
            one.ping("192.168.64.3", patience=PATIENCE)
        denial = seen.next(FlowDenied)
        assert (denial.endpoint, denial.direction, denial.rule) == ("vm1", "between_guests", "isolated")
        assert denial.name == "vm2.guestnet.internal"
        network.set_isolation(True, trusted=("vm1",))
        one.ping("192.168.64.3")
        with pytest.raises(GuestError):
            two.ping("192.168.64.2", patience=PATIENCE)
        network.set_isolation(False)
        two.ping("192.168.64.2")


def test_a_trusted_endpoint_may_come_later() -> None:
    with NatNetwork(NatConfig(dhcp=False, dns=False)) as network:
        network.set_isolation(True, trusted=("later",))
        add_memory_guest(network, "vm1").ping(str(network.gateway))
        later = add_memory_guest(network, "later")
        later.ping("192.168.64.2")
        network.remove_endpoint("later")
        with pytest.raises(GuestError):
            add_memory_guest(network, "other").ping("192.168.64.2", patience=PATIENCE)


def test_a_port_that_a_guest_opened_is_closed_with_the_network() -> None:
    config = NatConfig(dhcp=False, dns=False, pcp_ports=(40000, 49999), pcp_address="127.0.0.1")
    with NatNetwork(config) as network:
        guest = add_memory_guest(network, "vm1")
        guest.serve(80, lambda connection: connection.close())
        forward = network._run(_open_port(network))
        published = network.publish("127.0.0.1:0:vm1:80")
        for mode, ports in (("nat", 2), ("host_only", 1), ("nat", 2)):
            network.set_mode(mode)
            reached = [_reaches(f.host_port) for f in (forward, published)]
            assert (sum(reached), reached[1]) == (ports, True), mode


async def _open_port(network: NatNetwork) -> Forward:
    session = network._live()
    ports = GuestPorts(session.config, session.registry, session.publishing)
    return await ports.open("vm1", "tcp", (IPv4Address("192.168.64.2"), 80), 40007)


def _reaches(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
            return client.recv(1) == b""
    except ConnectionResetError:
        return False


def test_a_mode_that_cannot_be() -> None:
    network = NatNetwork(NatConfig(dhcp=False, dns=False))
    for call in (lambda: network.set_mode("host_only"), lambda: network.set_isolation(True)):
        with pytest.raises(NotRunning):
            call()
    with network:
        with pytest.raises(UnsupportedError, match="stop it and start one"):
            network.set_mode("bridged")
        with pytest.raises(ConfigError):
            network.set_mode("closed")
        with pytest.raises(TypeError, match="trusted"):
            network.set_isolation(True, trusted="vm1")
        with pytest.raises(TypeError, match="trusted"):
            network.set_isolation(True, trusted=(1,))  # type: ignore[arg-type]
        assert network.mode is NetMode.NAT


def test_a_second_start_has_the_mode_of_the_configuration(echo: int) -> None:
    network = NatNetwork(NatConfig(dhcp=False, dns=False, host_loopback=True))
    with network:
        network.set_mode("host_only")
    with network:
        assert network.mode is NetMode.NAT
        add_memory_guest(network, "vm1").connect(LOOPBACK, echo).close()
        until(lambda: network.stats().flows_opened == 1, "the flow to be counted")
