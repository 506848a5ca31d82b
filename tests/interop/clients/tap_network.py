"""tap_network.py NS DEVICE LEASE_SECONDS [PREFIX]: a network with one endpoint that nobody has configured.

The endpoint is TAP DEVICE in namespace NS. With PREFIX there is DHCPv6. Answers "leases" on stdin with a line
of JSON: the addresses that are leased now.
"""

import json
import sys

from guestnet import NatConfig, NatNetwork
from lab.tap import open_tap


def main(ns: str, device: str, lease: str, prefix: str | None = None) -> None:
    tap = open_tap(ns, device)
    config = NatConfig(lease_time=int(lease), dns_records={"db.local": "10.9.8.7"}, subnet6=prefix)
    with NatNetwork(config) as network:
        network.create_endpoint("guest")
        network.attach("guest", "tap", fd=tap)
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "leases":
                held = [str(lease.ip) for lease in network.services.leases()]
                print("leases " + json.dumps(held), flush=True)


main(*sys.argv[1:])
