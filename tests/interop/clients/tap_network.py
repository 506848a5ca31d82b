"""tap_network.py NS DEVICE LEASE_SECONDS: a network with one endpoint that nobody has configured.

The endpoint is TAP DEVICE in namespace NS. Answers "leases" on stdin with a line of JSON: the addresses that
are leased now.
"""

import json
import sys

from guestnet import NatConfig, NatNetwork
from lab.tap import open_tap


def main(ns: str, device: str, lease: str) -> None:
    tap = open_tap(ns, device)
    with NatNetwork(NatConfig(lease_time=int(lease), dns_records={"db.local": "10.9.8.7"})) as network:
        network.create_endpoint("guest")
        network.attach("guest", "tap", fd=tap)
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "leases":
                held = [str(lease.ip) for lease in network.services.dhcp.leases()]
                print("leases " + json.dumps(held), flush=True)


main(*sys.argv[1:])
