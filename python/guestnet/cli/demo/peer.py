"""Processes of the demo that execute requests: requests and answers are JSON lines on a socket.

A peer is forked before the network starts its threads. It moves to its own namespace and then calls the
functions that the demo names. What a function raises becomes the error of the answer.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

Action = Callable[..., Any]

# The slowest action is a transfer of a few seconds.
_ANSWER_SECONDS = 30.0


class PeerError(Exception):
    """A request to a peer failed. The text is the peer's."""


class Peer:
    """The side that sends requests."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(_ANSWER_SECONDS)
        self._sock = sock
        self._file = sock.makefile("rwb")

    def ask(self, action: str, **arguments: Any) -> Any:
        """Requests `action` from the peer and returns its answer."""
        try:
            self._file.write(json.dumps([action, arguments]).encode() + b"\n")
            self._file.flush()
            line = self._file.readline()
        except TimeoutError:
            raise PeerError(f"no answer within {_ANSWER_SECONDS:.0f} s") from None
        except OSError as error:
            raise PeerError(f"the process is gone ({error.strerror or error})") from error
        if not line:
            raise PeerError("the process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Closes the connection, which ends the peer."""
        self._file.close()
        self._sock.close()


def serve(sock: socket.socket, actions: Mapping[str, Action]) -> int:
    """The side that executes requests, until the other end is closed. Returns an exit status."""
    with sock, sock.makefile("rwb") as file:
        for line in file:
            name, arguments = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = {"value": actions[name](**arguments)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}" if str(error) else type(error).__name__}
            file.write(json.dumps(answer).encode() + b"\n")
            file.flush()
    return os.EX_OK
