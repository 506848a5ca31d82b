"""What the commands that carry traffic give up, so that a fault in them is worth less to an attacker.

- `begin`, before any thread is started and after what is to be executed was forked: no_new_privs, no core
  dumps, no tracing by processes of the same user, and all capabilities but those for the start.
- `settle_thread`, in each thread of Python once devices and sockets are open: all capabilities but those for
  what is left to do.
- Packet threads confine themselves when they start (`confinement.rs` of guestnet-io), in every program.

What a command executes, CMD or QEMU, has none of this: it was forked before. `in_force` reads from the kernel
what holds.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from guestnet._linux import libc

CAP_DAC_OVERRIDE = 1
CAP_KILL = 5
CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13
_NAMES = {
    CAP_DAC_OVERRIDE: "dac_override",
    CAP_KILL: "kill",
    CAP_NET_BIND_SERVICE: "net_bind_service",
    CAP_NET_ADMIN: "net_admin",
    CAP_NET_RAW: "net_raw",
}

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


@dataclass(frozen=True)
class InForce:
    """What holds for all threads of this process."""

    no_new_privileges: bool
    filtered: int
    """Threads under a seccomp filter."""
    capabilities: tuple[str, ...]
    """What any thread holds."""

    def details(self) -> dict[str, object]:
        """For programs."""
        return asdict(self)

    def __str__(self) -> str:
        rights = "no new privileges" if self.no_new_privileges else "NEW PRIVILEGES ARE POSSIBLE"
        held = ", ".join(self.capabilities) or "none"
        threads = "thread" if self.filtered == 1 else "threads"
        return (
            f"confined: {rights}, no core dumps, capabilities: {held}, "
            f"{self.filtered} {threads} under a seccomp filter"
        )


def in_force() -> InForce:
    """What the kernel says of this process now."""
    threads = [_status(name) for name in os.listdir("/proc/self/task")]
    threads = [thread for thread in threads if thread]
    held = 0
    for thread in threads:
        held |= int(thread["CapPrm"], 16)
    return InForce(
        all(thread.get("NoNewPrivs") == "1" for thread in threads),
        sum(thread.get("Seccomp") == "2" for thread in threads),
        tuple(_NAMES.get(number, str(number)) for number in range(64) if held >> number & 1),
    )


def _status(thread: str) -> dict[str, str]:
    try:
        with open(f"/proc/self/task/{thread}/status", encoding="utf-8", errors="replace") as file:
            return {name: text.strip() for name, _, text in (line.partition(":") for line in file)}
    except OSError:
        return {}  # it has ended


def _mask(numbers: Iterable[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask
