"""Limits of a running network: what is in force, and what its description says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guestnet import (
    ConfigError,
    EndpointNotFound,
    Limit,
    LimitChanged,
    NatConfig,
    NatNetwork,
    NotRunning,
    Spec,
    diff,
)


@pytest.fixture
def network() -> Iterator[NatNetwork]:
    with NatNetwork(NatConfig(limit="10mbit/2mbit")) as made:
        yield made


def test_limits_are_part_of_the_description_and_the_state(network: NatNetwork) -> None:
    network.create_endpoint("vm1", limit="1mbit")
    network.create_endpoint("vm2")
    wanted = network.spec()
    wanted = Spec(wanted.config.replace(limit=None, guest_limit="5mbit,flows=10"), wanted.endpoints)
    changes = diff(network.spec(), wanted)
    each = Limit.from_text("5mbit,flows=10")
    assert changes == [
        LimitChanged("limit", Limit.from_text("10mbit/2mbit"), None),
        LimitChanged("guest_limit", None, each),
    ]
    assert all(change.live for change in changes)
    assert str(changes[1]) == "limit each guest to 5mbit,flows=10"
    network.apply(changes)
    assert (network.limit, network.guest_limit) == (None, each)
    assert diff(network.spec(), wanted) == []
    assert Spec.from_dict(wanted.as_dict()) == wanted
    again = NatNetwork.from_state(network.state())
    assert (again.limit, again.guest_limit) == (None, each)


def test_wrong_limits_are_refused_and_nothing_changes(network: NatNetwork) -> None:
    before = network.limit
    with pytest.raises(EndpointNotFound):
        network.set_limit("1mbit", endpoint="nobody")
    network.create_endpoint("vm1")
    with pytest.raises(ConfigError, match="each"):
        network.set_limit("1mbit", endpoint="vm1", each=True)
    with pytest.raises(ConfigError, match="limit"):
        network.set_limit("fast")
    assert network.limit == before
    with pytest.raises(NotRunning):
        NatNetwork().set_limit("1mbit")
