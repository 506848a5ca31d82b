"""tun_network.py NS1 NS2 SOCKET OPTIONS: a network with the uplink "tun" and its guests: TAP eth0 in two
namespaces (192.168.64.2 and .3, named one and two), and machines that come to SOCKET.

OPTIONS is a JSON object of NatConfig. Prints "ready" with a JSON object of what the outside has to know. On
stdin: "publish SPEC" answers "published" or "refused" with text, "stats" a JSON object, "flows" their number.
"""

import json
import signal
import sys
import time

from guestnet import DatapathPoller, GuestnetError, NatConfig, NatNetwork
from lab.namespaces import OUT4
from lab.tap import open_tap
from unit.packets import check, source, udp


def rings(network: NatNetwork, count: int) -> str:
    """Sends `count` datagrams to the echo server as a guest of this program; what came back, and by what."""
    me = network.create_endpoint("rings", ip="192.168.64.50")
    macs = bytes.fromhex((network.config.gateway_mac + me.mac).replace(":", ""))
    for number in range(count):
        packet = udp((str(me.ip), 40000 + number), (OUT4, 7), b"frame %d" % number)
        index = network.packet_pool.put(macs + b"\x08\x00" + packet)
        assert index is not None
        assert network.tx_ring.enqueue(index)
    poller = DatapathPoller(batch_size=100, strategy="event_driven")
    seen = set()
    deadline = time.monotonic() + 20
    while len(seen) < count and time.monotonic() < deadline:
        poller.poll_once(network, patience=1.0)
        while (index := network.rx_ring.dequeue()) is not None:
            frame = network.packet_pool.get(index)
            network.packet_pool.free(index)
            if frame[12:14] == b"\x08\x00":
                check(frame[14:])
                seen.add((source(frame[14:])[0], frame[42:]))
    wanted = {(OUT4, b"frame %d" % number) for number in range(count)}
    stats = network.datapath.stats()
    return f"{len(seen & wanted)} {len(seen - wanted)} {stats.tx_packets} {stats.largest_batch}"


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
                connections = network.uplink_conntrack_stats().connections
                told = network.uplink_nat_stats().as_dict() | {"connections": connections}
                told["network"] = network.stats().drops
                print("stats " + json.dumps(told), flush=True)
            elif word == "rings":
                print(f"rings {rings(network, int(rest))}", flush=True)
            elif word == "flows":
                print(f"flows {len(network.flows())}", flush=True)


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
main(*sys.argv[1:])
