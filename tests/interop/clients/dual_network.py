"""dual_network.py NS1 NS2 PREFIX: a network with IPv6 and two guests, "one" and "two".

They are TAP devices gn0 in two namespaces, which nobody has configured. The network ends with its stdin.
"""

import sys

from guestnet import NatConfig, NatNetwork
from lab.tap import open_tap


def main(first: str, second: str, prefix: str) -> None:
    taps = {"one": open_tap(first, "gn0"), "two": open_tap(second, "gn0")}
    with NatNetwork(NatConfig(subnet6=prefix, lease_time=600)) as network:
        for name, tap in taps.items():
            network.create_endpoint(name)
            network.attach(name, "tap", fd=tap)
        print("ready", flush=True)
        sys.stdin.read()


main(*sys.argv[1:])
