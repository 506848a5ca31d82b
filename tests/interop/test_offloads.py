"""Kernels that know fewer offloads: TAPs without virtio headers, without USO, without TSO, without any; and
systems without io_uring. All traffic is the same as with them, only slower."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, Process, need
from lab.namespaces import OUT4, ip
from lab.runner import Blob

CLIENTS = Path(__file__).parent / "clients"
CSUM, TSO4, TSO6, USO = 0x01, 0x02, 0x04, 0x60
SIZE = 8 << 20
REFUSED = {
    "no headers": "headers",
    "no USO": hex(USO),
    "no TSO6": hex(USO | TSO6),
    "no TSO": hex(USO | TSO6 | TSO4),
    "nothing": hex(0xFF),
    "no io_uring": "io_uring",
}
UDP = f"""
import hashlib, socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
for size in (1, 1400, 1472, 1473, 8000, 20000):
    s.sendto(bytes(range(256)) * 100 + bytes([size % 256]) if size > 9999 else b"x" * size, ("{OUT4}", 7))
    print(len(s.recv(65535)))
"""


@pytest.fixture(params=list(REFUSED.values()), ids=list(REFUSED))
def guest(request: pytest.FixtureRequest, lab: Lab) -> Iterator[tuple[str, Process, str]]:
    """A namespace behind such a TAP, its network, and what is refused."""
    need.program("curl")
    need.program("ethtool")
    ns = lab.add_namespace(f"{lab.host}-poor")
    env = {"PYTHONPATH": str(CLIENTS.parents[1])}
    command = [sys.executable, str(CLIENTS / "poor_tap.py"), ns, request.param]
    network = lab.start(command, stdin=subprocess.PIPE, env=env, ready="^ready$")
    ip("-n", ns, "address", "add", "192.168.64.2/24", "dev", "eth0")
    ip("-n", ns, "link", "set", "eth0", "up")
    ip("-n", ns, "route", "add", "default", "via", "192.168.64.1")
    yield ns, network, request.param
    network.stdin.close()
    assert network.wait() == 0
    lab.remove_namespace(ns)


def test_all_traffic_is_the_same(guest: tuple[str, Process, str], lab: Lab, blob: Blob) -> None:
    ns, network, refused = guest
    with blob.path.open("rb") as file:
        data = file.read(SIZE)
    digest = hashlib.sha256(data).hexdigest()
    down = f"curl -sS -m 30 http://{OUT4}/blob | head -c {SIZE} | sha256sum"
    assert lab.run(["sh", "-c", down], ns=ns, seconds=60).stdout.split()[0] == digest
    part = lab.dir / "part"
    part.write_bytes(data)
    said = lab.check(["curl", "-sS", "-m", "30", "-T", str(part), f"http://{OUT4}/x"], ns=ns, seconds=60)
    assert said.split() == [digest, str(SIZE)]
    assert lab.check(["python3", "-c", UDP], ns=ns).split() == ["1", "1400", "1472", "1473", "8000", "25601"]
    network.stdin.write(b"count\n")
    network.stdin.flush()
    segmented = int(network.wait_line(r"^segmented (\d+)")[1])
    # What is refused is what the guest may send. Segments to the guest are the kernel's work wherever there
    # is a header to say so in.
    assert segmented > 100 if refused == "headers" else segmented == 0
    features = lab.check(["ethtool", "-k", "eth0"], ns=ns)
    mask = {"headers": 0xFF, "io_uring": 0}.get(refused)
    mask = int(refused, 0) if mask is None else mask
    for bit, feature in ((TSO4, "tx-tcp-segmentation"), (USO, "tx-udp-segmentation")):
        assert f"{feature}: {'off' if mask & bit else 'on'}" in features
