"""A virtual machine with Debian's kernel, under QEMU without KVM."""

from __future__ import annotations

import json
import re

import pytest
from guestnet import Policy, Rule
from lab import Lab
from lab.namespaces import HOST4, OUT4
from lab.runner import GUESTNET, GuestRunner
from lab.vm import BOOT, Image

pytestmark = [pytest.mark.usefixtures("guest"), pytest.mark.timeout(300)]


def guestnet_vm(lab: Lab, qemu: list[str], *options: str, ready: str | None = None):
    return lab.start([GUESTNET, "vm", *options, "--", *qemu], ordinary=True, ready=ready)


def test_boots_resolves_fetches_and_is_reached(lab: Lab, image: Image) -> None:
    script = """
nslookup -type=a www.example.test
wget -q -O - http://www.example.test/
ping -c 1 -W 5 203.0.113.2 >/dev/null && echo PING-OK
httpd -p 80 -h /www
echo SERVING
sleep 600
"""
    vm = guestnet_vm(lab, image.command("alpha", script), "-p", "8080:80")
    assert vm.wait_line("^GUEST-UP alpha (.*)$", BOOT)[1] == "192.168.64.2/24"
    vm.wait_line("^SERVING", BOOT)
    assert re.search(rf"Address:? ?\d*:? {re.escape(OUT4)}$", vm.output, re.M), vm.output
    assert "a page from outside" in vm.output
    assert "PING-OK" in vm.output
    page = lab.check(["curl", "-sS", "-m", "20", f"http://{HOST4}:8080/"], ns=lab.out)
    assert page == "a page from the guest\n"
    vm.stop()


def test_the_status_of_qemu_is_passed_on(lab: Lab, image: Image) -> None:
    vm = guestnet_vm(lab, image.command("beta", "exit 3"))
    vm.wait_line("^GUEST-STATUS 3", BOOT)
    assert vm.wait(BOOT) == 0


def test_a_megabyte_each_way(lab: Lab, image: Image, guest: GuestRunner) -> None:
    """Through virtio_net, stream framing and the relay; more than any queue on the way holds."""
    script = f"""
head -c 4000000 /dev/urandom >/tmp/up
sha256sum </tmp/up | cut -c 1-64
nc {OUT4} 9007 </tmp/up | cut -d' ' -f2
"""
    vm = guestnet_vm(lab, image.command("gamma", script))
    vm.wait_line("^GUEST-STATUS", BOOT)
    digests = re.findall(r"^[0-9a-f]{64}$", vm.output, re.M)
    assert len(digests) == 2, vm.output
    assert digests[0] == digests[1]
    vm.wait(BOOT)


def test_a_machine_under_a_policy(lab: Lab, image: Image) -> None:
    """One name is allowed: it is reached by name, and by nothing else; the file changes while it runs."""
    script = f"""
get() {{ wget -q -O - "$1" 2>&1 | head -n 1; }}
echo "ALLOWED $(get http://www.example.test/)"
echo "ADDRESS $(get http://{OUT4}/)"
echo "SECOND $(get http://second.example.test/)"
echo "HOST $(wget -q -O - --header 'Host: alias.example.test' http://www.example.test/ 2>&1)"
nslookup -type=a second.example.test >/dev/null 2>&1 || echo NO-NAME
ping -c 1 -W 5 {OUT4} >/dev/null || echo NO-PING
echo WAITING
while wget -q -O /dev/null http://www.example.test/; do sleep 0.2; done
echo CUT-OFF
"""
    policy = lab.dir / "vm-policy.toml"
    policy.write_text(Policy("deny", [Rule("allow", "www.example.test")]).to_toml())
    policy.chmod(0o644)
    log = lab.dir / "vm-audit.jsonl"
    vm = guestnet_vm(lab, image.command("omega", script), "--policy", str(policy), "--audit", str(log))
    vm.wait_line("^WAITING", BOOT)
    assert "ALLOWED a page from outside" in vm.output, vm.output
    for word in ("ADDRESS", "SECOND", "HOST"):
        line = next(line for line in vm.lines if line.startswith(word))
        assert "a page from outside" not in line, line
    assert "403" in next(line for line in vm.lines if line.startswith("HOST"))
    assert "NO-NAME" in vm.lines
    assert "NO-PING" in vm.lines
    policy.write_text('default = "deny"\n')
    vm.wait_line("^CUT-OFF", BOOT)
    vm.wait(BOOT)
    events = {json.loads(line)["event"] for line in log.read_text().splitlines()}
    assert {"end", "denied", "name_denied"} <= events
