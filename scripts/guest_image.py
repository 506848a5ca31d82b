#!/usr/bin/env python3
"""Builds the initramfs of the test guest: Debian's cloud kernel, busybox, and one init script.

The guest boots, takes an address by DHCP on each NIC, runs the shell command that the kernel's command
line names as `guest.cmd=BASE64`, prints `GUEST-STATUS n` on the serial console and powers off.
`guest.name=NAME` is the host name that it tells the DHCP server; `guest.ip=ADDRESS/BITS,GATEWAY` takes an
address without one. Without a command it stays up.

    python3 scripts/guest_image.py --release 6.1.0-18-cloud-amd64 --output guest.cpio.gz
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

# Debian's cloud kernel has virtio_net as a module. Each one needs those before it.
MODULES = (
    "failover",
    "net_failover",
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_net",
)

INIT = r"""#!/bin/sh
export PATH=/bin HOME=/
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /tmp /etc /var/run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
exec </dev/console >/dev/console 2>&1
for m in MODULES; do insmod /modules/$m.ko || echo "GUEST-PROBLEM insmod $m"; done
name=guest command= address=
for word in $(cat /proc/cmdline); do
    case $word in
        guest.name=*) name=${word#guest.name=} ;;
        guest.cmd=*) command=${word#guest.cmd=} ;;
        guest.ip=*) address=${word#guest.ip=} ;;
    esac
done
hostname "$name"
ip link set lo up
for device in /sys/class/net/eth*; do
    device=${device##*/}
    ip link set "$device" up
    if [ -n "$address" ]; then
        ip address add "${address%,*}" dev "$device"
        ip route add default via "${address#*,}" dev "$device"
        continue
    fi
    udhcpc -i "$device" -s /dhcp -x hostname:"$name" -t 10 -T 1 -b -S >/tmp/dhcp.log 2>&1 || cat /tmp/dhcp.log
done
echo "GUEST-UP $name $(ip -4 -o addr show dev eth0 2>/dev/null | tr -s ' ' | cut -d' ' -f4)"
if [ -z "$command" ]; then
    while :; do sleep 3600; done
fi
echo "$command" | base64 -d >/tmp/command
sh /tmp/command
echo "GUEST-STATUS $?"
sync
poweroff -f
"""

DHCP = r"""#!/bin/sh
case $1 in
    bound|renew)
        ip address flush dev "$interface"
        ip address add "$ip/${mask:-24}" dev "$interface"
        [ -n "$mtu" ] && ip link set "$interface" mtu "$mtu"
        for r in $router; do ip route add default via "$r" dev "$interface"; break; done
        : >/etc/resolv.conf
        [ -n "$search$domain" ] && echo "search ${search:-$domain}" >>/etc/resolv.conf
        for s in $dns; do echo "nameserver $s" >>/etc/resolv.conf; done
        ;;
    deconfig) ip address flush dev "$interface" ;;
esac
"""


class Archive:
    """A cpio archive in the kernel's `newc` format (Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, body: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (
            self._inode, mode, 0, 0, 1, 0, len(body), 0, 0, device[0], device[1], len(path), 0
        )  # fmt: skip
        self.data += b"070701" + b"".join(b"%08X" % f for f in fields) + path
        self._pad()
        self.data += body
        self._pad()

    def _pad(self) -> None:
        self.data += bytes(-len(self.data) % 4)

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self.data)


def module(release: str, name: str) -> bytes:
    """The bytes of a kernel module, unpacked where the distribution packs them; empty when it is built in."""
    root = Path("/lib/modules") / release
    builtin = (root / "modules.builtin").read_text()
    if f"/{name}.ko\n" in builtin:
        return b""
    for path in sorted(root.rglob(f"{name}.ko*")):
        if path.suffix == ".ko":
            return path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes())
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
    raise FileNotFoundError(f"kernel {release} has no module {name}")


def build(release: str, busybox: str, programs: Sequence[Path] = ()) -> bytes:
    """The image as bytes, gzip-compressed. `programs` are linked statically."""
    archive = Archive()
    for directory in ("bin", "dev", "etc", "modules", "proc", "sys", "tmp", "www"):
        archive.add(directory, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("bin/busybox", 0o100755, Path(busybox).read_bytes())
    for program in programs:
        archive.add(f"bin/{program.name}", 0o100755, program.read_bytes())
    archive.add("bin/sh", 0o120777, b"busybox")
    present = []
    for name in MODULES:
        if body := module(release, name):
            archive.add(f"modules/{name}.ko", 0o100644, body)
            present.append(name)
    archive.add("init", 0o100755, INIT.replace("MODULES", " ".join(present)).encode())
    archive.add("dhcp", 0o100755, DHCP.encode())
    archive.add("www/index.html", 0o100644, b"a page from the guest\n")
    # Mostly machine code; the lowest level unpacks fastest in an emulated machine.
    return gzip.compress(archive.finish(), compresslevel=1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", required=True, help="kernel release, a directory of /lib/modules")
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    parser.add_argument(
        "--add", action="append", default=[], type=Path, metavar="FILE", help="a static program for /bin"
    )
    args = parser.parse_args()
    busybox = shutil.which("busybox")
    if busybox is None:
        print(
            "guest_image.py needs busybox, statically linked (Debian package busybox-static)", file=sys.stderr
        )
        return 1
    try:
        image = build(args.release, busybox, args.add)
    except OSError as error:
        print(f"guest_image.py: {error}", file=sys.stderr)
        return 1
    args.output.write_bytes(image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
