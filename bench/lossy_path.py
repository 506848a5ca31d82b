"""TCP of a guest whose link loses frames: through guestnet, and through the kernel on the same path.

    sudo .venv/bin/python bench/lossy_path.py [--loss 1,5,10] [--rtt 50] [--rounds 5] [--json FILE]

Each guest has a namespace and a TAP. Behind the TAP a forwarder (tests/lab/lossy.py) delays each frame and
loses some, each way, by a seed. Behind that is guestnet, or a TAP of *host* where the kernel forwards and
masquerades: the same path with the same seeds. All guests and servers use CUBIC, Linux's own default.
Transfers of one loss run at the same time, so that all have the same machine; a cell is the median of the
rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from lab import Lab, need
from lab.lossy import LossyGuest, add_lossy_guest, forward_in_kernel
from lab.namespaces import OUT4

PORT = 9300
SIZES = {1: 40, 2: 20, 5: 10, 10: 3}
"""Megabytes by percent of loss, so that the kernel takes about a minute or two."""
SERVER = f"""
import socket, threading
def serve(c):
    with c:
        c.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        line = b""
        while not line.endswith(b"\\n"):
            line += c.recv(1)
        way, size = line.split()
        size = int(size)
        if way == b"down":
            block = bytes(65536)
            while size > 0:
                size -= c.send(block[:size])
        else:
            while size > 0:
                got = len(c.recv(65536))
                if not got:
                    return
                size -= got
            c.sendall(b"!")
l = socket.create_server(("0.0.0.0", {PORT}), backlog=64)
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
"""
CLIENT = f"""
import socket, sys, time
way, size = sys.argv[1], int(sys.argv[2])
start = time.monotonic()
c = socket.create_connection(("{OUT4}", {PORT}))
c.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
c.sendall(f"{{way}} {{size}}\\n".encode())
if way == "down":
    while size > 0:
        got = len(c.recv(65536))
        assert got, "it ended early"
        size -= got
else:
    block = bytes(65536)
    while size > 0:
        size -= c.send(block[:size])
    assert c.recv(1) == b"!"
print(time.monotonic() - start)
"""


def once(lab: Lab, guest: LossyGuest, way: str, size: int) -> float:
    """Megabytes a second of one transfer."""
    command = [sys.executable, "-c", CLIENT, way, str(size)]
    took = float(lab.check(command, ns=guest.ns, seconds=900))
    guest.path.stop(30)
    # A few are of the time before the devices were up.
    refused = [line for line in guest.path.lines if line.startswith("way") and int(line.split()[-1]) > 9]
    if refused:
        print(f"  {guest.contender} {way}: the path itself had no room: {refused}", file=sys.stderr)
    lab.remove_namespace(guest.ns)
    return size / took / 1e6


def measure(lab: Lab, loss: int, size: int, delay: float, rounds: int) -> dict[str, list[float]]:
    """Both contenders, both ways, so many rounds, all at the same time."""
    cells = [(c, w, r) for r in range(rounds) for w in ("down", "up") for c in ("guestnet", "kernel")]
    found: dict[str, list[float]] = {}
    guests = {cell: add_lossy_guest(lab, cell[0], loss / 100, delay, 100 * loss + cell[2]) for cell in cells}
    with ThreadPoolExecutor(len(cells)) as pool:
        runs = {cell: pool.submit(once, lab, guest, cell[1], size) for cell, guest in guests.items()}
        for (contender, way, _), run in runs.items():
            found.setdefault(f"{contender} {way}", []).append(run.result())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--loss", default="1,5,10", help="percent each way")
    parser.add_argument("--rtt", type=float, default=50, help="milliseconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--megabytes", type=float, help="of each transfer, instead of one that takes a minute"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    need.root()
    table: dict[str, dict[str, list[float]]] = {}
    with Lab() as lab:
        forward_in_kernel(lab)
        lab.start([sys.executable, "-c", SERVER], ns=lab.out, ready="^ready$")
        for text in options.loss.split(","):
            loss = int(text)
            size = int((options.megabytes or SIZES.get(loss, 10)) * 1e6)
            found = measure(lab, loss, size, options.rtt / 2000, options.rounds)
            table[text] = found
            for way in ("down", "up"):
                ours, theirs = (statistics.median(found[f"{c} {way}"]) for c in ("guestnet", "kernel"))
                print(
                    f"{loss:3d} % loss, {options.rtt:g} ms, {size / 1e6:g} MB {way:5}"
                    f" guestnet {ours:8.3f} MB/s   kernel {theirs:8.3f} MB/s   ratio {ours / theirs:.2f}",
                    flush=True,
                )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


main()
