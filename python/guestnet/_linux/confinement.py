"""The confinement of commands that carry traffic, so that a fault in them is worth less to an attacker.

- `begin` runs before any thread starts, after the process that will execute the command was forked. It sets
  no_new_privs, forbids core dumps and tracing by processes of the same user, and drops all capabilities but
  those for the start.
- `settle_thread` runs in each thread of Python once devices and sockets are open. It drops all capabilities
  but those that are still needed.
- Packet threads confine themselves when they start (`runtime/threads/confinement.rs` of guestnet-io), in
  every program.

What a command executes (CMD or QEMU) has none of this, because it was forked before. `in_force.py` reads from
the kernel what is in force.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from guestnet._linux import libc

CAP_DAC_OVERRIDE = 1
CAP_KILL = 5
CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
_settled: list[int] = []
"""What the process keeps, once it has begun."""


def begin(start: Collection[int] = (), kept: Collection[int] = ()) -> None:
    """Confines the calling thread and the threads that it starts.

    `start` are the capabilities for the start, `kept` those that are needed as long as the process runs.
    """
    import resource

    libc.set_no_new_privileges()
    libc.hide_from_tracers()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _settled[:] = [_mask(kept)]
    libc.limit_capabilities(_mask([*start, *kept]))


def settle_thread() -> None:
    """Drops all capabilities of the calling thread but the kept ones. Without `begin` it does nothing."""
    if _settled:
        libc.limit_capabilities(_settled[0])


def _mask(numbers: Iterable[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask
