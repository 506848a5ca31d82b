"""How this process is confined, as the kernel reports it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from guestnet._linux import confinement as c

_NAMES = {
    c.CAP_DAC_OVERRIDE: "dac_override",
    c.CAP_KILL: "kill",
    c.CAP_NET_BIND_SERVICE: "net_bind_service",
    c.CAP_NET_ADMIN: "net_admin",
    c.CAP_NET_RAW: "net_raw",
}


@dataclass(frozen=True)
class InForce:
    """What is in force for all threads of this process."""

    no_new_privileges: bool
    filtered: int
    """Threads under a seccomp filter."""
    capabilities: tuple[str, ...]
    """What any thread holds."""

    def details(self) -> dict[str, object]:
        """The same as values for JSON."""
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
    """Reads from the kernel how this process is confined."""
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
