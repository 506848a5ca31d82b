"""Proxies of the outside, one process: `python -m lab.proxies HTTP_PORT SOCKS_PORT [USER:PASSWORD]`.

Prints "ready" when both listen, then a line for each request: `http HOST:PORT` or `socks5 HOST:PORT`.
They listen on every address. A request for port 9 is refused by their rules.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import sys

_FORBIDDEN = 9


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def _join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    await asyncio.gather(_pump(reader, far[1]), _pump(far[0], writer))
    far[1].close()
    writer.close()


class Proxies:
    """Both kinds, with or without credentials."""

    def __init__(self, credentials: str) -> None:
        self.credentials = credentials.encode()

    async def http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        except asyncio.IncompleteReadError:
            return writer.close()
        method, place, _ = head[0].split()
        fields = dict(line.split(": ", 1) for line in head[1:] if line)
        wanted = "Basic " + base64.b64encode(self.credentials).decode()
        print(f"http {place}", flush=True)
        if self.credentials and fields.get("Proxy-Authorization") != wanted:
            return await self._end(writer, b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        host, _, port = place.rpartition(":")
        if method != "CONNECT" or int(port) == _FORBIDDEN:
            return await self._end(writer, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        try:
            far = await asyncio.open_connection(host.strip("[]"), int(port))
        except OSError:
            return await self._end(writer, b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
        writer.write(b"HTTP/1.1 200 Connection established\r\nProxy-Agent: lab\r\n\r\n")
        await _join(reader, writer, far)
        return None

    async def socks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            methods = await reader.readexactly((await reader.readexactly(2))[1])
            method = 2 if self.credentials else 0
            if method not in methods:
                return await self._end(writer, b"\x05\xff")
            # Byte by byte: replies come in any pieces.
            await self._slowly(writer, bytes([5, method]))
            if self.credentials:
                user = await reader.readexactly((await reader.readexactly(2))[1])
                password = await reader.readexactly((await reader.readexactly(1))[0])
                if user + b":" + password != self.credentials:
                    return await self._end(writer, b"\x01\x01")
                await self._slowly(writer, b"\x01\x00")
            _, _, _, kind = await reader.readexactly(4)
            host = str(ipaddress.ip_address(await reader.readexactly({1: 4, 4: 16}[kind])))
            port = int.from_bytes(await reader.readexactly(2), "big")
            print(f"socks5 {host}:{port}", flush=True)
            if port == _FORBIDDEN:
                return await self._end(writer, b"\x05\x02\x00\x01" + bytes(6))
            try:
                far = await asyncio.open_connection(host, port)
            except OSError:
                return await self._end(writer, b"\x05\x05\x00\x01" + bytes(6))
            await self._slowly(writer, b"\x05\x00\x00\x03\x03lab\x12\x34")
            await _join(reader, writer, far)
        return None

    @staticmethod
    async def _slowly(writer: asyncio.StreamWriter, data: bytes) -> None:
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    @staticmethod
    async def _end(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()


async def main(http: str, socks: str, credentials: str = "") -> None:
    proxies = Proxies(credentials)
    await asyncio.start_server(proxies.http, "0.0.0.0", int(http))
    await asyncio.start_server(proxies.socks, "0.0.0.0", int(socks))
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
