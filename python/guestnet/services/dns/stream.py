"""DNS over TCP (RFC 7766), as the relay brings it: each guest's connection is one to a unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable

IDLE = 10.0
"""Seconds that a connection may be silent, or take for one message."""
PER_CONNECTION = 32
"""Questions of one connection that are answered at once; more are not read until then."""
UNREAD = 4 << 20
"""Bytes of answers that wait for one guest to read them, on all its connections; beyond, the one that is to
get more is closed."""
PER_SECOND, SAVED = 1000, 0.25
"""Questions of one guest, on all its connections; each counts once for each 1500 bytes begun, as over UDP,
and its answer for each more. What was not asked in so many seconds before may be asked at once."""
_COUNTED = 1500
_PACES = 1024
"""Guests whose pace is remembered; those that are not asking are forgotten."""

Answer = Callable[[bytes, bool, object], Awaitable[bytes | None]]


class StreamServer:
    """Serves connections; when there are too many, the guest that has the most of them loses the one that was
    silent longest for a new one."""

    def __init__(self, answer: Answer, most: int) -> None:
        self._answer, self._most = answer, most
        self._server: asyncio.Server | None = None
        self._path = ""
        self._connections: OrderedDict[_Connection, None] = OrderedDict()
        self._unread: Counter[object] = Counter()
        self._due: dict[object, float] = {}

    async def open(self, path: str) -> None:
        """Listens from when this returns."""
        self._server = await asyncio.start_unix_server(self._accept, path, backlog=128)
        self._path = path

    async def close(self) -> None:
        """Ends everything."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        tasks = [connection.task for connection in self._connections]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or self._server is None:
            writer.transport.abort()
            return
        if len(self._connections) >= self._most:
            held = Counter(one.asker for one in self._connections)
            most = max(held.values())
            oldest = next(one for one in self._connections if held[one.asker] == most)
            del self._connections[oldest]
            oldest.task.cancel()
        connection = _Connection(task, writer, _asker(writer.get_extra_info("peername")))
        self._connections[connection] = None
        try:
            await self._serve(connection, reader, writer)
        except (OSError, EOFError, TimeoutError):
            pass
        except asyncio.CancelledError:
            # Closed for another connection, or with the server; nobody waits for this task's result.
            pass
        finally:
            self._connections.pop(connection, None)
            for question in connection.questions:
                question.cancel()
            writer.transport.abort()

    async def _serve(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        free = asyncio.Semaphore(PER_CONNECTION)
        while True:
            try:
                async with asyncio.timeout(IDLE):
                    length = int.from_bytes(await reader.readexactly(2), "big")
                    data = await reader.readexactly(length)
            except (asyncio.IncompleteReadError, TimeoutError):
                break
            if connection in self._connections:
                self._connections.move_to_end(connection)
            await asyncio.sleep(self._wait(connection.asker, max(1, -(-length // _COUNTED))))
            await free.acquire()
            question = asyncio.create_task(self._one(connection, data, writer))
            connection.questions.add(question)
            question.add_done_callback(connection.questions.discard)
            question.add_done_callback(lambda _: free.release())
        # The guest may have ended its side only: it still gets what it asked for.
        if connection.questions:
            await asyncio.wait(connection.questions)
        writer.close()
        async with asyncio.timeout(IDLE):
            await writer.wait_closed()

    def _wait(self, asker: object, cost: int) -> float:
        """Seconds that a question waits for those that the guest asked before."""
        now = asyncio.get_running_loop().time()
        if len(self._due) >= _PACES:
            self._due = {one: due for one, due in self._due.items() if due > now - SAVED}
        due = max(self._due.get(asker, 0.0), now - SAVED) + cost / PER_SECOND
        self._due[asker] = due
        return max(0.0, due - now)

    async def _one(self, connection: _Connection, data: bytes, writer: asyncio.StreamWriter) -> None:
        answer = await self._answer(data, True, connection.asker)
        if answer is None:
            # What is no query ends the conversation: there is no telling what else comes.
            connection.task.cancel()
            return
        # The questions that follow wait for this.
        self._wait(connection.asker, len(answer) // _COUNTED)
        self._unread[connection.asker] += len(answer)
        try:
            if self._unread[connection.asker] > UNREAD:
                connection.task.cancel()
                return
            writer.write(len(answer).to_bytes(2, "big") + answer)
            async with asyncio.timeout(IDLE):
                await writer.drain()
        except (OSError, TimeoutError):
            connection.task.cancel()
        finally:
            self._unread[connection.asker] -= len(answer)
            if not self._unread[connection.asker]:
                del self._unread[connection.asker]


def _asker(name: object) -> object:
    """Who a connection is of: the relay names its sockets `guestnet/PORT/` and something unique."""
    if not isinstance(name, bytes) or not name.startswith(b"\0guestnet/"):
        return None
    return name.rpartition(b"/")[0]


class _Connection:
    """One guest's connection."""

    def __init__(self, task: asyncio.Task[None], writer: asyncio.StreamWriter, asker: object) -> None:
        self.task, self.writer = task, writer
        self.asker = asker or self
        """The guest, where the relay tells which one it is."""
        self.questions: set[asyncio.Task[None]] = set()
