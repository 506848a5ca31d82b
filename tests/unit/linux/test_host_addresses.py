"""The addresses of the host, in a network namespace whose addresses the test changes."""

import os
import shutil
import subprocess
import sys

import guestnet
import pytest

PROGRAM = """
import select, subprocess
from guestnet._linux.host_addresses import changes, host_addresses

def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)

ip("link", "set", "lo", "up")
print(sorted(map(str, host_addresses())))
with changes() as sock:
    assert not select.select([sock], [], [], 0)[0]
    ip("address", "add", "203.0.113.9/32", "dev", "lo")
    ip("address", "add", "2001:db8::9/128", "dev", "lo")
    assert select.select([sock], [], [], 10)[0], "no notice"
print(sorted(map(str, host_addresses())))
ip("address", "del", "203.0.113.9/32", "dev", "lo")
print(sorted(map(str, host_addresses())))
"""


@pytest.mark.skipif(not shutil.which("ip"), reason="needs iproute2")
def test_addresses_that_come_and_go_are_seen() -> None:
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", PROGRAM]
    root = os.path.dirname(os.path.dirname(guestnet.__file__))
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert done.returncode == 0, done.stderr
    before, during, after = done.stdout.splitlines()
    assert before == after.replace("'2001:db8::9', ", "") == "['127.0.0.1', '::1']"
    assert during == "['127.0.0.1', '2001:db8::9', '203.0.113.9', '::1']"
