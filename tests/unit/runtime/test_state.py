"""The state of a network, and changes of a running one."""

from __future__ import annotations

import json
import math
import socket
import time
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from guestnet import (
    AddressInUse,
    Change,
    ConfigError,
    EndpointExists,
    EndpointNotFound,
    EndpointRemoved,
    EndpointSpec,
    ForwardAdded,
    ForwardNotFound,
    ForwardRemoved,
    ForwardSpec,
    LeaseRecord,
    NatConfig,
    NatNetwork,
    NotRunning,
    PortInUse,
    RecordsChanged,
    SettingChanged,
    Spec,
    UnsupportedError,
    diff,
)
from guestnet.model.events import GuestUp
from guestnet.model.ipam import parse_mac

from .conftest import Events, add_memory_guest

PLAIN = NatConfig(dhcp=False, dns=False)


def through_json(network: NatNetwork) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(json.dumps(network.state(), allow_nan=False))
    return state


def test_a_network_is_made_again_from_its_state(tmp_path: Path) -> None:
    config = NatConfig(subnet="10.9.0.0/24", dns_records={"a.example": "192.0.2.1", "b.example": "192.0.2.2"})
    with NatNetwork(config) as network:
        network.create_endpoint("web", mac="02:00:00:00:00:07", ip="10.9.0.77", hostname="www")
        network.create_endpoint("vm1")
        network.services.dns.add_record("later.example", "TXT:some text")
        network.services.dns.remove_record("b.example")
        network.recall_guest("02:00:00:00:00:99", "vm9", "10.9.0.99")
        network.publish("127.0.0.1:0:web:80")
        network.listen("stream", tmp_path / "net.sock")
        network.services.dhcp.restore(
            [LeaseRecord("web", "02:00:00:00:00:07", network["web"].ip, "www", time.time() + 600)]
        )
        state = through_json(network)
        before = network.spec()
    with NatNetwork.from_state(json.loads(json.dumps(state))) as again:
        now = through_json(again)
        ends = [lease.pop("expires") for one in (now, state) for lease in one["leases"]]
        assert now == state
        assert ends == pytest.approx([ends[0]] * 2, abs=5)
        assert again.spec() == before
        assert diff(before, again.spec()) == []
        assert [str(endpoint) for endpoint in again] == [str(endpoint) for endpoint in network]
        assert (str(again["web"].ip), again["web"].hostname) == ("10.9.0.77", "www")
        [lease] = again.services.dhcp.leases()
        assert (lease.endpoint_id, str(lease.ip)) == ("web", "10.9.0.77")
        assert again.services.dns.records() == {
            "a.example": ("192.0.2.1",), "later.example": ("TXT:some text",),
        }  # fmt: skip
        assert (tmp_path / "net.sock").exists()
        assert again._registry.arrive(parse_mac("02:00:00:00:00:99"), "net.sock").id == "vm9"
    # The second start opens what the program opens, as after any stop.
    with again:
        assert again.forwards == again.listeners == []


def test_a_guest_of_a_listener_has_its_place_again() -> None:
    network = NatNetwork(PLAIN)
    here = network._registry.arrive(parse_mac("02:00:00:00:00:05"), "net.sock")
    assert here.id == "vm1"
    gone = network._registry.arrive(parse_mac("02:00:00:00:00:06"), "net.sock")
    network.remove_endpoint(gone.id)
    again = NatNetwork.from_state(through_json(network))
    assert len(again) == 0
    for mac, id, ip in (("02:00:00:00:00:06", "vm2", gone.ip), ("02:00:00:00:00:05", "vm1", here.ip)):
        came = again._registry.arrive(parse_mac(mac), "net.sock")
        assert (came.id, came.ip) == (id, ip)


def test_a_generated_mac_stays_a_proposal() -> None:
    network = NatNetwork(PLAIN)
    mac = network.create_endpoint("vm1").mac
    again = NatNetwork.from_state(through_json(network))
    assert again["vm1"].mac == mac
    assert again.spec().endpoints[0].mac is None
    again._registry.address_for("vm1", parse_mac("02:00:00:00:00:05"))
    assert again["vm1"].mac == "02:00:00:00:00:05"


