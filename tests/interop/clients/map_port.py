"""map_port.py tcp|udp PORT GATEWAY: a guest's server that maps its own port by PCP (RFC 6887).

TCP says who called and hangs up, UDP answers with who called. Prints "mapped RESULT ADDRESS PORT LIFETIME".
On stdin "delete" deletes the mapping and prints "deleted RESULT", "map" maps again.
"""

import asyncio
import ipaddress
import socket
import struct
import sys

NUMBERS = {"tcp": 6, "udp": 17}


def ask(protocol: str, port: int, gateway: str, lifetime: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.settimeout(2)
        own.connect((gateway, 5351))
        before = bytes(10) + b"\xff\xff"
        client = before + ipaddress.IPv4Address(own.getsockname()[0]).packed
        head = struct.pack("!BBHI", 2, 1, 0, lifetime) + client
        request = (
            head + b"twelve bytes" + struct.pack("!B3xHH", NUMBERS[protocol], port, 0) + before + bytes(4)
        )
        for _ in range(5):
            own.send(request)
            try:
                return own.recv(1100)
            except TimeoutError:
                pass
    sys.exit("no answer")


class Udp(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.transport.sendto(addr[0].encode(), addr)


async def called(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(writer.get_extra_info("peername")[0].encode())
    writer.close()


async def main(protocol: str, port: int, gateway: str) -> None:
    loop = asyncio.get_running_loop()
    if protocol == "tcp":
        await asyncio.start_server(called, "0.0.0.0", port)
    else:
        await loop.create_datagram_endpoint(Udp, ("0.0.0.0", port))
    line = "map"
    while line:
        answer = await loop.run_in_executor(None, ask, protocol, port, gateway, 3600 * (line == "map"))
        result, lifetime = answer[3], int.from_bytes(answer[4:8], "big")
        external, address = int.from_bytes(answer[42:44], "big"), ipaddress.IPv4Address(answer[56:60])
        said = f"mapped {result} {address} {external} {lifetime}" if line == "map" else f"deleted {result}"
        print(said, flush=True)
        line = (await loop.run_in_executor(None, sys.stdin.readline)).strip()


asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
