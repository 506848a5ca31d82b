"""TCP of a real guest whose link loses frames: what arrives is whole both ways, and both stacks use SACK."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator

import pytest
from lab import Lab, Process, need
from lab.lossy import LossyGuest, add_lossy_guest
from lab.namespaces import OUT4

SIZE = 1_000_000
SERVER = f"""
import hashlib, socket
server = socket.create_server(("0.0.0.0", 9310))
print("ready", flush=True)
data = bytes(i * 7 % 251 for i in range({SIZE}))
while True:
    c, _ = server.accept()
    c.sendall(data)
    c.shutdown(socket.SHUT_WR)
    got = hashlib.sha256()
    while part := c.recv(65536):
        got.update(part)
    print("got", got.hexdigest(), flush=True)
    c.close()
"""
CLIENT = f"""
import hashlib, socket, subprocess
c = socket.create_connection(("{OUT4}", 9310))
got = hashlib.sha256()
while part := c.recv(65536):
    got.update(part)
print("got", got.hexdigest(), flush=True)
c.sendall(bytes(i * 7 % 251 for i in range({SIZE})))
print(subprocess.run(["ss", "-tinoH"], capture_output=True, text=True).stdout)
c.shutdown(socket.SHUT_WR)
c.recv(1)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    need.root()
    with Lab() as made:
        yield made


@pytest.fixture(scope="module")
def server(lab: Lab) -> Process:
    return lab.start([sys.executable, "-c", SERVER], ns=lab.out, ready="^ready$")


def through(lab: Lab, guest: LossyGuest, server: Process) -> str:
    """A download and an upload over one connection; what `ss` says of it in the guest."""
    right = hashlib.sha256(bytes(i * 7 % 251 for i in range(SIZE))).hexdigest()
    seen = len(server.lines)
    out = lab.check([sys.executable, "-c", CLIENT], ns=guest.ns, seconds=120)
    assert f"got {right}" in out
    assert server.wait_line(r"^got (\S+)$", start=seen)[1] == right
    return out


@pytest.mark.parametrize("percent", [1, 10])
def test_bytes_arrive_whole_over_a_path_that_loses(lab: Lab, server: Process, percent: int) -> None:
    guest = add_lossy_guest(lab, "guestnet", percent / 100, 0.002, seed=percent)
    shown = through(lab, guest, server)
    assert re.search(r"\bsack\b", shown), shown
    # The guest's stack reports what arrived ahead of order, and hears of it from guestnet.
    assert "rcv_ooopack:" in shown
    guest.path.stop(10)
    lost = sum(int(line.split()[2]) for line in guest.path.lines if line.startswith("way"))
    again = next(int(line.split()[1]) for line in guest.path.lines if line.startswith("retransmits"))
    assert lost > 0
    assert 0 < again <= 2 * lost, "hardly anything is sent again that was not lost"
