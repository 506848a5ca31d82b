"""Descriptions of networks as values: plain data, and what changes from one to another."""

from __future__ import annotations

import json
from ipaddress import IPv4Address
from typing import Any

import pytest
from guestnet import (
    ConfigError,
    EndpointAdded,
    EndpointRemoved,
    EndpointSpec,
    ForwardAdded,
    ForwardRemoved,
    ForwardSpec,
    LeaseAdded,
    LeaseRemoved,
    NatConfig,
    RecordsChanged,
    SettingChanged,
    Spec,
    StaticLease,
    diff,
)

MAC = "02:00:00:00:00:01"
CONFIGS: list[dict[str, Any]] = [
    {},
    {"subnet": "10.9.0.0/24", "mtu": 9000, "host_loopback": True, "search": ("lan", "corp.example")},
    {"mode": "host_only", "dhcp": False, "resolvers": ()},
    {"mode": "bridged", "bridge": "br0"},
    {"source": "192.0.2.7"},
    {"source": "eth0"},
    {"proxy": "socks5://me:secret@192.0.2.1:1080"},
    {"uplink": "tun", "external": ("203.0.113.1",), "port_range": (2000, 3000), "masquerade": True},
    {"pcp_ports": (40000, 40999), "pcp_address": "127.0.0.1", "filtering": "endpoint_independent"},
    {"dns_records": {"web.example": ("192.0.2.1", "TXT:some text"), "*.example": "192.0.2.2"}},
    {
        "static_leases": [
            {"mac": MAC, "ip": "192.168.64.9", "name": "web"},
            {"mac": "02::2", "ip": "192.168.64.8"},
        ]
    }
    if False
    else {"static_leases": [StaticLease(MAC, "192.168.64.9", "web")], "limits": {}},
    {"gateway": "192.168.64.77", "dhcp_start": "192.168.64.100", "dhcp_end": "192.168.64.110"},
    {"gateway_mac": "02:00:00:00:00:aa", "workers": 4, "polling": "busy", "capture": "/tmp/all.pcapng"},
]


@pytest.mark.parametrize("settings", CONFIGS)
def test_a_description_can_be_written_as_json_and_read_again(settings: dict[str, Any]) -> None:
    spec = Spec(
        NatConfig(**settings),
        [EndpointSpec("vm1", MAC, hostname="web"), EndpointSpec("vm2")],
        ["8080:vm1:80", "[::1]:53:vm2:53/udp", "8000-8009:vm1:8000-8009", "0:80", "0:80"],
    )
    again = Spec.from_dict(json.loads(json.dumps(spec.as_dict())))
    assert again == spec
    assert diff(spec, again) == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "not a mapping"),
        ({"endpoint": []}, "endpoint"),
        ({"config": {"subnets": 1}}, "subnets"),
        ({"config": {"mtu": 1}}, "mtu"),
        ({"config": []}, "not a mapping"),
        ({"endpoints": {}}, "not a list"),
        ({"endpoints": ["vm1"]}, "not a mapping"),
        ({"endpoints": [{"mac": MAC}]}, "no id"),
        ({"endpoints": [{"id": "vm1", "mac": "x"}]}, "MAC"),
        ({"endpoints": [{"id": "vm1", "ip": "x"}]}, "IPv4"),
        ({"endpoints": [{"id": "vm1"}, {"id": "vm1"}]}, "twice"),
        ({"forwards": ["8080:80", "8080:80"]}, "twice"),
        ({"forwards": ["x"]}, "published port"),
        ({"forwards": "8080:80"}, "not a list"),
    ],
)
def test_what_is_wrong_is_named(data: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Spec.from_dict(data)


def test_each_difference_is_a_typed_change() -> None:
    one = StaticLease(MAC, IPv4Address("192.168.64.9"))
    two = StaticLease("02:00:00:00:00:02", IPv4Address("192.168.64.8"))
    records = {"a.example": ("192.0.2.1",), "b.example": ("192.0.2.2",), "c.example": ("192.0.2.3",)}
    old = Spec(
        NatConfig(static_leases=[one], dns_records=records),
        [EndpointSpec("vm1", MAC), EndpointSpec("vm2"), EndpointSpec("vm3")],
        ["8080:vm1:80", "8081:vm2:80"],
    )
    changed = {
        "b.example": ("192.0.2.2", "192.0.2.9"),
        "c.example": ("192.0.2.3",),
        "d.example": ("192.0.2.4",),
    }
    new = Spec(
        NatConfig(mtu=9000, static_leases=[two], dns_records=changed),
        [EndpointSpec("vm1", MAC, hostname="web"), EndpointSpec("vm2"), EndpointSpec("vm4")],
        ["8080:vm1:81", "8081:vm2:80"],
    )
    changes = diff(old, new)
    assert changes == [
        SettingChanged("mtu", 1500, 9000),
        LeaseRemoved(NatConfig(static_leases=[one]).static_leases[0]),
        LeaseAdded(NatConfig(static_leases=[two]).static_leases[0]),
        RecordsChanged("a.example", ("192.0.2.1",), ()),
        RecordsChanged("b.example", ("192.0.2.2",), ("192.0.2.2", "192.0.2.9")),
        RecordsChanged("d.example", (), ("192.0.2.4",)),
        ForwardRemoved(ForwardSpec.parse("8080:vm1:80")),
        EndpointRemoved(EndpointSpec("vm1", MAC)),
        EndpointRemoved(EndpointSpec("vm3")),
        EndpointAdded(EndpointSpec("vm1", MAC, hostname="web")),
        EndpointAdded(EndpointSpec("vm4")),
        ForwardAdded(ForwardSpec.parse("8080:vm1:81")),
    ]
    assert [change.live for change in changes] == [False] * 3 + [True] * 9
    assert all(str(change) for change in changes)
    assert diff(new, new) == []


def test_what_the_new_description_leaves_open_changes_nothing() -> None:
    old = Spec(
        endpoints=[EndpointSpec("vm1", MAC, IPv4Address("192.168.64.7"))], forwards=["40001:80", "40000:80"]
    )
    assert diff(old, Spec(endpoints=[EndpointSpec("vm1")], forwards=["0:80", "40001:80"])) == []
    assert diff(old, Spec(endpoints=[EndpointSpec("vm1")], forwards=["0:80"])) == [
        ForwardRemoved(ForwardSpec.parse("40000:80"))
    ]
    elsewhere = EndpointSpec("vm1", ip=IPv4Address("192.168.64.8"))
    [removed, added] = diff(old, Spec(endpoints=[elsewhere], forwards=old.forwards))
    assert (type(removed), type(added)) == (EndpointRemoved, EndpointAdded)
