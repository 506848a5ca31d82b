"""The contenders in namespaces: each makes a guest whose only way out is the contender. Machines are in
machines.py.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from guests import PORT, Arena, Failed, Guest, copy_program, published
from lab.namespaces import OUT4, ip
from lab.need import PATH
from lab.process import wait_until

HERE = Path(__file__).resolve().parent
GUESTNET = str(Path(sys.prefix) / "bin" / "guestnet")
GVPROXY = "github.com/containers/gvisor-tap-vsock/cmd"


@dataclass(frozen=True)
class Contender:
    """`start` makes a guest of it; every call makes another."""

    name: str
    kind: str
    """Whose it is: kernel (the limit), guestnet, or the name of a peer."""
    start: Callable[[Arena], Guest]
    machine: bool = False
    together: Callable[[Arena, int], list[Guest]] | None = None
    """Makes many guests of one network, where the contender can."""

    def group(self, arena: Arena, count: int) -> list[Guest]:
        """Many guests: of one network where it can, else each with a network of its own."""
        if self.together is not None:
            return self.together(arena, count)
        made: list[Guest] = []
        try:
            for _ in range(count):
                made.append(self.start(arena))
        except BaseException:
            for guest in made:
                guest.stop()
            raise
        return made


# ---- each of them ----------------------------------------------------------------------------------------
def _namespace(arena: Arena, command: Sequence[str], port: str, dns: str) -> Guest:
    """A guest of a contender that starts a command in a namespace: the agent."""
    agent = arena.lab.start(
        [*command, arena.load, "agent", str(PORT)], ordinary=True, stdin=subprocess.PIPE, ready="^AGENT ready"
    )
    return Guest(agent, [agent], port, dns)


NAT = """
table ip guestnet_bench {
    chain post { type nat hook postrouting priority 100; oifname "up0" masquerade; }
    chain pre { type nat hook prerouting priority -100; }
}
"""


ROUTER4, BEYOND4 = "203.0.114.1", "203.0.114.2"
"""The router's address outside, and the outside's on that link."""


def kernel_nat(arena: Arena, port: int, guest: str) -> str:
    """The namespace of a router that masquerades, as far from the outside as *host* is; made once. Apart from
    *host*, because connection tracking would cost the others time too. Publishes the server of `guest`."""
    lab = arena.lab
    if not arena.router:
        arena.router = lab.add_namespace(f"{lab.host.removesuffix('-host')}-nat")
        lab.join(arena.router, "up0", lab.out, "nat0")
        ip("-n", arena.router, "address", "add", f"{ROUTER4}/24", "dev", "up0")
        ip("-n", lab.out, "address", "add", f"{BEYOND4}/24", "dev", "nat0")
        ip("-n", arena.router, "route", "add", "default", "via", BEYOND4)
        # What the servers outside answer comes from the address that they were asked by.
        ip("-n", lab.out, "route", "replace", "203.0.114.0/24", "dev", "nat0", "src", OUT4)
        lab.sysctl(arena.router, "net.ipv4.ip_forward", "1")
        lab.check(["nft", "-f", "-"], ns=arena.router, stdin=NAT)
    rule = f"ip daddr {ROUTER4} tcp dport {port} dnat to {guest}:{PORT}"
    lab.check(["nft", f"add rule ip guestnet_bench pre {rule}"], ns=arena.router)
    return arena.router


def kernel() -> Contender:
    """A veth pair and nftables masquerade: no packet leaves the kernel."""

    def start(arena: Arena) -> Guest:
        lab, number = arena.lab, arena.number()
        port, _ = published(number)
        network = f"10.{100 + number // 256}.{number % 256}"
        router = kernel_nat(arena, port, f"{network}.2")
        name = lab.add_namespace(f"{lab.host.removesuffix('-host')}-k{number}")
        lab.join(router, f"k{number}", name, "eth0")
        ip("-n", router, "address", "add", f"{network}.1/24", "dev", f"k{number}")
        ip("-n", name, "address", "add", f"{network}.2/24", "dev", "eth0")
        ip("-n", name, "route", "add", "default", "via", f"{network}.1")
        command = [arena.load, "agent", str(PORT)]
        agent = lab.start(command, ns=name, ordinary=True, stdin=subprocess.PIPE, ready="^AGENT ready")
        return Guest(agent, [], f"{ROUTER4}:{port}", OUT4, clean=lambda: lab.remove_namespace(name))

    return Contender("kernel", "kernel", start)


def guestnet(mtu: int) -> Contender:
    def start(arena: Arena) -> Guest:
        port, outside = published(arena.number())
        options = ["--quiet", "--mtu", str(mtu), "-p", f"{port}:{PORT}"]
        return _namespace(arena, [GUESTNET, "run", *options, "--"], outside, "192.168.64.1")

    return Contender(f"guestnet {mtu}", "guestnet", start)


def pasta(mtu: int, program: str = "pasta", label: str = "pasta") -> Contender:
    def start(arena: Arena) -> Guest:
        port, outside = published(arena.number())
        # Its default would map the outside's address, the host's gateway, to the host itself; and its scan
        # for open ports would take time that is not the packets'.
        options = ["--config-net", "--no-map-gw", "--quiet", "-m", str(mtu)]
        ports = ["-t", f"{port}:{PORT}", "-u", "none", "-T", "none", "-U", "none"]
        return _namespace(arena, [program, *options, *ports, "--"], outside, OUT4)

    return Contender(f"{label} {mtu}", label, start)


def slirp4netns(mtu: int) -> Contender:
    def start(arena: Arena) -> Guest:
        port, outside = published(arena.number())
        api = arena.path("slirp")
        guest = _namespace(arena, [str(HERE / "slirp.sh"), str(mtu), api], outside, "10.0.2.3")
        wanted = {"proto": "tcp", "host_addr": "0.0.0.0", "host_port": port, "guest_port": PORT}
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(5)
            s.connect(api)
            s.sendall(json.dumps({"execute": "add_hostfwd", "arguments": wanted}).encode())
            s.shutdown(socket.SHUT_WR)
            answer = s.recv(4096)
        if b"error" in answer:
            guest.stop()
            raise Failed(f"slirp4netns: {answer.decode()}")
        return guest

    return Contender(f"slirp4netns {mtu}", "slirp4netns", start)


class _Unix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def gvproxy_expose(api: str, port: int) -> None:
    """Publishes the guest's server; gvproxy gives its first guest 192.168.127.2."""
    wanted = {"local": f":{port}", "remote": f"192.168.127.2:{PORT}", "protocol": "tcp"}
    link = _Unix(api)
    link.request("POST", "/services/forwarder/expose", json.dumps(wanted))
    answer = link.getresponse()
    if answer.status != 200:
        raise Failed(f"gvproxy: {answer.read().decode()}")
    link.close()


