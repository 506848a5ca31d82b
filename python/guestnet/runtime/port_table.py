"""Which port of the data plane belongs to which endpoint."""

from __future__ import annotations

from collections.abc import Callable


class PortTable:
    """Ports and endpoint ids of a running network, both ways.

    Args:
        name_port: Tells the data plane what captures call a port.
    """

    def __init__(self, name_port: Callable[[int, str | None], None]) -> None:
        self._name_port = name_port
        self._ids: dict[int, str] = {}
        self._ports: dict[str, int] = {}
        self._next = 1

    def number(self) -> int:
        """A number for a port that this side makes."""
        number, self._next = self._next, self._next + 1
        return number

    def add(self, port: int, endpoint_id: str) -> None:
        """The port is that endpoint's."""
        self._ids[port] = endpoint_id
        self._ports[endpoint_id] = port
        self._name_port(port, endpoint_id)

    def remove(self, port: int) -> None:
        """The port is gone."""
        endpoint_id = self._ids.pop(port, None)
        self._name_port(port, None)
        if endpoint_id is not None:
            self._ports.pop(endpoint_id, None)

    def endpoint(self, port: int) -> str | None:
        """Whose port it is; None for that of a guest that has not shown its MAC."""
        return self._ids.get(port)

    def all(self) -> list[tuple[str, int]]:
        """Endpoint ids and their ports."""
        return list(self._ports.items())

    def port(self, endpoint_id: str) -> int | None:
        """The port of an endpoint."""
        return self._ports.get(endpoint_id)
