"""Every wrong value of a configuration is named by a ConfigError."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from guestnet.errors import ConfigError, GuestnetError
from guestnet.model.spec import LIMITS, TIMEOUTS, Filtering, NatConfig, NetMode, PollingStrategy, StaticLease
from guestnet.runtime.network import NatNetwork
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def test_defaults() -> None:
    config = NatConfig()
    assert config.subnet == IPv4Network("192.168.64.0/24")
    assert config.gateway == IPv4Address("192.168.64.1")
    assert (config.prefix_len, config.mtu, config.mode) == (24, 1500, NetMode.NAT)
    assert config.dhcp_end == IPv4Address("192.168.64.254")
    assert config.loopback_address is None
    assert config.search == ("guestnet.internal",)
    assert config.resolvers is None
    assert config.gateway_mac == "02:67:6e:a8:40:01"
    assert NatConfig() == config
    assert "192.168.64.0/24" in repr(config)


def test_text_is_read() -> None:
    config = NatConfig(
        subnet="10.0.0.0/29",
        gateway="10.0.0.5",
        mode="nat",
        polling="busy",
        filtering="endpoint_independent",
        host_loopback=True,
        dns_records={"Web.Example.": "192.0.2.1", "v6.example": ["2001:db8::1", "192.0.2.2"]},
        resolvers=["192.0.2.53"],
        static_leases=[{"mac": "02-00-00-00-00-01", "ip": "10.0.0.2", "name": "Web"}],
        capture="x.pcapng",
        gateway_mac="02:00:00:00:00:ff",
    )
    assert config.loopback_address == IPv4Address("10.0.0.6")
    assert (config.mode, config.polling) == (NetMode.NAT, PollingStrategy.BUSY)
    assert config.filtering == Filtering.ENDPOINT_INDEPENDENT
    assert config.dns_records["web.example"] == ("192.0.2.1",)
    assert config.static_leases == (StaticLease("02:00:00:00:00:01", IPv4Address("10.0.0.2"), "web"),)


def test_replace() -> None:
    config = NatConfig(
        mtu=9000, static_leases=[StaticLease("02:00:00:00:00:01", IPv4Address("192.168.64.9"))]
    )
    assert config.replace(mtu=1400).mtu == 1400
    assert config.replace(mtu=1400).static_leases == config.static_leases
    moved = NatConfig(mtu=9000).replace(subnet="10.1.0.0/16")
    assert (moved.gateway, moved.mtu) == (IPv4Address("10.1.0.1"), 9000)
    assert moved.dhcp_end == IPv4Address("10.1.255.254")


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        NatConfig().mtu = 9000  # type: ignore[misc]


LEASE = {"mac": "02:00:00:00:00:01", "ip": "192.168.64.9"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"subnet": "192.168.64.0"}, "subnet '192.168.64.0'"),
        ({"subnet": "192.168.64.1/24"}, "192.168.64.0/24"),
        ({"subnet": "192.168.64.0/31"}, "/8 to /30"),
        ({"subnet": "0.0.0.0/0"}, "/8 to /30"),
        ({"subnet": "10.0.0.0/7"}, "subnet"),
        ({"subnet": "127.0.0.0/8"}, "not for hosts"),
        ({"subnet": "224.0.0.0/24"}, "not for hosts"),
        ({"subnet": "169.254.0.0/16"}, "link-local"),
        ({"subnet": "169.0.0.0/8"}, "link-local"),
        ({"io_uring": "no"}, "io_uring 'no'"),
        ({"subnet": "240.0.0.0/8"}, "not for hosts"),
        ({"subnet": "0.0.0.0/8"}, "not for hosts"),
        ({"subnet": "fd00::/64"}, "not an IPv4 subnet"),
        ({"subnet": 7}, "subnet 7"),
        ({"gateway": "10.0.0.1"}, "gateway 10.0.0.1"),
        ({"gateway": "192.168.64.0"}, "gateway 192.168.64.0"),
        ({"gateway": "192.168.64.255"}, "gateway 192.168.64.255"),
        ({"gateway": "x"}, "gateway 'x'"),
        ({"gateway": 3232251905}, "gateway 3232251905"),
        ({"mtu": 67}, "mtu 67"),
        ({"mtu": 65521}, "mtu 65521"),
        ({"mtu": "1500"}, "mtu '1500'"),
        ({"mtu": True}, "mtu True"),
        ({"mode": "wild"}, "mode 'wild'"),
        ({"host_loopback": 1}, "host_loopback 1"),
        ({"host_loopback": True, "subnet": "10.0.0.0/30"}, "no room"),
        ({"host_loopback": True, "gateway": "192.168.64.254"}, "gateway 192.168.64.254"),
        ({"host_loopback": True, "mode": "host_only"}, "mode 'host_only'"),
        ({"dns": None}, "dns None"),
        ({"source": "127.0.0.1"}, "source 127.0.0.1"),
        ({"source": "0.0.0.0"}, "source 0.0.0.0"),
        ({"source": "fe80::1"}, "name of the interface"),
        ({"source": "an interface"}, "source 'an interface'"),
        ({"source": "a-name-that-is-too-long"}, "source 'a-name-that-is-too-long'"),
        ({"source": "eth0\0"}, "source 'eth0"),
        ({"source": ""}, "source ''"),
        ({"source": 7}, "source 7"),
        ({"proxy": 7}, "proxy 7"),
        ({"proxy": "ftp://192.0.2.1"}, "proxy 'ftp://192.0.2.1'"),
        ({"proxy": "192.0.2.1:1080"}, "is not the URL"),
        ({"proxy": "https://192.0.2.1"}, "over TLS"),
        ({"proxy": "http://192.0.2.1:99999"}, "proxy 'http://192.0.2.1:99999'"),
        ({"proxy": "http://me@192.0.2.1"}, "half of its credentials"),
        ({"proxy": "http://me:" + 256 * "x" + "@192.0.2.1"}, "no proxy takes"),
        ({"proxy": "@/nowhere/url"}, "'/nowhere/url' cannot be read"),
        ({"proxy": "http://192.0.2.1", "uplink": "tun"}, "uplink 'tun'"),
        ({"proxy": "http://192.0.2.1", "resolvers": ["127.0.0.53"]}, "resolvers 127.0.0.53"),
        ({"source": "192.0.2.7", "uplink": "tun"}, "uplink 'tun'"),
        ({"source": "eth0", "mode": "bridged", "bridge": "br0"}, "mode 'bridged'"),
        ({"lease_time": 0}, "lease_time 0"),
        ({"dns_records": ["a"]}, "dns_records"),
        ({"dns_records": {"a": "b"}}, "DNS record a=b"),
        ({"dns_records": {"é.x": "192.0.2.1"}}, "é.x"),
        ({"dns_records": {"a.x": "MX:mail"}}, "a.x=MX:mail"),
        ({"dns_records": {"": "192.0.2.1"}}, "dns_records name ''"),
        ({"zone": "a..b"}, "zone 'a..b'"),
        ({"zone": "a b"}, "zone 'a b'"),
        ({"search": "guestnet.internal"}, "search"),
        ({"search": ["-x"]}, "search '-x'"),
        ({"resolvers": "192.0.2.53"}, "resolvers"),
        ({"resolvers": ["dns.example"]}, "resolvers 'dns.example'"),
        ({"static_leases": [{}]}, "static_leases"),
        ({"static_leases": [{**LEASE, "ip": "192.168.64.1"}]}, "192.168.64.1"),
        ({"static_leases": [{**LEASE, "ip": "10.0.0.1"}]}, "10.0.0.1"),
        ({"static_leases": [{**LEASE, "mac": "x"}]}, "MAC address"),
        ({"static_leases": [LEASE, LEASE]}, "twice"),
        ({"static_leases": [{**LEASE, "name": "a.b"}]}, "'a.b'"),
        ({"static_leases": [{**LEASE, "nome": "a"}]}, "nome"),
        ({"static_leases": [{"mac": LEASE["mac"]}]}, "static_leases"),
        ({"static_leases": [{**LEASE, "ip6": "fd00::5"}]}, "needs subnet6"),
        ({"static_leases": [{**LEASE, "ip6": "fd01::5"}], "subnet6": "fd00::/64"}, "fd00::/64"),
        ({"static_leases": [{**LEASE, "ip6": "fd00::1"}], "subnet6": "fd00::/64"}, "the gateway's own"),
        ({"static_leases": [{**LEASE, "ip6": "fd00::"}], "subnet6": "fd00::/64"}, "write fd00::10"),
        ({"static_leases": [{**LEASE, "ip6": "fd00::5%1"}], "subnet6": "fd00::/64"}, "fd00::5%1"),
        ({"static_leases": [{**LEASE, "ip6": "192.168.64.9"}], "subnet6": "fd00::/64"}, "'192.168.64.9'"),
        ({"subnet6": "fd00::"}, "write fd00::/64"),
        ({"subnet6": "fd00::/48"}, "/64"),
        ({"subnet6": "fd00::/120"}, "/64"),
        ({"subnet6": "fd00::5/64"}, "write fd00::/64"),
        ({"subnet6": "fe80::/64"}, "not for hosts"),
        ({"subnet6": "ff02::/64"}, "not for hosts"),
        ({"subnet6": "::/64"}, "not for hosts"),
        ({"subnet6": "64:ff9b::/64"}, "not for hosts"),
        ({"subnet6": "2002:c0a8::/64"}, "not for hosts"),
        ({"subnet6": "192.168.64.0/24"}, "IPv6 prefix"),
        ({"subnet6": 7}, "IPv6 prefix"),
        ({"dhcp_start": "192.168.64.9", "dhcp_end": "192.168.64.8"}, "dhcp_start 192.168.64.9"),
        ({"capture": ""}, "capture ''"),
        ({"capture": 3}, "capture 3"),
        ({"polling": "lazy"}, "polling 'lazy'"),
        ({"workers": 0}, "workers 0"),
        ({"workers": 65}, "workers 65"),
        ({"workers": 2, "uplink": "tun"}, "uplink 'tun'"),
        ({"workers": 2, "mode": "bridged", "bridge": "br0"}, "mode 'bridged'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"max_spins": -1}, "max_spins -1"),
        ({"filtering": "none"}, "filtering 'none'"),
        ({"gateway_mac": "ff:ff:ff:ff:ff:ff"}, "ff:ff"),
        ({"limits": {"flows": 0}}, "limits flows 0"),
        ({"timeouts": [1]}, "timeouts"),
        ({"pcp_ports": 40000}, "pcp_ports 40000"),
        ({"pcp_ports": (40000,)}, "(40000, 40999)"),
        ({"pcp_ports": (0, 9)}, "pcp_ports 0"),
        ({"pcp_ports": (9, 65536)}, "pcp_ports 65536"),
        ({"pcp_ports": (9, 8)}, "starts after its end"),
        ({"pcp_ports": (8, 9), "mode": "host_only"}, "mode 'nat'"),
        ({"pcp_ports": (8, 9), "mode": "bridged", "bridge": "br0"}, "mode 'nat'"),
        ({"pcp_address": "192.0.2.1"}, "pcp_ports"),
        ({"pcp_ports": (8, 9), "pcp_address": "x"}, "pcp_address 'x'"),
        ({"pcp_ports": (8, 9), "pcp_address": "0.0.0.0"}, "pcp_address 0.0.0.0"),
        ({"pcp_ports": (8, 9), "pcp_address": "192.168.64.9"}, "pcp_address 192.168.64.9"),
        ({"limits": {"nothing_like_it": 5}}, "'nothing_like_it': choose among flows,"),
        ({"timeouts": {5: 5}}, "timeouts has nothing named 5"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NatConfig(**values)
    # Where a message names several settings, they stand in backquotes: `mode='nat'`.
    assert named in str(caught.value).replace("`", "").replace("='", " '")
    assert isinstance(caught.value, GuestnetError)
    assert isinstance(caught.value, ValueError)


_NAMES = sorted(f.name for f in fields(NatConfig))
_ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=8),
    st.lists(st.one_of(st.text(max_size=5), st.integers(), st.none()), max_size=3),
    st.dictionaries(
        st.text(max_size=5), st.one_of(st.text(max_size=5), st.integers(), st.none()), max_size=3
    ),
    st.just(object()),
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # tables of Unicode, the first time
@given(st.dictionaries(st.sampled_from(_NAMES), _ANYTHING, max_size=3))
def test_any_value_is_taken_or_refused(values: dict[str, Any]) -> None:
    try:
        config = NatConfig(**values)
    except ConfigError:
        return
    assert config.gateway in config.subnet
    assert repr(config)


def test_a_configuration_cannot_be_changed_and_travels() -> None:
    config = NatConfig(
        dns_records={"a.x": "192.0.2.1"}, static_leases=[LEASE], limits={"flows": 9}, timeouts={"udp": 200}
    )
    for mapping in (config.dns_records, config.limits, config.timeouts):
        with pytest.raises(TypeError):
            mapping["more"] = 1  # type: ignore[index]
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), config.replace(mtu=1500)):
        assert other == config
        assert hash(other) == hash(config)
        assert repr(other) == repr(config)
    assert config.replace(limits={"flows": 8}) != config
    assert config.dns_records == {"a.x": ("192.0.2.1",)}


def test_the_data_plane_knows_every_limit_and_timeout() -> None:
    config = NatConfig(limits=dict.fromkeys(LIMITS, 77), timeouts=dict.fromkeys(TIMEOUTS, 77))
    with NatNetwork(config) as network:
        assert network.is_running