def gvproxy(program: str, forwarder: str, mtu: int = 1500) -> Contender:
    def start(arena: Arena) -> Guest:
        port, outside = published(arena.number())
        api = arena.path("gv")
        words = [program, "-mtu", str(mtu), "-ssh-port", "-1", "-listen", f"unix://{api}"]
        server = arena.lab.start(words, ordinary=True)
        wait_until(lambda: os.path.exists(api) or not server.running, "gvproxy's socket")
        script = [str(HERE / "gvforwarder.sh"), forwarder, api, str(mtu)]
        guest = _namespace(arena, script, outside, "192.168.127.1")
        guest.serving = [guest.agent, server]
        gvproxy_expose(api, port)
        return guest

    return Contender(f"gvproxy {mtu}", "gvproxy", start)


# ---- finding them ----------------------------------------------------------------------------------------
def go_programs(install: bool) -> tuple[Path, Path] | None:
    """gvproxy and its forwarder: in PATH, in Go's own directory, or installed there when asked."""
    go = shutil.which("go", path=f"{PATH}:/usr/local/go/bin")
    if go and install:
        subprocess.run([go, "install", f"{GVPROXY}/gvproxy@latest", f"{GVPROXY}/vm@latest"], check=True)
    places = PATH.split(":")
    if go:
        home = subprocess.run([go, "env", "GOPATH"], capture_output=True, text=True, check=False)
        places.insert(0, f"{home.stdout.strip()}/bin")
    path = ":".join(places)
    program = shutil.which("gvproxy", path=path)
    # `go install` names a program for its directory.
    forwarder = shutil.which("gvforwarder", path=path)
    beside = Path(program).parent / "vm" if program else None
    if forwarder is None and beside is not None and beside.exists():
        forwarder = str(beside)
    return (Path(program), Path(forwarder)) if program and forwarder else None


def newer_pasta(path: Path, directory: Path) -> Path:
    """Copies of another build of pasta and passt: one program that looks at the name it is called by."""
    target = directory / "newer"
    target.mkdir(exist_ok=True)
    target.chmod(0o755)
    for name in ("pasta", "passt", "pasta.avx2", "passt.avx2"):
        source = path.with_name(name)
        if not source.exists() and "." not in name:
            source = path
        if source.exists():
            shutil.copyfile(source, target / name)
            (target / name).chmod(0o755)
    return target


def namespaces(newer: Path | None, gv: tuple[str, str] | None) -> list[Contender]:
    """The kernel, guestnet, and those of the peers that are installed."""
    found = [kernel(), guestnet(1500), guestnet(65520)]
    if shutil.which("pasta", path=PATH):
        found += [pasta(1500), pasta(65520)]
    if newer:
        found += [pasta(mtu, str(newer / "pasta"), "new pasta") for mtu in (1500, 65520)]
    if shutil.which("slirp4netns", path=PATH):
        found += [slirp4netns(1500), slirp4netns(65520)]
    if gv:
        found.append(gvproxy(*gv))
    return found


def go_copies(arena: Arena, install: bool) -> tuple[str, str] | None:
    """gvproxy and its forwarder where an ordinary user may run them."""
    programs = go_programs(install)
    if programs is None:
        return None
    first, second = (copy_program(p, arena.lab.dir) for p in programs)
    return first, second


def versions(newer: Path | None) -> dict[str, str]:
    """What the programs say of themselves."""
    found = {}
    for name, command in (
        ("guestnet", [GUESTNET, "--version"]),
        ("pasta", ["pasta", "--version"]),
        ("new pasta", [str(newer), "--version"] if newer else []),
        ("slirp4netns", ["slirp4netns", "--version"]),
        ("QEMU", ["qemu-system-x86_64", "--version"]),
    ):
        program = shutil.which(command[0], path=PATH) if command else None
        if program is None:
            continue
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
        lines = (done.stdout or done.stderr).strip().splitlines()
        if lines:
            found[name] = lines[0].strip()
    return found
