"""The client of a running network's socket, for one guest (see `runtime.joining.join_server`)."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from types import TracebackType
from typing import Any, Self

from guestnet.errors import GuestnetError, NotRunning
from guestnet.model.frozen_record import FrozenRecord
from guestnet.runtime.joining import network_socket as wire

_ANSWER_SECONDS = 30.0


class Reservation(FrozenRecord):
    """What the network gave the guest. In the mode `bridged` the segment gives addresses: `address`,
    `gateway` and `nameserver` are None then."""

    id: str
    mac: bytes
    address: IPv4Interface | None
    gateway: IPv4Address | None
    nameserver: str | None
    search: tuple[str, ...]
    mtu: int
    address6: IPv6Interface | None
    gateway6: IPv6Address | None
    """The router of IPv6, if it leads out."""


class NetworkClient:
    """A connection to the network `network`, a name or the path of a socket. The guest lives as long as
    the connection, unless `keep` was called.

    Raises:
        NotRunning: no such network runs.
        GuestnetError: the socket cannot be used.
    """

    def __init__(self, network: str) -> None:
        path = wire.path_of(network)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._sock.settimeout(_ANSWER_SECONDS)
        try:
            self._sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            self._sock.close()
            others = [name for name in wire.running() if name != network]
            known = f" (there is {', '.join(others)})" if others else ""
            raise NotRunning(
                f"No network {network!r} runs{known}: start it with `guestnet up --name {network}`."
            ) from None
        except OSError as error:
            self._sock.close()
            raise GuestnetError(
                f"Cannot connect to the network {network!r} at {path!r} ({error.strerror}): be the user that "
                "started it, or root."
            ) from error

    def reserve(
        self, *, id: str | None = None, mac: str | None = None, hostname: str | None = None
    ) -> Reservation:
        """Makes the guest's endpoint. Raises what `NatNetwork.create_endpoint` raises."""
        got = self._ask("reserve", protocol=wire.PROTOCOL, id=id, mac=mac, hostname=hostname)
        return Reservation(
            id=str(got["id"]),
            mac=bytes.fromhex(str(got["mac"]).replace(":", "")),
            address=None if got["address"] is None else IPv4Interface(got["address"]),
            gateway=None if got["gateway"] is None else IPv4Address(got["gateway"]),
            nameserver=got["nameserver"],
            search=tuple(got["search"]),
            mtu=int(got["mtu"]),
            address6=None if got["address6"] is None else IPv6Interface(got["address6"]),
            gateway6=None if got["gateway6"] is None else IPv6Address(got["gateway6"]),
        )

    def attach(self, tap: int, publish: Iterable[str] = ()) -> list[str]:
        """Attaches the TAP device, which stays the caller's to close, and publishes ports of the guest;
        returns them as they are published. Raises AttachError, PortInUse or ConfigError."""
        published: list[str] = self._ask("attach", [tap], publish=list(publish))["published"]
        return published

    def is_moving(self) -> bool:
        """Whether TCP connections of the guest still carry data."""
        return bool(self._ask("moving")["moving"])

    def keep(self, watch: int, name: str | None) -> None:
        """Lets the guest outlive this connection, until what the descriptor `watch` watches is gone: see
        `guestnet._linux.join_namespace.Watch`."""
        self._ask("keep", [watch], name=name)

    def close(self) -> None:
        """Ends the connection."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, operation: str, fds: Iterable[int] = (), **values: Any) -> dict[str, Any]:
        data = b""
        with contextlib.suppress(OSError):  # it may have said why before it hung up
            wire.send(self._sock, {"op": operation, **values}, fds)
        # If the server hung up without reading, the first call reports that, the next one its last message.
        for _ in range(2):
            with contextlib.suppress(OSError):
                data = self._sock.recv(wire.MESSAGE_BYTES)
                break
        if not data:
            raise NotRunning("The network has ended, or does not answer: look at its `guestnet up`.")
        answer: dict[str, Any] = json.loads(data)
        if not answer.get("ok"):
            wire.raise_refusal(answer)
        return answer
