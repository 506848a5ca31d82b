"""The contenders with virtual machines: the same small system under QEMU, each with another network."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from contenders import GUESTNET, ROUTER4, Contender, gvproxy_expose, kernel_nat
from guests import PORT, Arena, Failed, Guest, published
from lab import user, vm
from lab.namespaces import OUT4, ip
from lab.need import PATH
from lab.process import Process, wait_until

MAC = "5a:94:ef:e4:0c:ee"
"""The one that gvproxy knows."""


class Boot:
    """Boots the machines; the image is made with the first."""

    def __init__(self) -> None:
        self._image: vm.Image | None = None

    def __call__(
        self,
        arena: Arena,
        nic: Sequence[str],
        serving: Sequence[Process],
        outside: str,
        dns: str,
        *,
        mtu: int | None = None,
        address: str | None = None,
        ns: str | None = None,
    ) -> Guest:
        if self._image is None:
            self._image = vm.build(arena.lab.dir, arena.load)
        size = f"ip link set eth0 mtu {mtu}; " if mtu else ""
        script = f"{size}ulimit -n 65536; /bin/load agent {PORT}"
        command = self._image.command("g", script, nic=tuple(nic), accel=arena.accel, address=address)
        machine = arena.lab.start(command, ns=ns, ordinary=True, stdin=subprocess.PIPE)
        guest = Guest(machine, list(serving) or [machine], outside, dns)
        try:
            machine.wait_line("^AGENT ready", vm.BOOT)
        except AssertionError:
            guest.stop()
            raise
        if not serving:
            # QEMU is not the network alone: its processor time and memory would be no comparison.
            guest.serving = []
        return guest


def _server(arena: Arena, command: Sequence[str], path: str) -> Process:
    """The program that serves the socket `path`."""
    server = arena.lab.start(command, ordinary=True)
    wait_until(lambda: os.path.exists(path) or not server.running, f"the socket of {command[0]}")
    if not server.running:
        raise Failed(f"{command[0]} ended: {server.output[-200:]}")
    return server


def tap(boot: Boot) -> Contender:
    """QEMU's TAP device and the kernel's NAT: the limit; making it takes root."""

    def start(arena: Arena) -> Guest:
        number = arena.number()
        port, _ = published(number)
        device, network = f"t{number}", f"10.{100 + number // 256}.{number % 256}"
        router = kernel_nat(arena, port, f"{network}.2")
        owner = str(user.ordinary()[0])
        ip("-n", router, "tuntap", "add", device, "mode", "tap", "user", owner, "vnet_hdr")
        ip("-n", router, "address", "add", f"{network}.1/24", "dev", device)
        ip("-n", router, "link", "set", device, "up")
        netdev = f"tap,id=n,ifname={device},script=no,downscript=no,vhost=off"
        nic = ["-netdev", netdev, "-device", f"virtio-net-pci,netdev=n,mac={MAC}"]
        address = f"{network}.2/24,{network}.1"
        return boot(arena, nic, [], f"{ROUTER4}:{port}", OUT4, address=address, ns=router)

    return Contender("QEMU tap", "kernel", start, machine=True)


def qemu_user(boot: Boot) -> Contender:
    """The network that QEMU has within itself."""

    def start(arena: Arena) -> Guest:
        port, outside = published(arena.number())
        netdev = f"user,id=n,hostfwd=tcp::{port}-:{PORT}"
        nic = ["-netdev", netdev, "-device", f"virtio-net-pci,netdev=n,mac={MAC}"]
        return boot(arena, nic, [], outside, "10.0.2.3")

    return Contender("QEMU user", "QEMU user", start, machine=True)


def guestnet(boot: Boot, attachment: str, mtu: int) -> Contender:
    def start(arena: Arena) -> Guest:
        port, outside = published(arena.number())
        path = arena.path("gn")
        options = ["--quiet", "--mtu", str(mtu), "-p", f"{port}:vm1:{PORT}"]
        server = _server(arena, [GUESTNET, "up", f"--{attachment}", path, *options], path)
        nic = vm.vhost_nic(path, MAC) if attachment == "vhost-user" else vm.stream_nic(path, MAC)
        return boot(arena, nic, [server], outside, "192.168.64.1", mtu=mtu)

    return Contender(f"guestnet {attachment} {mtu}", "guestnet", start, machine=True)


def passt(boot: Boot, attachment: str, mtu: int, program: str = "passt", label: str = "passt") -> Contender:
    def start(arena: Arena) -> Guest:
        port, outside = published(arena.number())
        path = arena.path("passt")
        options = ["--foreground", "--quiet", "--no-map-gw", "-m", str(mtu), "-t", f"{port}:{PORT}"]
        if attachment == "vhost-user":
            options.append("--vhost-user")
        server = _server(arena, [program, *options, "-u", "none", "--socket", path], path)
        nic = vm.vhost_nic(path, MAC) if attachment == "vhost-user" else vm.stream_nic(path, MAC)
        return boot(arena, nic, [server], outside, OUT4, mtu=mtu)

    return Contender(f"{label} {attachment} {mtu}", label, start, machine=True)


def gvproxy(boot: Boot, program: str) -> Contender:
    def start(arena: Arena) -> Guest:
        port, outside = published(arena.number())
        path, api = arena.path("gv"), arena.path("api")
        options = ["-mtu", "1500", "-ssh-port", "-1", "-listen", f"unix://{api}"]
        server = _server(arena, [program, *options, "-listen-qemu", f"unix://{path}"], path)
        guest = boot(arena, vm.stream_nic(path, MAC), [server], outside, "192.168.127.1")
        gvproxy_expose(api, port)
        return guest

    return Contender("gvproxy stream 1500", "gvproxy", start, machine=True)


def machines(newer: Path | None, gv: tuple[str, str] | None) -> list[Contender]:
    """QEMU with the kernel's NAT, with its own network, with guestnet and with those that are installed; none
    where there is no QEMU or no kernel for a guest."""
    if not (shutil.which("qemu-system-x86_64", path=PATH) and glob.glob("/boot/vmlinuz-*-cloud-*")):
        return []
    boot = Boot()
    found = [
        tap(boot),
        guestnet(boot, "stream", 1500),
        guestnet(boot, "stream", 65520),
        guestnet(boot, "vhost-user", 1500),
        guestnet(boot, "vhost-user", 65520),
        qemu_user(boot),
    ]
    if shutil.which("passt", path=PATH):
        found += [passt(boot, "stream", mtu) for mtu in (1500, 65520)]
    if newer:
        found += [
            passt(boot, "stream", 65520, str(newer / "passt"), "new passt"),
            *(passt(boot, "vhost-user", mtu, str(newer / "passt"), "new passt") for mtu in (1500, 65520)),
        ]
    if gv:
        found.append(gvproxy(boot, gv[0]))
    return found
