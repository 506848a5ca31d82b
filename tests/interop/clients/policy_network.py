"""policy_network.py NS POLICY UPLINK: a network with a policy, and one guest: TAP eth0 in namespace NS.

POLICY is a file. Answers lines on stdin with a line each: "policy FILE" puts another one in force and says
how many flows it cut; "denials" says what was refused, as JSON.
"""

import json
import signal
import sys

from guestnet import NatConfig, NatNetwork, Policy
from lab.tap import open_tap


def main(ns: str, policy: str, uplink: str) -> None:
    tap = open_tap(ns, "eth0")
    with NatNetwork(NatConfig(policy=Policy.load(policy), uplink=uplink)) as network:
        endpoint = network.create_endpoint("guest")
        network.attach("guest", "tap", fd=tap)
        print(f"ready {endpoint.ip} {endpoint.mac}", flush=True)
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            if word == "policy":
                print(f"cut {network.set_policy(Policy.load(rest))}", flush=True)
            elif word == "denials":
                found = [[d.what, d.rule, d.reason, d.name, d.shown] for d in network.denials()]
                print("denials " + json.dumps(found), flush=True)


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
main(*sys.argv[1:])
