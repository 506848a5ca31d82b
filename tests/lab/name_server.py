"""The outside's name server alone, on one address: `python -m lab.name_server ADDRESS`."""

from __future__ import annotations

import asyncio
import sys

from lab.servers import Names, UdpNames


async def main(address: str) -> None:
    names = Names()
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: UdpNames(names), (address, 53))
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
