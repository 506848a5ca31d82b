"""The uplink "tun" as far as it can be tested without a device: configuration, errors, and the datapath by
hand of a network that does not run. With a device: tests/interop/test_tun.py."""

from __future__ import annotations

import shutil
from ipaddress import IPv4Address
from pathlib import Path

import guestnet
import pytest
from guestnet import (
    ConfigError,
    DatapathPoller,
    NatConfig,
    NatNetwork,
    NatResult,
    UnsupportedError,
    Uplink,
)
from guestnet._linux import masquerade
from guestnet.datapath.poller import MemoryUplink
from unit.packets import check, destination, ethernet, source, udp

GUEST, OUTSIDE = ("192.168.64.2", 50000), ("198.51.100.7", 80)


def network() -> NatNetwork:
    return NatNetwork(NatConfig(uplink="tun", external="203.0.113.1"))


def test_configuration() -> None:
    config = NatConfig(uplink="tun", external=["203.0.113.1", "203.0.113.2"], masquerade=True)
    assert config.uplink is Uplink.TUN
    assert config.external == (IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2"))
    assert NatConfig().uplink is Uplink.SOCKETS
    assert config.replace(mtu=1400).external == config.external


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"uplink": "bridge"}, "'sockets', 'tun'"),
        ({"external": "203.0.113.1"}, "Only `uplink='tun'` has `external`"),
        ({"masquerade": True}, "leave `masquerade` out"),
        ({"uplink": "tun", "external": "192.168.64.9"}, "outside 192.168.64.0/24"),
        ({"uplink": "tun", "external": "127.0.0.1"}, "cannot be an address"),
        ({"uplink": "tun", "external": ["203.0.113.1", "203.0.113.1"]}, "twice"),
        ({"uplink": "tun", "external": "nonsense"}, "not an IPv4 address"),
        ({"uplink": "tun", "port_range": (500, 400)}, "starts after its end"),
        ({"uplink": "tun", "port_range": (500,)}, "first and a last"),
        ({"uplink": "tun", "forwarding": "yes"}, "neither True nor False"),
    ],
)
def test_a_wrong_value_is_named(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        NatConfig(**wrong)  # type: ignore[arg-type]


def test_the_rings_of_a_network_by_hand() -> None:
    net = network()
    index = net.packet_pool.put(ethernet(udp(GUEST, OUTSIDE)))
    assert index is not None
    assert net.tx_ring.enqueue(index)
    poller = DatapathPoller(batch_size=128)
    assert poller.poll_once(net)
    outside = net.datapath.uplink
    assert isinstance(outside, MemoryUplink)
    [out] = outside.sent
    check(out)
    assert source(out) == ("203.0.113.1", 50000)
    outside.deliver(udp(OUTSIDE, source(out), b"answer"))
    assert poller.poll_once(net)
    index = net.rx_ring.dequeue()
    assert index is not None
    assert destination(net.packet_pool.get(index)[14:]) == GUEST
    net.packet_pool.free(index)
    assert not poller.poll_once(net)
    assert (net.connection_count, net.nat_stats().outbound, net.conntrack_stats().connections) == (1, 1, 1)
    net.maintenance()
    assert net.expire_connections() == 0


@pytest.mark.parametrize("size", [1, 64, 65, 200])
def test_a_poll_takes_a_batch_of_its_size(size: int) -> None:
    net = network()
    for n in range(250):
        index = net.packet_pool.put(ethernet(udp((GUEST[0], 50000 + n), OUTSIDE)))
        assert index is not None
        assert net.tx_ring.enqueue(index)
    poller = DatapathPoller(batch_size=size)
    outside = net.datapath.uplink
    assert isinstance(outside, MemoryUplink)
    assert poller.poll_once(net)
    assert [source(packet)[1] for packet in outside.sent] == [50000 + n for n in range(size)]
    while poller.poll_once(net):
        pass
    assert len(outside.sent) == 250


def test_packets_in_place() -> None:
    net = network()
    frame = bytearray(ethernet(udp(GUEST, OUTSIDE)))
    assert net.process_tx_packet(frame) is NatResult.TRANSLATED
    back = bytearray(ethernet(udp(OUTSIDE, source(frame[14:]))))
    assert net.process_rx_packet(back) is NatResult.TRANSLATED
    assert destination(back[14:]) == GUEST


def test_a_network_on_sockets_has_no_device() -> None:
    net = NatNetwork()
    assert (net.connection_count, net.expire_connections(), net.external, net.uplink_device) == (
        0,
        0,
        (),
        None,
    )


def test_event_driven_waits_for_frames() -> None:
    poller = guestnet.DatapathPoller(strategy="event_driven")
    assert not poller.poll_once(network(), patience=0.001)


def test_runs_are_noted_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no other place it is one in /tmp, whose name can be foreseen."""
    monkeypatch.setattr(masquerade, "_place", lambda: tmp_path / "guestnet-1000" / "guestnet-uplinks")
    with masquerade._registry() as place:
        assert place.stat().st_mode & 0o777 == 0o700
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "lock").write_text("mine")
    base, place = tmp_path / "guestnet-1000", tmp_path / "guestnet-1000" / "guestnet-uplinks"

    def refused() -> None:
        with pytest.raises(UnsupportedError, match="remove it"), masquerade._registry():
            pass

    shutil.rmtree(place)
    place.symlink_to(precious)
    refused()
    place.unlink()
    place.mkdir()
    place.chmod(0o777)
    refused()
    place.chmod(0o700)
    base.chmod(0o777)
    refused()
    assert (precious / "lock").read_text() == "mine"
