"""Policies in force: what guests reach, what is cut, and what the owner sees of it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from guestnet import (
    ConfigError,
    EndpointNotFound,
    FlowDenied,
    NatConfig,
    NatNetwork,
    NotRunning,
    Policy,
    PolicyChanged,
    PolicyError,
    Rule,
    Spec,
    UnsupportedError,
    diff,
)
from guestnet.testing.guest import Guest, GuestError

from ..conftest import Events, add_memory_guest, until

LOOPBACK = "192.168.64.254"
LAB = Rule("allow", "host_loopback", label="the lab")


@pytest.fixture
def network() -> Iterator[NatNetwork]:
    config = NatConfig(dhcp=False, dns=False, host_loopback=True, policy=Policy("deny", [LAB]))
    with NatNetwork(config) as network:
        yield network


def refused(guest: Guest, address: str, port: int) -> bool:
    try:
        guest.connect(address, port).close()
    except (GuestError, ConnectionResetError):
        return True
    return False


def test_what_no_rule_allows_is_refused_at_once_and_noted(network: NatNetwork, echo: int) -> None:
    guest = add_memory_guest(network, "vm1")
    assert not refused(guest, LOOPBACK, echo)
    before = time.monotonic()
    assert refused(guest, "203.0.113.7", 80)
    assert time.monotonic() - before < 5
    until(network.denials, "a denial")
    (denial,) = network.denials("vm1")
    assert (denial.rule, denial.what, str(denial.address), denial.port) == (
        "default",
        "tcp",
        "203.0.113.7",
        80,
    )
    assert network.denials("vm2") == []


def test_another_policy_cuts_what_it_does_not_allow(network: NatNetwork, echo: int) -> None:
    guest = add_memory_guest(network, "vm1")
    kept = guest.connect(LOOPBACK, echo)
    seen = Events(network, flows=True)
    only = Policy("deny", [Rule("allow", f"{LOOPBACK}", ports=echo)])
    assert network.set_policy(only) == 0
    kept.send(b"still")
    assert kept.recv(5) == b"still"
    assert network.set_policy(Policy("deny")) == 1
    with pytest.raises(ConnectionResetError):
        kept.recv(1)
    assert seen.next(FlowDenied).rule == "default"
    assert network.policy == Policy("deny")
    assert network.set_policy(None) == 0
    assert not refused(guest, LOOPBACK, echo)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_endpoint_may_have_rules_of_its_own(workers: int, echo: int) -> None:
    config = NatConfig(dhcp=False, dns=False, host_loopback=True, policy=Policy("deny"), workers=workers)
    with NatNetwork(config) as network:
        network.create_endpoint("vm1", policy=Policy("deny", [LAB]))
        network.create_endpoint("vm2")
        one, two = (add_memory_guest(network, name) for name in ("vm1", "vm2"))
        assert not refused(one, LOOPBACK, echo)
        assert refused(two, LOOPBACK, echo)
        assert network.set_policy({"default": "allow"}, endpoint="vm2") == 0
        assert not refused(two, LOOPBACK, echo)
        network.set_policy(None, endpoint="vm2")
        assert refused(two, LOOPBACK, echo)
        with pytest.raises(EndpointNotFound):
            network.set_policy(None, endpoint="vm9")


def test_rules_name_endpoints_and_tags_that_come_later(echo: int) -> None:
    rules = [Rule("allow", "host_loopback", source=("tag:ci", "vm3"))]
    config = NatConfig(dhcp=False, dns=False, host_loopback=True, policy=Policy("deny", rules))
    with NatNetwork(config) as network:
        network.create_endpoint("vm1", tags=("ci",))
        for name, is_refused in (("vm1", False), ("vm2", True), ("vm3", False)):
            guest = add_memory_guest(network, name)
            assert refused(guest, LOOPBACK, echo) is is_refused, name


def test_a_rule_ends_at_its_time(echo: int) -> None:
    ends = datetime.now(UTC) + timedelta(seconds=1)
    config = NatConfig(dhcp=False, dns=False, host_loopback=True)
    with NatNetwork(config) as network:
        guest = add_memory_guest(network, "vm1")
        network.set_policy(Policy("deny", [Rule("allow", "host_loopback", expires=ends)]))
        connection = guest.connect(LOOPBACK, echo)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        assert datetime.now(UTC) >= ends
        assert refused(guest, LOOPBACK, echo)


def test_guests_reach_each_other_by_rules_alone() -> None:
    rules = [Rule("allow", "guest:vm1"), Rule("deny", "guests")]
    with NatNetwork(NatConfig(dhcp=False, dns=False, policy=Policy("allow", rules))) as network:
        one, two = (add_memory_guest(network, name) for name in ("vm1", "vm2"))
        served = []
        one.serve(80, lambda connection: served.append(connection.recv(2)))
        two.serve(80, lambda connection: served.append(connection.recv(2)))
        two.connect("192.168.64.2", 80).send(b"ok")
        until(lambda: served == [b"ok"], "the answer")
        assert refused(one, "192.168.64.3", 80)


def test_clients_of_published_ports_are_judged_by_their_address() -> None:
    rules = [Rule("deny", direction="in", source="127.0.0.0/8")]
    with NatNetwork(NatConfig(dhcp=False, dns=False, policy=Policy("allow", rules))) as network:
        guest = add_memory_guest(network, "vm1")
        guest.serve(80, lambda connection: connection.send(b"hi"))
        forward = network.publish("127.0.0.1:0:vm1:80")
        with (
            pytest.raises(ConnectionResetError),
            socket.create_connection(("127.0.0.1", forward.host_port), timeout=20) as client,
        ):
            client.recv(2)
        network.set_policy(None)
        with socket.create_connection(("127.0.0.1", forward.host_port), timeout=20) as client:
            assert client.recv(2) == b"hi"


def test_a_policy_is_part_of_the_description_and_the_state(network: NatNetwork) -> None:
    other = Policy("deny", [Rule("allow", "pypi.org")])
    wanted = Spec(network.config.replace(policy=other))
    changes = diff(network.spec(), wanted)
    assert changes == [PolicyChanged(network.config.policy, other)]
    network.apply(changes)
    assert network.policy == other
    assert diff(network.spec(), wanted) == []
    assert Spec.from_dict(wanted.as_dict()) == wanted
    assert NatNetwork.from_state(network.state()).policy == other


def test_wrong_policies_are_refused_and_nothing_changes(network: NatNetwork) -> None:
    before = network.policy
    with pytest.raises(ConfigError, match="is not a Policy"):
        network.set_policy("deny")  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="Did you mean allow"):
        network.set_policy({"rule": [{"action": "alow"}]})
    with pytest.raises(TypeError, match="tags"):
        network.create_endpoint("vm7", tags="ci")
    assert network.policy == before
    assert network.get_endpoint("vm7") is None
    with pytest.raises(NotRunning):
        NatNetwork().set_policy(None)
    with pytest.raises(ConfigError, match="leave `policy` out"):
        NatConfig(mode="bridged", bridge="br0", policy=Policy())


def test_guests_read_their_rules_and_denials_and_nobody_elses() -> None:
    rules = [Rule("allow", "192.0.2.0/24", source="vm1"), Rule("deny", "198.51.100.0/24", source="vm2")]
    config = NatConfig(dhcp=False, dns=False, policy=Policy("deny", rules, explain=True))
    with NatNetwork(config) as network:
        one, two = (add_memory_guest(network, name) for name in ("vm1", "vm2"))
        assert refused(two, "198.51.100.1", 80)
        until(network.denials, "a denial")
        told = [page(guest, "192.168.64.1") for guest in (one, two)]
        assert [one["guest"] for one in told] == ["vm1", "vm2"]
        assert [[rule["to"] for rule in one["rules"]] for one in told] == [
            ["192.0.2.0/24"],
            ["198.51.100.0/24"],
        ]
        assert [len(one["denials"]) for one in told] == [0, 1]
        network.set_policy(Policy("deny"))
        with pytest.raises(AssertionError, match="404"):
            page(one, "192.168.64.1")


def page(guest: Guest, address: str) -> dict[str, Any]:
    connection = guest.connect(address, 80)
    connection.send(b"GET / HTTP/1.1\r\nHost: policy.guestnet.internal\r\n\r\n")
    got = b""
    while part := connection.recv(65536):
        got += part
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head.decode()
    found: dict[str, Any] = json.loads(body)
    return found


def test_the_audit_log_has_flows_and_denials(network: NatNetwork, echo: int, tmp_path: Path) -> None:
    guest = add_memory_guest(network, "vm1")
    end = network.audit(tmp_path / "audit.jsonl", starts=True)
    guest.connect(LOOPBACK, echo).close()
    assert refused(guest, "203.0.113.7", 80)

    def events() -> list[str]:
        return [json.loads(line)["event"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]

    until(lambda: {"denied", "start"} <= set(events()), "two lines")
    end()
    first = json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[0])
    assert (first["guest"], first["rule"], first["destination"]) == ("vm1", "the lab", f"{LOOPBACK}:{echo}")


def test_a_required_audit_log_that_cannot_be_written_denies_everything(echo: int) -> None:
    policy = Policy("allow", audit="required")
    with NatNetwork(NatConfig(dhcp=False, dns=False, host_loopback=True, policy=policy)) as network:
        guest = add_memory_guest(network, "vm1")
        network.audit("/dev/full", starts=True)
        guest.connect(LOOPBACK, echo)
        until(lambda: refused(guest, LOOPBACK, echo), "a refusal")


def test_a_policy_is_learned_from_what_guests_do(echo: int) -> None:
    with NatNetwork(NatConfig(dhcp=False, dns=False, host_loopback=True)) as network:
        guest = add_memory_guest(network, "vm1")
        learner = network.learn()
        guest.connect(LOOPBACK, echo).close()
        until(lambda: learner.policy().rules, "a rule")
        learned = learner.policy()
        assert learned == Policy("deny", [Rule("allow", LOOPBACK, ports=(echo,), protocol="tcp")])
        network.set_policy(learned)
        assert not refused(guest, LOOPBACK, echo)
        with pytest.raises(UnsupportedError, match="leave the policy"):
            network.learn()
