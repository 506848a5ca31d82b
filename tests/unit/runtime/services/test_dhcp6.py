"""DHCPv6 by frames: from a guest in memory through the data plane to the server, and back."""

from __future__ import annotations

import queue
from collections.abc import Callable
from ipaddress import IPv6Address

import pytest
from guestnet import ConfigError, NatConfig, NatNetwork
from guestnet.model.events import AddressSeen, LeaseReleased, LeaseTaken
from guestnet.model.ipam import format_mac, parse_mac
from guestnet.model.spec import StaticLease
from guestnet.services.dns.labels import to_labels

from ...services import dhcp6_wire as wire
from ..conftest import PATIENCE, Events, until
from ..frames6 import advertisement, checksum

MAC = bytes.fromhex("020000000077")
PREFIX = "fd00:6e:0:1::/64"
OWN = "fd00:6e:0:1::2"
SERVERS = IPv6Address("ff02::1:2")
GATEWAY = IPv6Address("fe80::1")


class Client:
    """A guest that knows UDP over IPv6, and nothing else."""

    def __init__(self, network: NatNetwork, name: str, mac: bytes = MAC) -> None:
        self.mac = mac
        self.address = IPv6Address(bytes.fromhex("fe80000000000000") + bytes(2) + mac)
        self.frames: queue.Queue[bytes] = queue.Queue()
        self.send_frame: Callable[[bytes], object] = network.attach(
            name, "memory", on_frame=self.frames.put
        ).send

    def send(self, kind: int, *options: bytes, to: IPv6Address = SERVERS) -> None:
        payload = wire.ask(kind, wire.client_id(wire.duid(self.mac)), *options)
        udp = b"\x02\x22\x02\x23" + (8 + len(payload)).to_bytes(2, "big")
        pseudo = self.address.packed + to.packed + (8 + len(payload)).to_bytes(4, "big") + b"\0\0\0\x11"
        total = 0xFFFF - checksum(pseudo + udp + b"\0\0" + payload)
        udp += (total or 0xFFFF).to_bytes(2, "big") + payload
        head = b"\x60\0\0\0" + len(udp).to_bytes(2, "big") + b"\x11\x01"
        dst = b"\x33\x33" + to.packed[12:]
        self.send_frame(dst + self.mac + b"\x86\xdd" + head + self.address.packed + to.packed + udp)

    def advertise(self, address: IPv6Address) -> None:
        self.send_frame(advertisement(self.mac, address))

    def ask(self, kind: int, *options: bytes, to: IPv6Address = SERVERS) -> wire.Said6:
        self.send(kind, *options, to=to)
        while True:
            frame = self.frames.get(timeout=PATIENCE)
            if frame[12:14] == b"\x86\xdd" and frame[20] == 17 and frame[56:58] == b"\x02\x22":
                break
        assert frame[:6] == self.mac
        assert (IPv6Address(frame[22:38]), IPv6Address(frame[38:54])) == (GATEWAY, self.address)
        return wire.read(frame[62:])

    def take(self, server: bytes) -> str:
        return self.ask(wire.REQUEST, wire.server_id(server), wire.ia()).address


def server_of(network: NatNetwork) -> bytes:
    return wire.duid(parse_mac(network.config.gateway_mac))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_lease_by_frames(workers: int) -> None:
    with NatNetwork(NatConfig(subnet6=PREFIX, workers=workers)) as network:
        events = Events(network)
        network.create_endpoint("vm1")
        client, server = Client(network, "vm1"), server_of(network)
        said = client.ask(wire.SOLICIT, wire.ia())
        assert (said.kind, said.address, said.options[2]) == (wire.ADVERTISE, OWN, server)
        assert client.take(server) == OWN
        lease = events.next(LeaseTaken)
        assert (lease.endpoint, lease.mac, str(lease.ip)) == ("vm1", format_mac(MAC), OWN)
        endpoint = network.get_endpoint("vm1")
        assert endpoint is not None
        assert endpoint.mac == format_mac(MAC), "the guest has a MAC of its own"
        assert [str(one) for one in endpoint.addresses] == ["192.168.64.2", OWN]
        assert [str(one.ip) for one in network.services.dhcp6.leases()] == [OWN]
        # To the server itself is what it does not allow.
        said = client.ask(wire.RENEW, wire.server_id(server), wire.ia(OWN), to=GATEWAY)
        assert said.status == wire.USE_MULTICAST
        assert client.ask(wire.RELEASE, wire.server_id(server), wire.ia(OWN)).status == 0
        assert str(events.next(LeaseReleased).ip) == OWN
        assert [str(one) for one in endpoint.addresses] == ["192.168.64.2"]


def test_nobody_else_uses_a_leased_address() -> None:
    with NatNetwork(NatConfig(subnet6=PREFIX)) as network:
        network.create_endpoint("vm1", mac=MAC)
        other = bytes.fromhex("020000000078")
        network.create_endpoint("vm2", mac=other)
        client, thief = Client(network, "vm1"), Client(network, "vm2", other)
        assert client.take(server_of(network)) == OWN
        thief.address = IPv6Address(OWN)
        thief.send(wire.SOLICIT, wire.ia())
        until(lambda: network.endpoint_stats()["vm2"].drops.get("spoofed_source"), "the drop")


