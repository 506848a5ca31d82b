"""The uplink "tun": guests' packets leave through a device of the host, and answers come back by it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import Lab, Process, need, wait_until
from lab.namespaces import FAR4, HOST4, OUT4, ip
from lab.runner import GUESTNET, Blob
from lab.vm import BOOT, Image, stream_nic

pytestmark = pytest.mark.timeout(300)

CLIENTS = Path(__file__).parent / "clients"
TESTS = Path(__file__).resolve().parents[1]
EXTERNAL = "192.0.2.77"
ECHO = """
import asyncio, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
async def echo(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
    except ConnectionError:
        pass
    finally:
        writer.close()
async def main():
    await asyncio.start_server(echo, "0.0.0.0", 9100, backlog=4096)
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@dataclass
class World:
    """A running network and its two guests' namespaces."""

    lab: Lab
    process: Process
    guests: tuple[str, str]
    socket: str
    external: str
    device: str

    def check(self, command: Sequence[str], *, guest: int = 0, seconds: float = 20) -> str:
        return self.lab.check(command, ns=self.guests[guest], seconds=seconds)

    def run(self, command: Sequence[str], *, guest: int = 0, seconds: float = 20):
        return self.lab.run(command, ns=self.guests[guest], seconds=seconds)

    def ask(self, line: str, answer: str) -> re.Match[str]:
        seen = len(self.process.lines)
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()
        return self.process.wait_line(answer, start=seen)


def build(lab: Lab, **options: object) -> World:
    guests = (f"{lab.host}-g1", f"{lab.host}-g2")
    for name in guests:
        lab.add_namespace(name)
        lab.sysctl(name, "net.ipv4.ping_group_range", "0 2147483647")
        directory = Path("/etc/netns") / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "resolv.conf").write_text("nameserver 192.168.64.1\n")
    path = str(lab.dir / "tun.sock")
    command = [sys.executable, str(CLIENTS / "tun_network.py"), *guests, path, json.dumps(options)]
    process = lab.start(command, env={"PYTHONPATH": str(TESTS)}, stdin=subprocess.PIPE)
    told = json.loads(process.wait_line("^ready (.*)$")[1])
    for number, name in enumerate(guests, 2):
        ip("-n", name, "address", "add", f"192.168.64.{number}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "route", "add", "default", "via", "192.168.64.1")
    return World(lab, process, guests, path, told["external"][0], told["device"])


def route_here(lab: Lab) -> None:
    """The outside is told who has the external address; the host's own routes stay as they are."""
    ip("-n", lab.out, "route", "add", f"{EXTERNAL}/32", "via", HOST4)


@pytest.fixture(scope="module")
def routed(serve_outside: Callable[[Lab], None]) -> Iterator[World]:
    """With an external address that the outside has a route to, as where a provider gives one."""
    need.root()
    with Lab() as lab:
        serve_outside(lab)
        lab.sysctl(lab.host, "net.ipv4.icmp_ratelimit", "0")
        route_here(lab)
        lab.start([sys.executable, "-c", ECHO], ns=lab.out, ready="^ready$")
        world = build(lab, external=EXTERNAL, forwarding=True)
        yield world
        world.process.stop()
        assert settings(lab)["forward"] == "0"


def settings(lab: Lab) -> dict[str, str]:
    """What guestnet could have left on the host."""
    return {
        "forward": lab.check(["cat", "/proc/sys/net/ipv4/ip_forward"]).strip(),
        "devices": lab.check(["ip", "-brief", "link", "show", "type", "tun"]).strip(),
        "tables": lab.check(["nft", "list", "tables"]).strip(),
        "routes": lab.check(["ip", "route"]).strip(),
    }


# ---- what guests do --------------------------------------------------------------------------------------


def test_fetch_and_the_server_sees_the_external_address(routed: World) -> None:
    for guest in (0, 1):
        peer = json.loads(routed.check(["curl", "-sS", f"http://{OUT4}/peer"], guest=guest))
        assert peer[0].removeprefix("::ffff:") == EXTERNAL


def test_ping_and_large_ping(routed: World) -> None:
    for size in ("56", "3000"):
        out = routed.check(["ping", "-n", "-c", "2", "-i", "0.2", "-W", "3", "-s", size, FAR4])
        assert "2 received" in out


def test_guests_reach_each_other_and_the_gateway(routed: World) -> None:
    for address in ("192.168.64.3", "192.168.64.1"):
        assert "1 received" in routed.check(["ping", "-n", "-c", "1", "-W", "3", address])


def test_traceroute(routed: World) -> None:
    lines = routed.check(["traceroute", "-n", "-q", "1", "-w", "3", "-m", "6", FAR4]).splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["192.168.64.1", HOST4, OUT4, FAR4]


def test_path_mtu_is_reported_and_then_kept(routed: World) -> None:
    out = routed.run(["ping", "-n", "-c", "1", "-W", "3", "-M", "do", "-s", "1472", FAR4]).stdout
    assert f"From {OUT4}" in out
    assert "mtu = 1400" in out


def test_unreachable_and_refused_are_reported(routed: World) -> None:
    # The kernel of the outside sends one such error a second to one address.
    out = routed.run(["ping", "-n", "-c", "4", "-i", "0.5", "-W", "3", "198.18.1.1"]).stdout
    assert f"From {OUT4}" in out
    assert "Unreachable" in out
    assert routed.run(["curl", "-sS", "-m", "5", f"http://{OUT4}:9/"]).returncode == 7


def test_names_by_the_gateway(routed: World) -> None:
    assert routed.check(["dig", "+short", "www.example.test", "A"]) == f"{OUT4}\n"
    assert routed.check(["dig", "+tcp", "+short", "www.example.test", "A"]) == f"{OUT4}\n"
    assert routed.check(["dig", "+short", "two.guestnet.internal", "A"]) == "192.168.64.3\n"


def test_a_large_file_both_ways_unharmed(routed: World, blob: Blob) -> None:
    """Large frames cross whole, with checksums that are only begun."""
    sha = routed.check(["sh", "-c", f"curl -sS http://{OUT4}/blob | sha256sum"], seconds=120).split()[0]
    assert sha == blob.sha256
    put = ["curl", "-sS", "-T", str(blob.path), f"http://{OUT4}/put"]
    assert routed.check(put, guest=1, seconds=120).split()[0] == blob.sha256


def test_ten_thousand_connections_at_once(routed: World) -> None:
    many = ["python3", str(CLIENTS / "many.py"), OUT4, "9100", "10000"]
    done = routed.run(many, seconds=150)
    told = json.loads(routed.ask("stats", "^stats (.*)$")[1])
    assert done.stdout.splitlines() == ["open 10000", "right 10000"], (done.stderr, told)
    assert told["connections"] >= 10_000
    assert told["outbound"] > 40_000
    assert int(routed.ask("flows", r"^flows (\d+)$")[1]) >= 10_000


def test_a_machine(routed: World, image_here: Image) -> None:
    script = f"""
wget -q -O - http://{OUT4}/peer
ping -c 2 -W 5 {FAR4} >/dev/null && echo PING-OK
nslookup -type=a www.example.test
httpd -p 80 -h /www
echo SERVING
sleep 600
"""
    command = image_here.command("vm", script, nic=stream_nic(routed.socket, "52:54:00:00:00:0a"))
    vm = routed.lab.start(command)
    vm.wait_line("^SERVING", BOOT)
    assert EXTERNAL in vm.output
    assert "PING-OK" in vm.output
    assert f"{OUT4}" in vm.output
    routed.ask("publish 8099:vm1:80", "^published ")
    page = routed.lab.check(["curl", "-sS", "-m", "20", f"http://{EXTERNAL}:8099/"], ns=routed.lab.out)
    assert page == "a page from the guest\n"
    vm.stop()


@pytest.fixture
def image_here(routed: World) -> Image:
    from lab import vm

    return vm.build(routed.lab.dir)


def test_frames_of_a_program_by_the_rings(routed: World) -> None:
    """In batches over 64: out translated at the uplink, answers on the other ring."""
    right, wrong, sent, batch = map(int, routed.ask("rings 150", "^rings (.*)$")[1].split())
    assert (right, wrong, sent, batch) == (150, 0, 150, 100)


# ---- published ports -------------------------------------------------------------------------------------


def serve(world: World, proto: str, port: int, guest: int = 0) -> Process:
    command = [sys.executable, str(CLIENTS / "serve.py"), proto, str(port)]
    return world.lab.start(command, ns=world.guests[guest], ready="^ready$")


def call(world: World, address: str, port: int, text: str, proto: str = "TCP", ns: str | None = None) -> str:
    command = ["socat", "-t", "5", "-", f"{proto}:{address}:{port}"]
    return world.lab.run(command, ns=ns or world.lab.out, stdin=text).stdout


def test_a_published_tcp_port_from_outside_and_from_inside(routed: World) -> None:
    server = serve(routed, "tcp", 8000)
    said = routed.ask("publish 8080:one:8000", "^published (.*)$")[1]
    assert said == f"{EXTERNAL}:8080/tcp -> one:8000"
    who, *rest = call(routed, EXTERNAL, 8080, "hello\n").splitlines()
    assert (who.split()[0], rest) == (OUT4, ["hello", "goodbye"])
    # Its own guest, the other guest, and the host.
    for ns in (*routed.guests, routed.lab.host):
        assert "hello" in call(routed, EXTERNAL, 8080, "hello\n", ns=ns), ns
    server.stop()


def test_a_published_udp_port(routed: World) -> None:
    server = serve(routed, "udp", 5353, guest=1)
    routed.ask("publish 5300:two:5353/udp", "^published ")
    assert call(routed, EXTERNAL, 5300, "ask", "UDP").split()[::2] == [OUT4, "ask"]
    server.stop()


def test_a_port_that_is_taken_or_left_to_choose(routed: World) -> None:
    routed.ask("publish 8181:one:81", "^published ")
    assert "in use" in routed.ask("publish 8181:two:82", "^refused (.*)$")[1]
    chosen = routed.ask("publish 0:one:83", r"^published \S+:(\d+)/tcp")[1]
    assert 20000 <= int(chosen) < 49152


def test_a_port_of_the_hosts_own_address_is_a_socket_there(routed: World) -> None:
    server = serve(routed, "tcp", 8001)
    said = routed.ask(f"publish {HOST4}:8085:one:8001", "^published (.*)$")[1]
    assert said == f"{HOST4}:8085/tcp -> one:8001"
    assert routed.lab.listening(routed.lab.host, 8085)
    assert "hello" in call(routed, HOST4, 8085, "hello\n")
    server.stop()


# ---- beginning and end -----------------------------------------------------------------------------------


@pytest.fixture
def quiet_lab(serve_outside: Callable[[Lab], None]) -> Iterator[Lab]:
    need.root()
    with Lab() as lab:
        serve_outside(lab)
        yield lab


def up(lab: Lab, *options: str) -> tuple[Process, dict[str, object]]:
    path = lab.dir / f"up-{len(lab.processes())}.sock"
    command = [GUESTNET, "up", "--uplink", "tun", "--json", "--stream", str(path), *options]
    process = lab.start(command)
    return process, json.loads(process.wait_line('(.*"event": "ready".*)')[1])


def test_masquerading_is_taken_back(quiet_lab: Lab) -> None:
    lab = quiet_lab
    before = settings(lab)
    command = [GUESTNET, "run", "--uplink", "tun", "--masquerade", "--", "curl", "-sS", f"http://{OUT4}/peer"]
    assert HOST4 in lab.check(command)
    assert settings(lab) == before
    assert before["forward"] == "0"


def test_killed_and_started_again_leaves_nothing(quiet_lab: Lab) -> None:
    lab = quiet_lab
    before = settings(lab)
    killed, told = up(lab, "--masquerade")
    here = settings(lab)
    assert here["forward"] == "1"
    assert "guestnet_" in here["tables"]
    assert str(told["device"]) in here["devices"]
    killed.signal(signal.SIGKILL)
    killed.wait()
    # The device went with the process; the rest is found by the next start.
    wait_until(lambda: settings(lab)["devices"] == "", "the device to go")
    again, _ = up(lab)
    assert settings(lab)["tables"] == before["tables"]
    assert settings(lab)["forward"] == before["forward"]
    again.stop()
    assert settings(lab) == before


def test_the_last_of_two_turns_forwarding_back(quiet_lab: Lab) -> None:
    lab = quiet_lab
    first, one = up(lab, "--forwarding")
    second, two = up(lab, "--masquerade")
    assert one["external"] != two["external"]
    first.stop()
    assert settings(lab)["forward"] == "1"
    second.stop()
    assert (settings(lab)["forward"], settings(lab)["tables"]) == ("0", "")


def test_forwarding_and_rules_of_others_are_left_alone(quiet_lab: Lab) -> None:
    """Forwarding that was on stays on; a table of the same name that somebody else made stays."""
    lab = quiet_lab
    lab.sysctl(lab.host, "net.ipv4.ip_forward", "1")
    killed, told = up(lab, "--masquerade")
    killed.signal(signal.SIGKILL)
    killed.wait()
    table = f"guestnet_{told['device']}"
    lab.check(["nft", "delete", "table", "ip", table])
    lab.check(["nft", "add", "table", "ip", table])
    again, _ = up(lab, "--forwarding")
    again.stop()
    assert (settings(lab)["forward"], settings(lab)["tables"]) == ("1", f"table ip {table}")


def test_without_the_privilege_it_says_what_is_missing(lab: Lab) -> None:
    done = lab.run([GUESTNET, "up", "--uplink", "tun", "--stream", str(lab.dir / "no.sock")], ordinary=True)
    assert done.returncode != 0
    assert "CAP_NET_ADMIN" in done.stderr
    assert "Traceback" not in done.stderr


def test_in_a_user_namespace_it_needs_no_root(lab: Lab) -> None:
    path = lab.dir / "user.sock"
    command = [GUESTNET, "up", "--uplink", "tun", "--json", "--stream", str(path)]
    process = lab.start(["unshare", "-Urn", *command], ordinary=True)
    assert "100.64.0.2" in process.wait_line('(.*"event": "ready".*)')[1]
    assert process.stop() == 0


def test_an_address_of_the_hosts_own_is_refused(lab: Lab) -> None:
    path = str(lab.dir / "own.sock")
    done = lab.run([GUESTNET, "up", "--uplink", "tun", "--external", HOST4, "--stream", path])
    assert done.returncode != 0
    assert "one of this host's own" in done.stderr


def test_host_only_leaves_by_no_uplink(quiet_lab: Lab) -> None:
    lab = quiet_lab
    out = [GUESTNET, "run", "--uplink", "tun", "--masquerade", "--mode", "host_only", "--", "ping", "-n"]
    done = lab.run([*out, "-c", "1", "-W", "3", OUT4])
    assert done.returncode != 0
    assert "Packet filtered" in done.stdout