def test_leases_that_are_over_or_elsewhere_are_left_out() -> None:
    network = NatNetwork()
    vm, other = network.create_endpoint("vm1", mac="02:00:00:00:00:01"), "192.168.64.9"
    dhcp = network.services.dhcp
    record = LeaseRecord("vm1", vm.mac, vm.ip, None, math.inf)
    dhcp.restore(
        [
            LeaseRecord("vm1", vm.mac, vm.ip, None, time.time() - 1),
            LeaseRecord("vm1", vm.mac, type(vm.ip)(other), None, math.inf),
            LeaseRecord("gone", vm.mac, vm.ip, None, math.inf),
        ]
    )
    assert dhcp.leases() == []
    dhcp.restore([record])
    assert dhcp.leases() == [record]
    assert through_json(network)["leases"][0]["expires"] is None
    assert NatNetwork.from_state(through_json(network)).services.dhcp.leases() == [record]


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.update(version=2),
        lambda s: s.pop("config"),
        lambda s: s.update(more=1),
        lambda s: s.update(endpoints=3),
        lambda s: s["endpoints"][0].pop("id"),
        lambda s: s["endpoints"][0].update(id=3),
        lambda s: s["endpoints"][0].update(mac="x"),
        lambda s: s["endpoints"][0].update(ip="10.0.0.1"),
        lambda s: s["endpoints"].append(dict(s["endpoints"][0])),
        lambda s: s.update(guests=[]),
        lambda s: s.update(guests={"x": {"id": "vm1", "ip": None}}),
        lambda s: s.update(guests={"02:00:00:00:00:01": {"id": "vm1", "ip": "x"}}),
        lambda s: s.update(leases=[{"endpoint": "vm1"}]),
        lambda s: s.update(records={"a.example": ["no address"]}),
        lambda s: s.update(records=[]),
        lambda s: s.update(forwards=["x"]),
        lambda s: s.update(listeners=[{}]),
    ],
)
def test_a_damaged_state_is_refused(damage: Any) -> None:
    network = NatNetwork()
    network.create_endpoint("vm1")
    state = through_json(network)
    damage(state)
    with pytest.raises((ConfigError, EndpointExists)):
        NatNetwork.from_state(state)
    for wrong in (None, [], 3):
        with pytest.raises(ConfigError, match="no state"):
            NatNetwork.from_state(wrong)  # type: ignore[arg-type]


def test_a_port_that_is_taken_keeps_the_network_from_starting() -> None:
    with NatNetwork(PLAIN) as network:
        forward = network.publish("127.0.0.1:0:vm1:80")
        state = through_json(network)
    again = NatNetwork.from_state(state)
    with socket.create_server(("127.0.0.1", forward.host_port)):
        with pytest.raises(PortInUse):
            again.start()
        assert not again.is_running
    with again:
        assert again.forwards[0].host_port == forward.host_port


def test_changes_lead_from_one_description_to_another() -> None:
    with NatNetwork() as network:
        address = IPv4Address("192.168.64.9")
        endpoints = [EndpointSpec("vm1"), EndpointSpec("vm2", ip=address)]
        old = Spec(network.config, endpoints, ["127.0.0.1:0:vm1:80"])
        network.apply(diff(network.spec(), old))
        events = Events(network)
        new = Spec(
            network.config.replace(dns_records={"a.example": ("192.0.2.1", "192.0.2.2")}),
            [EndpointSpec("vm3", ip=address), EndpointSpec("vm1")],
            ["127.0.0.1:0:vm3:81/udp"],
        )
        kept = network["vm1"]
        guest = network.attach("vm1", "memory")
        network.apply(diff(network.spec(), new))
        assert diff(network.spec(), new) == []
        assert [endpoint.id for endpoint in network] == ["vm1", "vm3"]
        assert network["vm1"] is kept
        assert network.attachments == [guest]
        assert network.services.dns.records() == {"a.example": ("192.0.2.1", "192.0.2.2")}
        assert [one.protocol for one in network.forwards] == ["udp"]
        assert events.next(GuestUp).endpoint == "vm1"
        add_memory_guest(network, "vm4").ping("192.168.64.1")


async def test_a_change_that_fails_leaves_everything_as_it_was() -> None:
    records = {"a.example": ("192.0.2.1",)}
    async with NatNetwork(dns_records=records) as network:
        await network.acreate_endpoint("vm1", hostname="web")
        forward = await network.apublish("127.0.0.1:0:vm1:80")
        attachment = await network.aattach("vm1", "memory")
        before = network.spec()
        with socket.create_server(("127.0.0.1", 0)) as taken:
            wanted = Spec(
                network.config.replace(dns_records={"b.example": ("192.0.2.2",)}),
                [EndpointSpec("vm2")],
                [f"127.0.0.1:{taken.getsockname()[1]}:vm2:80"],
            )
            with pytest.raises(PortInUse):
                await network.aapply(diff(before, wanted))
        assert network.spec() == before
        assert network.forwards[0].host_port == forward.host_port
        assert network.attachments == [attachment]
        assert network.services.dns.records() == records


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ([SettingChanged("mtu", 1500, 9000)], UnsupportedError),
        ([ForwardRemoved(ForwardSpec.parse("1:80"))], ForwardNotFound),
        ([EndpointRemoved(EndpointSpec("nobody"))], EndpointNotFound),
        (diff(Spec(), Spec(endpoints=[EndpointSpec("vm1")])), EndpointExists),
        (diff(Spec(), Spec(endpoints=[EndpointSpec("vm7", ip=IPv4Address("192.168.64.2"))])), AddressInUse),
        ([RecordsChanged("a.example", (), ("192.0.2.1", "nonsense"))], ConfigError),
        ([Change()], TypeError),
        (["publish"], TypeError),
    ],
)
def test_what_cannot_be_applied_is_refused_before_anything_changes(
    changes: list[Change], error: type[Exception]
) -> None:
    first = [
        ForwardAdded(ForwardSpec.parse("127.0.0.1:0:vm1:80")),
        RecordsChanged("b.example", (), ("192.0.2.9",)),
    ]
    with NatNetwork() as network:
        network.create_endpoint("vm1")
        before = network.spec()
        with pytest.raises(error):
            network.apply([*first, *changes])
        assert network.spec() == before
    with pytest.raises(NotRunning):
        network.apply(first)
