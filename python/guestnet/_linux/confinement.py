"""What the commands that carry traffic give up, so that a fault in them is worth less to an attacker.

- `begin`, before any thread is started and after what is to be executed was forked: no_new_privs, no core
  dumps, no tracing by processes of the same user, and all capabilities but those for the start.
- `settle_thread`, in each thread of Python once devices and sockets are open: all capabilities but those for
  what is left to do.
- Packet threads confine themselves when they start (`runtime/confinement.rs` of guestnet-io), in every
  program.

What a command executes, CMD or QEMU, has none of this: it was forked before. `in_force.py` reads from the
kernel what holds.
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
    """Confines the calling thread and those that it starts. `start` are the capabilities that starting needs,
    `kept` those that are needed as long as the process runs."""
    import resource

    libc.set_no_new_privileges()
    libc.hide_from_tracers()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _settled[:] = [_mask(kept)]
    libc.limit_capabilities(_mask([*start, *kept]))


def settle_thread() -> None:
    """Leaves the calling thread the capabilities that are kept. Nothing happens in a process that has not
    begun."""
    if _settled:
        libc.limit_capabilities(_settled[0])


def _mask(numbers: Iterable[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask
