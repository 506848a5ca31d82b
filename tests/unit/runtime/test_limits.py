"""What one guest may take of what all share: the descriptors of the process."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

CROWD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from guestnet import NatConfig, NatNetwork
from guestnet.testing.guest import Guest, GuestError
from tests.unit.runtime.conftest import add_memory_guest

server, capture = int(sys.argv[1]), sys.argv[2]
with NatNetwork(NatConfig(dhcp=False, dns=False, host_loopback=True)) as network:
    greedy, other = add_memory_guest(network, "greedy"), add_memory_guest(network, "other")
    host, got = str(network.config.loopback_address), 0
    try:
        for _ in range(400):
            greedy.connect(host, server)
            got += 1
    except GuestError:
        pass
    for _ in range(20):
        other.connect(host, server)
    network.start_capture(capture)
    network.publish("127.0.0.1:0:other:80")
    print(got)
"""


def test_a_guest_that_opens_connections_without_end_leaves_some_to_others(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        done = subprocess.run(
            [sys.executable, "-c", CROWD, str(server.getsockname()[1]), str(tmp_path / "all.pcapng")],
            capture_output=True, text=True, timeout=60, check=False, cwd=root,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == 157
