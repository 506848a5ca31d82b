"""The test guest: Debian's cloud kernel with a tiny init under QEMU (see scripts/guest_image.py)."""

from __future__ import annotations

import base64
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lab import need

BUILDER = Path(__file__).resolve().parents[2] / "scripts" / "guest_image.py"
BOOT = 90.0
"""Seconds that a guest may take to boot without KVM on a busy machine; it takes 2 to 10."""

MEMORY = 160
"""Megabytes that a guest has."""


@dataclass(frozen=True)
class Image:
    """What QEMU boots."""

    kernel: str
    initrd: str

    def command(
        self,
        name: str,
        command: str | None = None,
        *,
        nic: tuple[str, ...] = (),
        accel: str = "tcg",
        address: str | None = None,
    ) -> list[str]:
        """The QEMU command line of a guest that runs `command` and powers off; without one it stays up. Its
        console is the process's output. `address` is ADDRESS/BITS,GATEWAY; without it DHCP is asked."""
        # On a busy machine an emulated timer can be too late for the kernel's check of it, which is a panic.
        append = f"console=ttyS0 quiet panic=-1 no_timer_check guest.name={name}"
        if address is not None:
            append += f" guest.ip={address}"
        if command is not None:
            append += f" guest.cmd={base64.b64encode(command.encode()).decode()}"
        # The kernel cuts a longer line off (COMMAND_LINE_SIZE).
        assert len(append) < 2048, "the guest's command is too long for the kernel's command line"
        return [
            need.program("qemu-system-x86_64", "qemu-system-x86"),
            "-nodefaults", "-display", "none", "-no-reboot", "-accel", accel, "-m", str(MEMORY),
            "-kernel", self.kernel, "-initrd", self.initrd, "-append", append, "-serial", "stdio", *nic,
        ]  # fmt: skip


def stream_nic(path: str, mac: str) -> tuple[str, ...]:
    """A NIC on a guestnet `--stream` socket."""
    netdev = f"stream,id=n,server=off,addr.type=unix,addr.path={path}"
    return ("-netdev", netdev, "-device", f"virtio-net-pci,netdev=n,mac={mac}")


def vhost_nic(
    path: str, mac: str, *, queues: int = 1, device: str = "", chardev: str = ""
) -> tuple[str, ...]:
    """A NIC on a guestnet `--vhost-user` socket, with the guest's memory shared; `device` and `chardev`
    are added to their options. Without MSI-X: QEMU 7.2 without KVM ends with a memory fault otherwise,
    whatever the back-end (docs/performance/notes.md)."""
    card = f"virtio-net-pci,netdev=n,mac={mac},vectors=0{device}"
    if queues > 1:
        card += ",mq=on"
    return (
        "-object", f"memory-backend-memfd,id=mem,size={MEMORY}M,share=on", "-machine", "memory-backend=mem",
        "-chardev", f"socket,id=c,path={path}{chardev}",
        "-netdev", f"vhost-user,id=n,chardev=c,queues={queues}", "-device", card,
    )  # fmt: skip


def build(directory: Path, *programs: str) -> Image:
    """Builds the image into `directory` from the system's kernel and busybox; static `programs` are in it."""
    release = need.cloud_kernel()
    need.program("busybox", "busybox-static")
    initrd = directory / "guest.cpio.gz"
    command = [sys.executable, str(BUILDER), "--release", release, "--output", str(initrd)]
    subprocess.run([*command, *(f"--add={program}" for program in programs)], check=True)
    initrd.chmod(0o644)
    return Image(f"/boot/vmlinuz-{release}", str(initrd))
