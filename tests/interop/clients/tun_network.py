"""tun_network.py NS1 NS2 SOCKET OPTIONS: a network with the uplink "tun" and its guests: TAP eth0 in two
namespaces (192.168.64.2 and .3, named one and two), and machines that come to SOCKET.

OPTIONS is a JSON object of NatConfig. Prints "ready" with a JSON object of what the outside has to know. On
stdin: "publish SPEC" answers "published" or "refused" with text, "stats" a JSON object, "flows" their number.
"""

import json
import signal
import sys

from guestnet import GuestnetError, NatConfig, NatNetwork
from lab.tap import open_tap


def main(one: str, two: str, path: str, options: str) -> None:
    taps = {"one": open_tap(one, "eth0"), "two": open_tap(two, "eth0")}
    config = NatConfig(uplink="tun", **json.loads(options))
    with NatNetwork(config) as network:
        for name, tap in taps.items():
            network.create_endpoint(name)
            network.attach(name, "tap", fd=tap)
        network.listen("stream", path)
        ready = {"external": [str(a) for a in network.external], "device": network.uplink_device}
        print("ready " + json.dumps(ready), flush=True)
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            if word == "publish":
                try:
                    print(f"published {network.publish(rest)}", flush=True)
                except GuestnetError as error:
                    print(f"refused {error}", flush=True)
            elif word == "stats":
                told = network.nat_stats().as_dict() | {"connections": network.connection_count}
                told["network"] = network.stats().drops
                print("stats " + json.dumps(told), flush=True)
            elif word == "flows":
                print(f"flows {len(network.flows())}", flush=True)


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
main(*sys.argv[1:])
