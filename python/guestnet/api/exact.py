"""Specifications of ports that are open."""

from __future__ import annotations

from guestnet.model.forward_spec import ForwardSpec
from guestnet.runtime.published.forward import Forward


def exact(forward: Forward) -> ForwardSpec:
    """The specification with the ports that were opened, also where the kernel chose one."""
    from dataclasses import replace

    first = forward.host_port
    return replace(forward.spec, host_ports=range(first, first + len(forward.spec.host_ports)))
