"""The mode `bridged` as far as it goes without privilege: what is refused, and in which words."""

from __future__ import annotations

import pytest
from guestnet import ConfigError, NatConfig, NatNetwork, NetMode, UnsupportedError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "bridged"}, "bridge='br0'"),
        ({"bridge": "br0"}, "mode='bridged'"),
        ({"mode": "bridged", "bridge": ""}, "not the name"),
        ({"mode": "bridged", "bridge": "a/b"}, "not the name"),
        ({"mode": "bridged", "bridge": "x" * 16}, "not the name"),
        ({"mode": "bridged", "bridge": 7}, "not the name"),
        ({"mode": "bridged", "bridge": "br0", "host_loopback": True}, "host_loopback"),
        ({"mode": "bridged", "bridge": "br0", "isolated": True}, "isolated"),
        ({"mode": "bridged", "bridge": "br0", "uplink": "tun"}, "uplink"),
    ],
)
def test_wrong_configurations(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NatConfig(**values)  # type: ignore[arg-type]


def test_the_segment_serves() -> None:
    config = NatConfig(mode="bridged", bridge="br0")
    assert (config.dhcp, config.dns, config.mode) == (False, False, NetMode.BRIDGED)
    assert config.replace(mtu=9000).bridge == "br0"


def test_an_endpoint_has_the_address_that_it_shows() -> None:
    network = NatNetwork(NatConfig(mode="bridged", bridge="br0"))
    endpoint = network.create_endpoint("vm1", mac="02:00:00:00:00:07")
    assert (str(endpoint.ip), endpoint.mode) == ("0.0.0.0", NetMode.BRIDGED)
    with pytest.raises(ConfigError, match="leave it out"):
        network.create_endpoint("vm2", ip="192.168.64.9")
    network.create_endpoint("vm2")
    network.remove_endpoint("vm1")
    assert [e.id for e in network.endpoints] == ["vm2"]


def test_a_segment_that_is_not_there() -> None:
    network = NatNetwork(NatConfig(mode="bridged", bridge="nowhere0"))
    with pytest.raises(ConfigError, match="'nowhere0'"):
        network.start()
    assert not network.is_running


def test_a_segment_that_is_no_ethernet() -> None:
    network = NatNetwork(NatConfig(mode="bridged", bridge="lo"))
    # An ordinary user may not look that far.
    with pytest.raises(UnsupportedError, match=r"Ethernet|CAP_NET_RAW"):
        network.start()
    assert not network.is_running
