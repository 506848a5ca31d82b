"""Forwards that follow their guests, with a worker that a test plays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import pytest
from guestnet import NatNetwork
from guestnet.errors import BusyError, GuestnetError
from guestnet.model.forward_spec import ForwardSpec
from guestnet.model.handles import Ids
from guestnet.runtime.published.publishing import Publishing


async def test_a_refused_retarget_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """`target` says where the worker leads the port, not where it was meant to lead."""
    network = NatNetwork()
    asked: list[object] = []
    refusals: list[Callable[[GuestnetError], None]] = []

    async def do(*_: object, **_keywords: object) -> None: ...

    def ensure(
        _command: object, _number: int, guest: object, *, refused: Callable[[GuestnetError], None]
    ) -> None:
        asked.append(guest)
        refusals.append(refused)

    plane = SimpleNamespace(add_uplink_forward=None, retarget_forward=None)
    control: Any = SimpleNamespace(plane=plane, do=do, ensure=ensure)
    publishing = Publishing(control, network._registry, Ids(), do)
    publishing.external = (IPv4Address("192.0.2.1"),)
    forward = await publishing.add_external(ForwardSpec.parse("8080:vm1:80"))
    assert (forward.target, asked) == (None, [])
    vm1 = network.create_endpoint("vm1")
    with caplog.at_level(logging.WARNING, logger="guestnet"):
        publishing.refresh()
        assert forward.target == vm1.ip
        refusals.pop()(BusyError("the table is full"))
    assert forward.target is None
    assert "could not be led" in caplog.text
    publishing.refresh()
    assert asked == [(vm1.ip, 80)] * 2
    assert forward.target == vm1.ip
    publishing.refresh()
    assert len(asked) == 2
