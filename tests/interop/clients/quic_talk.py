"""quic_talk.py serve ADDRESS CERT KEY: answers each stream with what came on it.
quic_talk.py ask HOST NAME [VERSION]: says "hello" to HOST, with NAME in the handshake; prints the answer.
"""

from __future__ import annotations

import asyncio
import ssl
import sys

from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.packet import QuicProtocolVersion

PORT, ALPN = 443, ["talk"]
VERSIONS = {"1": QuicProtocolVersion.VERSION_1, "2": QuicProtocolVersion.VERSION_2}


def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async def run() -> None:
        writer.write(await reader.read())
        writer.write_eof()

    answer.tasks.add(asyncio.ensure_future(run()))  # type: ignore[attr-defined]


answer.tasks = set()  # type: ignore[attr-defined]


async def serving(address: str, cert: str, key: str) -> None:
    configuration = QuicConfiguration(is_client=False, alpn_protocols=ALPN)
    configuration.load_cert_chain(cert, key)
    await serve(address, PORT, configuration=configuration, stream_handler=answer)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def ask(host: str, name: str, version: str = "1") -> None:
    chosen = VERSIONS[version]
    configuration = QuicConfiguration(
        is_client=True,
        alpn_protocols=ALPN,
        server_name=name,
        verify_mode=ssl.CERT_NONE,
        original_version=chosen,
        supported_versions=[chosen],
        idle_timeout=3.0,
    )
    async with connect(
        host, PORT, configuration=configuration, create_protocol=QuicConnectionProtocol
    ) as protocol:
        reader, writer = await protocol.create_stream()
        writer.write(b"hello")
        writer.write_eof()
        print((await reader.read()).decode(), flush=True)


if __name__ == "__main__":
    what = {"serve": serving, "ask": ask}[sys.argv[1]]
    asyncio.run(what(*sys.argv[2:]))
