"""A guest floods; another keeps its share.

What the flood takes from the machine itself (two cores for everything) is not the network's doing, so the
undisturbed rate is measured while the same program does the same work without sending. Of that rate half is a
guest's share of a network of two.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab, Process, need
from lab.namespaces import OUT4, ip

CLIENTS = Path(__file__).parent / "clients"
SHARE = 0.5
KEPT = 0.8


def rate(lab: Lab, ns: str, seconds: int, *words: str) -> float:
    out = lab.check(["iperf3", "-J", "-c", OUT4, "-t", str(seconds), *words], ns=ns, seconds=seconds + 30)
    return float(json.loads(out)["end"]["sum_received"]["bits_per_second"])


def tell(process: Process, word: str) -> None:
    process.stdin.write(f"{word}\n".encode())
    process.stdin.flush()
    process.wait_line(f"^done {word.split(maxsplit=1)[0]}")


@pytest.mark.timeout(240)
def test_a_flood_leaves_the_other_guest_its_share(lab: Lab) -> None:
    need.program("iperf3")
    ns = lab.add_namespace(lab.host.replace("-host", "-flood"))
    env = {"PYTHONPATH": str(CLIENTS.parents[1])}
    command = [sys.executable, str(CLIENTS / "two_guests.py"), ns]
    network = lab.start(command, stdin=subprocess.PIPE, ready="^ready$", env=env)
    ip("-n", ns, "address", "add", "192.168.64.2/24", "dev", "eth0")
    ip("-n", ns, "link", "set", "eth0", "up")
    ip("-n", ns, "route", "add", "default", "via", "192.168.64.1")
    lab.check(["ping", "-c", "1", "-W", "5", "192.168.64.1"], ns=ns)
    mac = json.loads(lab.check(["ip", "-j", "neigh", "show", "192.168.64.1"], ns=ns))[0]["lladdr"].replace(
        ":", ""
    )

    tell(network, f"burn {mac}")
    undisturbed = {"up": rate(lab, ns, 5), "down": rate(lab, ns, 5, "-R")}
    tell(network, f"flood {mac}")
    flooded = {"up": rate(lab, ns, 15), "down": rate(lab, ns, 15, "-R")}
    tell(network, "quiet")
    tell(network, "stats")
    kept = {way: flooded[way] / (undisturbed[way] * SHARE) for way in flooded}
    print(f"of its share the guest kept {kept}; undisturbed {undisturbed}, flooded {flooded}")
    assert min(kept.values()) >= KEPT, (kept, undisturbed, flooded, network.output[-3000:])

    page = lab.check(["curl", "-sS", "-m", "10", f"http://{OUT4}/"], ns=ns)
    assert page == "a page from outside\n"
    assert network.running
    network.stop()
