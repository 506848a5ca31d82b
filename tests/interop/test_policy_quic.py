"""QUIC by a real implementation (aioquic) against a policy: only the allowed name is spoken to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab
from lab.namespaces import OUT4, SECOND4
from lab.policy_guest import Guest, certificate, policy_guest

TALK = str(Path(__file__).with_name("clients") / "quic_talk.py")
WWW, ALIAS, SECOND = "www.example.test", "alias.example.test", "second.example.test"
ONE_NAME = """
default = "deny"
[[rule]]
action = "allow"
to = "www.example.test"
"""
NOT_THE_ALIAS = """
default = "allow"
[[rule]]
action = "deny"
to = "alias.example.test"
"""


@pytest.fixture(scope="module")
def servers(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> None:
    cert, key = certificate(lab, tmp_path_factory.mktemp("certificate"))
    for address in (OUT4, SECOND4):
        lab.start([sys.executable, TALK, "serve", address, cert, key], ns=lab.out, ready="ready")


@pytest.fixture(params=["sockets", "tun"])
def guest(lab: Lab, servers: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Guest]:
    with policy_guest(lab, tmp_path, ONE_NAME, request.param) as made:
        yield made


def answered(guest: Guest, host: str, name: str, version: str = "1") -> bool:
    done = guest.run("timeout", "12", sys.executable, TALK, "ask", host, name, version)
    return done.stdout == "hello\n"


@pytest.mark.parametrize("version", ["1", "2"])
def test_one_name_is_allowed(guest: Guest, version: str) -> None:
    assert answered(guest, WWW, WWW, version)
    assert not answered(guest, WWW, ALIAS, version)
    assert not answered(guest, SECOND4, WWW, version)
    assert ["udp", "default", "policy", WWW, ALIAS] in guest.denials()


def test_one_name_is_denied_at_any_address(guest: Guest) -> None:
    guest.put_in_force(NOT_THE_ALIAS)
    assert answered(guest, SECOND, SECOND)
    assert answered(guest, OUT4, WWW)
    assert not answered(guest, OUT4, ALIAS)
