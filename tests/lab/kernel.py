"""A guest behind the kernel's own NAT: the reference for bench/, and a check of the tests themselves."""

from __future__ import annotations

from pathlib import Path

from lab.namespaces import OUT4, Lab, ip

GUEST4, GATEWAY4 = "192.168.64.2", "192.168.64.1"
RULES = """
table ip guestnet_lab {
    chain post { type nat hook postrouting priority 100; oifname "up0" masquerade; }
}
"""


def add_kernel_guest(lab: Lab, *, mtu: int = 1500) -> str:
    """A namespace with the addresses of a guestnet guest, veth to *host*, masqueraded by nftables."""
    name = lab.add_namespace(f"{lab.host.removesuffix('-host')}-kern")
    lab.join(lab.host, "guest0", name, "eth0", mtu=mtu)
    ip("-n", lab.host, "address", "add", f"{GATEWAY4}/24", "dev", "guest0")
    ip("-n", name, "address", "add", f"{GUEST4}/24", "dev", "eth0")
    ip("-n", name, "route", "add", "default", "via", GATEWAY4)
    lab.sysctl(lab.host, "net.ipv4.ip_forward", "1")
    lab.sysctl(lab.host, "net.ipv4.icmp_ratelimit", "0")
    lab.sysctl(name, "net.ipv4.ping_group_range", "0 2147483647")
    done = lab.run(["nft", "-f", "-"], stdin=RULES)
    assert done.returncode == 0, done.stderr
    directory = Path("/etc/netns") / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "resolv.conf").write_text(f"nameserver {OUT4}\n")
    return name
