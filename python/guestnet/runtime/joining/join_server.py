"""Lets guests join a running network by its socket (`runtime.joining.network_socket`).

One thread serves all connections. A connection is one guest:

    reserve   an endpoint is made: the answer has its id, MAC, address, gateway, MTU and name server
    attach    the TAP device that comes with the message is attached, and ports are published
    moving    whether connections of the guest still carry data
    keep      the guest outlives this connection, until its process or the file of its namespace is gone;
              the message brings the descriptor that tells (`guestnet._linux.join_namespace.Watch`)

When a connection ends, its endpoint and its published ports are removed, unless they are to be kept. Limits:
connections in all, bytes of a message, seconds until a guest is attached. Only root and the user of the
network may connect; each connection is checked, whatever the mode of the socket is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from guestnet._linux.host_addresses import has_ipv6
from guestnet._linux.join_namespace import Watch
from guestnet.errors import AlreadyRunning, AttachError, ConfigError, EndpointExists, GuestnetError
from guestnet.runtime.joining import network_socket as wire

if TYPE_CHECKING:
    from guestnet.runtime.network import NatNetwork
    from guestnet.runtime.published.forward import Forward

_log = logging.getLogger("guestnet")

CONNECTIONS_MAX = 1024
_ATTACH_SECONDS = 30.0
_BACKLOG = 128
_ROUTER6 = "fe80::1"
_MOVING = frozenset(("connecting", "syn_sent", "syn_received", "established", "fin_wait_1", "fin_wait_2"))
_QUIET_SECONDS = 1.0


@dataclass(eq=False)
class _Guest:
    """One connection."""

    sock: socket.socket
    since: float
    endpoint: str | None = None
    attached: bool = False
    watch: Watch | None = None
    forwards: list[Forward] = field(default_factory=list)


class JoinServer:
    """Serves the socket at `path` for a network that runs. `close` ends it.

    Args:
        network: the network that guests join.
        path: where the socket is made; a socket that a dead process left there is replaced.

    Raises:
        AlreadyRunning: another process serves this socket.
        GuestnetError: the socket cannot be made.
    """

    def __init__(self, network: NatNetwork, path: str) -> None:
        self.path = path
        self._network = network
        self._guests: dict[int, _Guest] = {}
        self._kept: dict[int, _Guest] = {}
        self._listener = _listen(path)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._ending = False
        self._thread = threading.Thread(target=self._serve, name="guestnet-join", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Removes the socket and ends all connections; guests that joined lose their endpoints."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self._ending = True
        self._wake()
        self._thread.join()
        for guest in [*self._guests.values(), *self._kept.values()]:
            self._leave(guest)
            guest.sock.close()
            if guest.watch is not None:
                guest.watch.close()
                guest.watch = None
        self._selector.close()
        self._listener.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    # --- the serving thread ---

    def _serve(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select(self._patience()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd == self._wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                elif (guest := self._guests.get(key.fd)) is not None:
                    self._hear(guest)
                elif (guest := self._kept.get(key.fd)) is not None:
                    self._look_after(guest)
            self._tidy()

    def _patience(self) -> float | None:
        waiting = [guest.since for guest in self._guests.values() if not guest.attached]
        return None if not waiting else max(0.0, min(waiting) + _ATTACH_SECONDS - time.monotonic())

    def _tidy(self) -> None:
        late = time.monotonic() - _ATTACH_SECONDS
        for guest in [one for one in self._guests.values() if not one.attached and one.since <= late]:
            self._end(guest)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                _log.warning("a guest could not join (%s): raise the limit, `ulimit -n`", error.strerror)
                time.sleep(0.1)  # it stays readable
            return
        sock.setblocking(False)
        try:
            user = wire.peer_user(sock)
            if user not in (0, os.geteuid()):
                _refuse(
                    sock,
                    ConfigError("This network belongs to another user: join it as that user, or as root."),
                )
                return
            if len(self._guests) >= CONNECTIONS_MAX:
                _refuse(
                    sock, GuestnetError(f"{CONNECTIONS_MAX} guests are joining or joined already: end some.")
                )
                return
        except OSError:
            sock.close()
            return
        guest = _Guest(sock, time.monotonic())
        self._guests[sock.fileno()] = guest
        self._selector.register(sock, selectors.EVENT_READ)

    def _hear(self, guest: _Guest) -> None:
        fds: list[int] = []
        try:
            try:
                data, fds, flags, _ = socket.recv_fds(guest.sock, wire.MESSAGE_BYTES, 1)
            except BlockingIOError:
                return
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self._end(guest)
                return
            try:
                answer = self._answer(guest, data, fds)
            except GuestnetError as error:
                answer = wire.refusal(error)
            wire.send(guest.sock, {"ok": True, **answer})
        except OSError:
            self._end(guest)  # the client is gone, or does not read its answers
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, guest: _Guest, data: bytes, fds: list[int]) -> dict[str, Any]:
        try:
            message = json.loads(data)
            if not isinstance(message, dict):
                raise TypeError
        except (ValueError, TypeError, RecursionError):
            raise ConfigError("The message is not a JSON object: use the commands of guestnet.") from None
        operation = message.get("op")
        if operation == "reserve":
            return self._reserve(guest, message)
        if operation == "attach":
            return self._attach(guest, message, fds)
        if operation == "moving":
            return {"moving": self._is_moving(guest)}
        if operation == "keep" and guest.attached and guest.watch is None and fds:
            return self._keep(guest, message.get("name"), fds)
        raise ConfigError(
            f"The network does not understand {operation!r} here: update guestnet on both sides."
        )

    def _reserve(self, guest: _Guest, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("protocol") != wire.PROTOCOL:
            raise ConfigError(
                f"The network speaks version {wire.PROTOCOL} of the protocol and this command version "
                f"{message.get('protocol')}: use the same guestnet for both."
            )
        if guest.endpoint is not None:
            raise ConfigError("This connection has a guest already: make another one.")
        network, config = self._network, self._network.config
        wanted: dict[str, Any] = {name: message.get(name) for name in ("mac", "ip", "hostname")}
        if (name := message.get("id")) is not None:
            endpoint = network.create_endpoint(name, **wanted)
        else:
            endpoint = self._create_numbered(wanted)
        guest.endpoint = endpoint.id
        bridged = str(config.mode) == "bridged"
        return {
            "id": endpoint.id,
            "mac": endpoint.mac,
            "address": None if bridged else f"{endpoint.ip}/{config.subnet.prefixlen}",
            "gateway": None if bridged else str(config.gateway),
            "nameserver": None if bridged else str(config.gateway),
            "search": list(config.search),
            "mtu": config.mtu,
            "address6": self._address6(endpoint),
            "gateway6": str(_ROUTER6) if config.subnet6 is not None and has_ipv6() else None,
        }

    def _address6(self, endpoint: Any) -> str | None:
        """The IPv6 address of a guest: that of its lease, or the one with the number of its IPv4 address.

        None where another guest has that: SLAAC or DHCPv6 may still give it one.
        """
        config = self._network.config
        if config.subnet6 is None:
            return None
        own = next((one.ip6 for one in config.static_leases if one.mac == endpoint.mac and one.ip6), None)
        if own is None:
            own = config.subnet6[int(endpoint.ip) - int(config.subnet.network_address)]
            of_others = any(one.ip6 == own for one in config.static_leases)
            if of_others or any(own in one.addresses for one in self._network if one.id != endpoint.id):
                return None
        return f"{own}/{config.subnet6.prefixlen}"

    def _create_numbered(self, wanted: dict[str, Any]) -> Any:
        number = 0
        while True:
            number += 1
            if (name := f"vm{number}") in self._network:
                continue
            try:
                return self._network.create_endpoint(name, **wanted)
            except EndpointExists:
                if name not in self._network:
                    raise  # it is the hostname that another guest has

    def _attach(self, guest: _Guest, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if guest.endpoint is None or guest.attached:
            raise ConfigError(
                "A guest is attached once, after its reservation: use the commands of guestnet."
            )
        if not fds:
            raise ConfigError("No TAP device came with the message: use the commands of guestnet.")
        published = message.get("publish") or []
        if not isinstance(published, list) or not all(isinstance(one, str) for one in published):
            raise ConfigError("`publish` is not a list of published ports: use the commands of guestnet.")
        endpoint = self._network[guest.endpoint]
        self._network.attach(guest.endpoint, "tap", fd=fds[0])
        fds.clear()  # it belongs to the network now
        try:
            for one in published:
                guest.forwards.append(endpoint.publish(one))
        except GuestnetError:
            self._leave(guest)
            guest.endpoint = None
            raise
        guest.attached = True
        return {"published": [str(forward) for forward in guest.forwards]}

    def _keep(self, guest: _Guest, name: object, fds: list[int]) -> dict[str, Any]:
        if name is not None and not isinstance(name, str):
            raise ConfigError("`name` is not the name of a file: use the commands of guestnet.")
        watch = Watch(fds[0], name)
        try:
            self._selector.register(watch, selectors.EVENT_READ)
        except OSError as error:
            raise AttachError("The descriptor cannot be watched: use the commands of guestnet.") from error
        fds.clear()
        self._kept[watch.fileno()] = guest
        guest.watch = watch
        return {}

    def _is_moving(self, guest: _Guest) -> bool:
        return any(
            flow.endpoint == guest.endpoint
            and flow.protocol == "tcp"
            and flow.state in _MOVING
            and flow.idle < _QUIET_SECONDS
            for flow in self._network.flows()
        )

    def _end(self, guest: _Guest) -> None:
        """The connection is over."""
        self._selector.unregister(guest.sock)
        del self._guests[guest.sock.fileno()]
        guest.sock.close()
        if guest.watch is None:
            self._leave(guest)

    def _look_after(self, guest: _Guest) -> None:
        """Ends a guest if its namespace is gone."""
        watch = guest.watch
        if watch is None or not watch.is_gone():
            return
        self._selector.unregister(watch)
        del self._kept[watch.fileno()]
        watch.close()
        self._leave(guest)

    def _leave(self, guest: _Guest) -> None:
        for forward in guest.forwards:
            with contextlib.suppress(GuestnetError):
                forward.close()
        guest.forwards.clear()
        if guest.endpoint is not None:
            with contextlib.suppress(GuestnetError):
                self._network.remove_endpoint(guest.endpoint)


def _refuse(sock: socket.socket, error: Exception) -> None:
    with sock, contextlib.suppress(OSError):
        wire.send(sock, wire.refusal(error))


def _listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        if _is_live(path):
            raise AlreadyRunning(f"Another process serves {path!r}: stop it, or choose another name.")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.fchmod(sock.fileno(), 0o600)  # Linux gives the file the mode of the socket
        try:
            sock.bind(path)
        except FileNotFoundError:
            # The last network in the directory has ended meanwhile, and has removed it.
            if os.path.dirname(path) != wire.directory():
                raise
            wire.make_directory()
            sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise GuestnetError(
            f"Cannot make the socket {path!r} ({error.strerror}): choose another name."
        ) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _is_live(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:
            return True
        return True
