"""The namespaces of a `Lab`: they are made, joined and entered, and always removed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from lab import need, user
from lab.process import DEADLINE, Process, Timeout, wait_until

HOST4, OUT4, SECOND4 = "203.0.113.1", "203.0.113.2", "203.0.113.3"
HOST6, OUT6 = "2001:db8:113::1", "2001:db8:113::2"
FAR_ROUTER4, FAR4 = "198.51.100.1", "198.51.100.2"
FAR_ROUTER6, FAR6 = "2001:db8:198::1", "2001:db8:198::2"
UNREACHABLE4 = "192.0.2.1"
"""The host itself has no way to it."""
FAR_UNREACHABLE4 = "198.18.1.1"
"""The outside answers with ICMP host unreachable."""
BLACKHOLE4 = "198.18.2.1"
"""Nobody ever answers."""
_NAME = re.compile(r"^gn-(\d+)-")
_serial = 0


def ip(*args: str) -> None:
    """Runs `ip ARGS`; what it says when it fails becomes the error."""
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(args)}: {done.stderr.strip()}")


def _end_all(name: str) -> None:
    """Ends what a command started in a namespace of ours and left behind; nobody else has anything there."""
    command = ["ip", "netns", "pids", name]
    for pid in subprocess.run(command, capture_output=True, text=True, check=False).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def sweep() -> None:
    """Removes namespaces and files whose test run is no more (it was killed)."""
    for path in Path(tempfile.gettempdir()).glob("gn-*-*"):
        found = _NAME.match(path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    out = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in out.splitlines():
        name = line.split()[0] if line.split() else ""
        found = _NAME.match(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _end_all(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


class Lab:
    """host, out and far, and what runs in them. Needs root (`need.root`) and iproute2."""

    def __init__(self, *, resolver: str | None = OUT4) -> None:
        global _serial  # noqa: PLW0603 - names must be unique within the process too
        _serial += 1
        prefix = f"gn-{os.getpid()}-{_serial}"
        self.host, self.out, self.far = f"{prefix}-host", f"{prefix}-out", f"{prefix}-far"
        self._resolver = resolver
        self._made: list[str] = []
        self._processes: list[Process] = []
        self.dir = Path(tempfile.mkdtemp(prefix=f"{prefix}-"))
        """A directory that the ordinary user owns; its HOME and TMPDIR."""
        self.dir.chmod(0o755)
        os.chown(self.dir, *user.ordinary())

    def __enter__(self) -> Lab:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # ---- making and removing -----------------------------------------------------------------------
    def _build(self) -> None:
        need.tun()
        for name in (self.host, self.out, self.far):
            self.add_namespace(name)
        self.join(self.host, "up0", self.out, "up0")
        self.join(self.out, "far0", self.far, "up0", mtu=1400)
        for ns, device, addresses in (
            (self.host, "up0", (f"{HOST4}/24", f"{HOST6}/64")),
            (self.out, "up0", (f"{OUT4}/24", f"{SECOND4}/24", f"{OUT6}/64")),
            (self.out, "far0", (f"{FAR_ROUTER4}/24", f"{FAR_ROUTER6}/64")),
            (self.far, "up0", (f"{FAR4}/24", f"{FAR6}/64")),
        ):
            for address in addresses:
                ip("-n", ns, "address", "add", address, "dev", device, *(["nodad"] if ":" in address else []))
        ip("-n", self.host, "route", "add", "default", "via", OUT4)
        ip("-n", self.host, "route", "add", "default", "via", OUT6)
        ip("-n", self.host, "route", "add", "unreachable", "192.0.2.0/24")
        ip("-n", self.far, "route", "add", "default", "via", FAR_ROUTER4)
        ip("-n", self.far, "route", "add", "default", "via", FAR_ROUTER6)
        ip("-n", self.out, "route", "add", "unreachable", "198.18.1.0/24")
        ip("-n", self.out, "route", "add", "blackhole", "198.18.2.0/24")
        self.sysctl(self.out, "net.ipv4.ip_forward", "1")
        self.sysctl(self.out, "net.ipv6.conf.all.forwarding", "1")
        # ICMP errors of the outside are what tests look at; the kernel would send one a second.
        self.sysctl(self.out, "net.ipv4.icmp_ratelimit", "0")
        self.sysctl(self.out, "net.ipv6.icmp.ratelimit", "0")
        self.sysctl(self.host, "net.ipv4.ping_group_range", "0 2147483647")
        self.set_resolver(self._resolver)

    def add_namespace(self, name: str) -> str:
        ip("netns", "add", name)
        self._made.append(name)
        ip("-n", name, "link", "set", "lo", "up")
        return name

    def join(self, a: str, a_device: str, b: str, b_device: str, *, mtu: int = 1500) -> None:
        """A veth pair between two namespaces, both ends up."""
        mine = ["name", a_device, "netns", a, "mtu", str(mtu)]
        peer = ["name", b_device, "netns", b, "mtu", str(mtu)]
        ip("link", "add", *mine, "type", "veth", "peer", *peer)
        ip("-n", a, "link", "set", a_device, "up")
        ip("-n", b, "link", "set", b_device, "up")

    def sysctl(self, ns: str, key: str, value: str) -> None:
        self.check(["sysctl", "-qw", f"{key}={value}"], ns=ns)

    def set_resolver(self, *servers: str | None) -> None:
        """The host namespace's /etc/resolv.conf; no server: an empty file. For processes started later."""
        directory = Path("/etc/netns") / self.host
        directory.mkdir(parents=True, exist_ok=True)
        text = "".join(f"nameserver {s}\n" for s in servers if s)
        (directory / "resolv.conf").write_text(text or "# none\n")

    def close(self) -> None:
        for process in reversed(self._processes):
            try:
                process.stop(5)
            except Timeout as error:
                print(error, file=sys.stderr)
        for name in reversed(list(self._made)):
            self.remove_namespace(name)
        shutil.rmtree(self.dir, ignore_errors=True)

    def remove_namespace(self, name: str) -> None:
        """Removes a namespace and ends what runs in it."""
        _end_all(name)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        self._made.remove(name)

    # ---- running things ----------------------------------------------------------------------------
    def command(self, command: Sequence[str], *, ns: str | None = None, ordinary: bool = False) -> list[str]:
        """The command line that runs `command` in a namespace (host), as root or an ordinary user."""
        inner = user.become(list(command)) if ordinary else list(command)
        return ["ip", "netns", "exec", ns or self.host, *inner]

    def environment(
        self, *, ordinary: bool = False, extra: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        base = user.environment(str(self.dir)) if ordinary else {**os.environ, "PATH": need.PATH}
        return {**base, **(extra or {})}

    def start(
        self,
        command: Sequence[str],
        *,
        ns: str | None = None,
        ordinary: bool = False,
        ready: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
    ) -> Process:
        """Starts a command that ends with the lab at the latest; `ready` is a line to wait for."""
        full = self.command(command, ns=ns, ordinary=ordinary)
        process = Process(
            full, env=self.environment(ordinary=ordinary, extra=env), stdin=stdin, cwd=str(self.dir)
        )
        self._processes.append(process)
        if ready is not None:
            process.wait_line(ready)
        return process

    def run(
        self,
        command: Sequence[str],
        *,
        ns: str | None = None,
        ordinary: bool = False,
        seconds: float = DEADLINE,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end; stdout and stderr apart."""
        full = self.command(command, ns=ns, ordinary=ordinary)
        with subprocess.Popen(
            full, env=self.environment(ordinary=ordinary, extra=env), cwd=self.dir, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace",
        ) as process:  # fmt: skip
            try:
                out, err = process.communicate(stdin or "", timeout=seconds)
            except subprocess.TimeoutExpired:
                # Whole session: a child that outlives its parent would hold the pipes open.
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate(timeout=10)
                raise Timeout(f"{list(command)} still ran after {seconds:g} s: {out!r} {err!r}") from None
        return subprocess.CompletedProcess(full, process.returncode, out, err)

    def check(self, command: Sequence[str], **kwargs: object) -> str:
        """As `run`, but a status other than 0 is a failure; gives stdout."""
        done = self.run(command, **kwargs)  # type: ignore[arg-type]
        assert done.returncode == 0, f"{list(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def wait_output(self, command: Sequence[str], wanted: str, *, ns: str | None = None) -> None:
        """Runs a command again and again until its stdout is `wanted` (but for space around it)."""
        wait_until(
            lambda: self.run(command, ns=ns).stdout.strip() == wanted, f"{list(command)} to say {wanted!r}"
        )

    def processes(self) -> list[Process]:
        """All that were started here, ended ones too."""
        return list(self._processes)

    @staticmethod
    def output(command: Sequence[str]) -> str:
        """stdout of a command outside any namespace of the lab; empty when it fails."""
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def wait_listening(self, ns: str, port: int, proto: str = "tcp") -> None:
        wait_until(lambda: self.listening(ns, port, proto), f"a {proto} listener on port {port}")

    def listening(self, ns: str, port: int, proto: str = "tcp") -> bool:
        """Does anything listen there?"""
        flag = "-Htln" if proto == "tcp" else "-Huln"
        return bool(self.check(["ss", flag, f"sport = :{port}"], ns=ns).strip())