def test_a_flood_of_clients_leaves_others_their_address() -> None:
    """One guest plays 3000 clients, each with a MAC of its own, as dhcpstarv and flood_dhcpc6 do."""
    with NatNetwork(NatConfig(subnet6=PREFIX)) as network:
        network.create_endpoint("vm1", mac=MAC)
        other = bytes.fromhex("020000000078")
        network.create_endpoint("vm2", mac=other)
        flood, client = Client(network, "vm1"), Client(network, "vm2", other)
        for number in range(3000):
            flood.mac = b"\x0a\0\0\0" + number.to_bytes(2, "big")
            flood.address = IPv6Address(bytes.fromhex("fe80000000000000") + bytes(2) + flood.mac)
            flood.send(wire.REQUEST, wire.server_id(server_of(network)), wire.ia())
        assert client.take(server_of(network)) == "fd00:6e:0:1::3"
        leases = [one.endpoint_id for one in network.services.dhcp6.leases()]
        assert leases.count("vm1") <= 16
        assert leases.count("vm2") == 1
        assert sum(network.endpoint_stats()["vm1"].drops.values()) > 1000


def test_leases_end_with_their_endpoint_and_their_address_is_free() -> None:
    with NatNetwork(NatConfig(subnet6=PREFIX)) as network:
        events = Events(network)
        network.create_endpoint("vm1", mac=MAC)
        assert Client(network, "vm1").take(server_of(network)) == OWN
        network.remove_endpoint("vm1")
        assert str(events.next(LeaseReleased).ip) == OWN
        other = bytes.fromhex("020000000078")
        network.create_endpoint("vm2", mac=other)
        assert Client(network, "vm2", other).take(server_of(network)) == OWN


def test_leases_outlive_the_network_by_its_state() -> None:
    with NatNetwork(NatConfig(subnet6=PREFIX)) as network:
        network.create_endpoint("vm1", mac=MAC)
        assert Client(network, "vm1").take(server_of(network)) == OWN
        state = network.state()
        before = network.services.dhcp6.leases()
    again = NatNetwork.from_state(state)
    (lease,) = again.services.dhcp6.leases()
    assert (lease.ip, lease.mac) == (before[0].ip, before[0].mac)
    assert lease.expires == pytest.approx(before[0].expires, abs=1.0)
    assert [str(one) for one in again["vm1"].addresses] == ["192.168.64.2", OWN]
    assert again.state()["leases"] == [pytest.approx(one) for one in state["leases"]]
    with again:
        # The data plane knows the address before the guest renews it.
        other = bytes.fromhex("020000000078")
        again.create_endpoint("vm2", mac=other)
        thief = Client(again, "vm2", other)
        thief.address = IPv6Address(OWN)
        thief.send(wire.SOLICIT, wire.ia())
        until(lambda: again.endpoint_stats()["vm2"].drops.get("spoofed_source"), "the drop")


def test_static_leases_of_both_families() -> None:
    both = StaticLease(format_mac(MAC), None, "web", IPv6Address("fd00:6e:0:1::99"))
    config = NatConfig(subnet6=PREFIX, static_leases=[both])
    with NatNetwork(config) as network:
        network.create_endpoint("vm1", mac=MAC)
        assert Client(network, "vm1").take(server_of(network)) == "fd00:6e:0:1::99"


@pytest.mark.parametrize("values", [{}, {"subnet6": PREFIX, "dhcp": False}])
def test_a_network_without_dhcpv6(values: dict[str, object]) -> None:
    network = NatNetwork(NatConfig(**values))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="subnet6="):
        _ = network.services.dhcp6
    assert "dhcp6" not in repr(network.services)


def test_names_and_addresses_of_a_guest_in_ipv6() -> None:
    """The leased address, and one that the guest made itself (SLAAC)."""
    with NatNetwork(NatConfig(subnet6=PREFIX)) as network:
        events = Events(network)
        network.create_endpoint("vm1", mac=MAC)
        client = Client(network, "vm1")
        own = IPv6Address("fd00:6e:0:1:7:7:7:7")
        client.advertise(own)
        seen = events.next(AddressSeen)
        assert (seen.endpoint, seen.ip, seen.mac) == ("vm1", own, format_mac(MAC))
        assert network["vm1"].addresses == (network["vm1"].ip, own)

        def addresses() -> list[IPv6Address]:
            answer = network.services.dns.lookup(to_labels("vm1.guestnet.internal"), 28)
            assert answer is not None
            return [IPv6Address(record[3]) for record in answer.answers]

        assert addresses() == [own]
        assert client.take(server_of(network)) == OWN
        assert addresses() == [IPv6Address(OWN)]
        for address in (own, IPv6Address(OWN)):
            answer = network.services.dns.lookup(to_labels(address.reverse_pointer), 12)
            assert answer is not None
            assert answer.answers[0][3] == to_labels("vm1.guestnet.internal")
