"""serve.py tcp|udp PORT...: a guest's server. TCP: says who called, then echoes to the end of input and says
goodbye. UDP: answers with who called and the datagram. Prints "ready" when it listens on every port."""

import asyncio
import sys


async def tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    host, port = writer.get_extra_info("peername")[:2]
    local = writer.get_extra_info("sockname")[1]
    writer.write(f"{host} {port} {local}\n".encode())
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write(b"goodbye\n")
        writer.close()
    except ConnectionError:
        pass


class Udp(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.transport.sendto(f"{addr[0]} {addr[1]} ".encode() + data, addr)


async def main() -> None:
    for port in map(int, sys.argv[2:]):
        if sys.argv[1] == "tcp":
            await asyncio.start_server(tcp, "0.0.0.0", port, backlog=4096)
        else:
            await asyncio.get_running_loop().create_datagram_endpoint(Udp, ("0.0.0.0", port))
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
