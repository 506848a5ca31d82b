"""many.py ADDRESS PORT COUNT: opens COUNT connections to an echo server, holds them all, and only then sends
on each and checks its own answer. Prints how many were right."""

import asyncio
import resource
import sys


async def open_one(gate: asyncio.Semaphore, address: str, port: int):
    async with gate:
        return await asyncio.open_connection(address, port)


async def ask(i: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    word = b"connection %06d" % i
    writer.write(word)
    return await reader.readexactly(len(word)) == word


async def main(address: str, port: int, count: int) -> None:
    # 256 SYNs in flight: more than any program sends at once, less than the server's backlog.
    gate = asyncio.Semaphore(256)
    streams = await asyncio.gather(*(open_one(gate, address, port) for _ in range(count)))
    print(f"open {len(streams)}", flush=True)
    right = await asyncio.gather(*(ask(i, r, w) for i, (r, w) in enumerate(streams)))
    print(f"right {sum(right)}", flush=True)
    for _, writer in streams:
        writer.close()


resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
