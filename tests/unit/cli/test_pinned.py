"""Published ports that name an automatic id follow the machine over restarts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guestnet import ForwardSpec, GuestUp, NatNetwork
from guestnet.cli.runner.pinned import PinnedGuests, automatic_ids
from guestnet.errors import GuestnetError
from guestnet.model.ipam import parse_mac
from guestnet.runtime.endpoint import Endpoint
from hypothesis import given
from hypothesis import strategies as st

A, B, C = "02:00:00:00:00:0a", "02:00:00:00:00:0b", "02:00:00:00:00:0c"


class Run:
    """One run of a network whose ports name vm1."""

    def __init__(self, path: Path, *ids: str, subnet: str = "192.168.64.0/24") -> None:
        self.network = NatNetwork(subnet=subnet)
        self.pinned = PinnedGuests(self.network, ids or ("vm1",), str(path))

    def arrive(self, mac: str) -> Endpoint:
        endpoint = self.network._registry.arrive(parse_mac(mac), "net.sock")
        self.pinned.event(GuestUp(endpoint=endpoint.id, mac=endpoint.mac, ip=endpoint.ip))
        return endpoint


@contextmanager
def run(path: Path, *ids: str, subnet: str = "192.168.64.0/24") -> Iterator[Run]:
    made = Run(path, *ids, subnet=subnet)
    yield made
    made.pinned.close()


def test_a_restart_in_another_order_keeps_the_id_and_the_address(tmp_path: Path) -> None:
    path = tmp_path / "net.sock.guests"
    with run(path) as first:
        assert [first.arrive(mac).id for mac in (A, B)] == ["vm1", "vm2"]
        address = first.network["vm1"].ip
    assert path.stat().st_mode & 0o777 == 0o600
    for order in ([B, A], [C, B, A], [A]):
        with run(path) as again:
            found = {mac: again.arrive(mac) for mac in order}
            assert found[A].id == "vm1"
            assert found[A].ip == address
            assert all(endpoint.id != "vm1" for mac, endpoint in found.items() if mac != A)


def test_only_ids_that_ports_name_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "guests"
    with run(path, "vm2") as first:
        assert [first.arrive(mac).id for mac in (A, B)] == ["vm1", "vm2"]
    assert list(json.loads(path.read_text())["guests"]) == [B]
    with run(path, "vm2") as again:
        assert [again.arrive(mac).id for mac in (B, A)] == ["vm2", "vm1"]


def test_another_subnet_keeps_the_id_alone(tmp_path: Path) -> None:
    path = tmp_path / "guests"
    with run(path) as first:
        first.arrive(A)
    with run(path, subnet="10.9.0.0/24") as again:
        assert again.arrive(B).id == "vm2"
        one = again.arrive(A)
        assert (one.id, str(one.ip)) == ("vm1", "10.9.0.3")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"version": 2, "guests": {}}',
        '{"version": 1}',
        '{"version": 1, "guests": {"x": {}}}',
        "\0",
    ],
)
def test_a_damaged_file_is_set_aside(tmp_path: Path, content: str) -> None:
    path = tmp_path / "guests"
    path.write_text(content)
    with run(path) as made:
        assert made.pinned.set_aside == f"{path}.damaged"
        assert (tmp_path / "guests.damaged").read_text() == content
        made.arrive(A)
    assert A in path.read_text()


@given(st.text() | st.recursive(st.none() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_content_is_taken_or_set_aside(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.mktemp("any") / "guests"
    path.write_text(json.dumps({"version": 1, "guests": content}), errors="replace")
    with run(path):
        pass


def test_a_file_that_is_a_link_or_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("{}")
    (tmp_path / "link").symlink_to("target")
    for path in (tmp_path / "link", tmp_path):
        with pytest.raises(GuestnetError, match="move it away"):
            Run(path)


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with run(tmp_path / "missing" / "guests") as made:
        made.arrive(A)
    assert made.pinned.failure == "No such file or directory"


def test_which_ids_are_automatic() -> None:
    ports = [ForwardSpec.parse(text) for text in ("1:vm1:1", "2:web:1", "3:vm3:1", "4:10.0.0.1:1", "5:1")]
    assert automatic_ids(ports, ["vm3", None]) == ["vm1"]


def test_addresses_that_are_kept_are_given_up_when_no_other_is_left(tmp_path: Path) -> None:
    network = NatNetwork(subnet="192.168.64.0/29")
    for number in range(3):
        network.recall_guest(f"02:00:00:00:01:{number:02x}", f"vm{number + 1}", f"192.168.64.{number + 2}")
    network.recall_guest("02:00:00:00:01:00", "vm1", "192.168.64.2")
    came = [network._registry.arrive(bytes((2, 0, 0, 0, 0, n)), "net.sock") for n in range(5)]
    assert len({one.ip for one in came}) == 5
    assert {one.id for one in came}.isdisjoint({"vm1", "vm2", "vm3"})
