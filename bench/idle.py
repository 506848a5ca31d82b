"""idle.py ADDRESS PORT COUNT: holds COUNT idle connections.

Says "0" and waits for a line before it opens them, says "open" once they are, and stays until its input ends.
"""

import asyncio
import resource
import sys


async def main(address: str, port: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    print("0", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    gate = asyncio.Semaphore(128)

    async def one() -> object:
        async with gate:
            return await asyncio.open_connection(address, port)

    held = await asyncio.gather(*(one() for _ in range(count)))
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    del held


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
