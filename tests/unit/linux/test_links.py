"""What the tables of routes say about a subnet that guests are to have."""

from __future__ import annotations

from ipaddress import IPv6Network
from pathlib import Path

import pytest
from guestnet._linux.links import routes6_into

_NONE = "0" * 32
_ROWS = (
    ("fd000000000000000000000000000000", 64, "eth0"),
    ("fd000000000000020000000000000000", 63, "eth1"),
    ("fe800000000000000000000000000000", 64, "eth0"),
    (_NONE, 0, "eth0"),
    ("fd000000000000000000000000000002", 128, "eth0"),
)


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("fd00::/64", ["fd00::/64 on eth0"]),
        ("fd00:0:0:3::/64", ["fd00:0:0:2::/63 on eth1"]),
        ("fd00:0:0:4::/64", []),
    ],
)
def test_routes_into_a_prefix(tmp_path: Path, prefix: str, found: list[str]) -> None:
    table = tmp_path / "ipv6_route"
    rows = [f"{net} {length:02x} {_NONE} 00 {_NONE} 00000400 1 0 3 {name}\n" for net, length, name in _ROWS]
    table.write_text("".join(rows))
    assert routes6_into(IPv6Network(prefix), str(table)) == found


def test_a_system_without_ipv6_has_no_routes(tmp_path: Path) -> None:
    assert routes6_into(IPv6Network("fd00::/64"), str(tmp_path / "none")) == []
