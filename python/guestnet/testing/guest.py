"""A guest in memory: ARP, DHCP, DNS, ICMP and TCP over frames that it is given and that it gives.

It serves tests, and the demo where the system allows no namespace. One thread uses its blocking calls
(`lease`, `resolve`, `connect`), while another gives it frames by `receive`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface

from guestnet.errors import NotRunning
from guestnet.testing import frames, messages
from guestnet.testing.tcp import Connection, Key

_ANSWER_SECONDS = 5.0
_RETRY_SECONDS = 0.5
_EVERYWHERE, _NOWHERE = b"\xff" * 4, bytes(4)


class GuestError(Exception):
    """Something that the guest tried failed."""


def _handle(handler: Callable[[Connection], None], connection: Connection) -> None:
    with contextlib.suppress(NotRunning):
        handler(connection)


class Guest:
    """An in-memory guest. `send` takes its frames; frames from the network go to `receive`.

    Args:
        mac: Its MAC address, six bytes.
        send: Takes each frame of the guest.
        mtu: Its IP MTU.
    """

    def __init__(self, mac: bytes, send: Callable[[bytes], None], mtu: int = 1500) -> None:
        self.mac = mac
        self.address: IPv4Interface | None = None
        self.router: IPv4Address | None = None
        self.name_server: IPv4Address | None = None
        self._send = send
        self._mtu = mtu
        # One condition for everything: what a caller waits for changes only when a frame came in.
        self._changed = threading.Condition(threading.RLock())
        self._neighbours: dict[bytes, bytes] = {}
        self._datagrams: dict[int, list[bytes]] = {}
        self._connections: dict[Key, Connection] = {}
        self._servers: dict[int, Callable[[Connection], None]] = {}
        self._pings: dict[tuple[int, int], str] = {}
        """Echo requests under way, by identity and sequence number, with what came of them."""
        self._next_port = 49152

    # --- calls of the guest's program ---

    def lease(self) -> messages.DhcpAnswer:
        """Gets an address by DHCP, and configures the guest with it.

        Returns:
            The answer of the server.

        Raises:
            GuestError: No server answered.
        """
        transaction = os.urandom(4)
        offer = self._dhcp(transaction, messages.DISCOVER, messages.OFFER, {})
        got = self._dhcp(transaction, messages.REQUEST, messages.ACK, offer.request())
        self.address, self.router, self.name_server = got.interface, got.router, got.name_server
        return got

    def resolve(self, name: str) -> IPv4Address:
        """Resolves a name by the name server of the lease.

        Args:
            name: The name.

        Returns:
            Its first address.

        Raises:
            GuestError: The lease has no name server, no answer came, or the name has no address.
        """
        if self.name_server is None:
            raise GuestError("the lease names no name server")
        identity = int.from_bytes(os.urandom(2), "big")
        port = self._port()
        query = messages.dns_query(identity, name)
        self._datagrams[port] = []
        try:
            for data in self._asking(port, lambda: self.send_udp(str(self.name_server), 53, port, query)):
                found = messages.dns_addresses(data, identity)
                if found:
                    return found[0]
                if found is not None:
                    raise GuestError(f"{name} has no address")
        finally:
            del self._datagrams[port]
        raise GuestError(f"no answer about {name}")

    def send_udp(self, host: str, port: int, own_port: int, payload: bytes) -> None:
        """Sends a datagram.

        Args:
            host: The destination address.
            port: The destination port.
            own_port: The source port.
            payload: The data.

        Raises:
            GuestError: The next hop does not answer to ARP.
        """
        target = IPv4Address(host).packed
        self._send_ip(target, frames.udp(self._own(), target, own_port, port, payload))

    def connect(self, host: str, port: int) -> Connection:
        """Opens a TCP connection.

        Args:
            host: The destination address.
            port: The destination port.

        Returns:
            The connection.

        Raises:
            GuestError: It was refused, or not answered.
        """
        connection = self._connection((IPv4Address(host).packed, port, self._port()))
        with self._changed:
            connection.open()
            if not self._wait(lambda: connection.established or connection.error):
                connection.error = connection.error or "no answer"
        if connection.error:
            raise GuestError(f"{host} port {port}: {connection.error}")
        return connection

    def ping(self, host: str, payload: bytes = b"guestnet", patience: float = _ANSWER_SECONDS) -> float:
        """Sends an echo request and waits for the reply.

        Args:
            host: The destination address.
            payload: The data of the request.
            patience: How many seconds to wait.

        Returns:
            The round-trip time in seconds.

        Raises:
            GuestError: No reply came, or an ICMP error.
        """
        target = IPv4Address(host).packed
        key = (int.from_bytes(os.urandom(2), "big"), 1)
        self._pings[key] = ""
        start = time.monotonic()
        try:
            self._send_ip(target, frames.echo(self._own(), target, 8, *key, payload))
            with self._changed:
                self._changed.wait_for(lambda: self._pings[key], patience)
            outcome = self._pings[key]
        finally:
            del self._pings[key]
        if outcome != "answered":
            raise GuestError(f"{host} does not answer to echo: {outcome or 'nothing came back'}")
        return time.monotonic() - start

    def serve(self, port: int, handler: Callable[[Connection], None]) -> None:
        """Calls a function, in a thread of its own, for every TCP connection to a port.

        The threads end when the network is stopped.

        Args:
            port: The port.
            handler: Takes the connection.
        """
        with self._changed:
            self._servers[port] = handler

    # --- frames ---

    def receive(self, frame: bytes) -> None:
        """Takes a frame from the network.

        Args:
            frame: The frame.
        """
        if len(frame) < 14 or frame[:6] not in (self.mac, frames.BROADCAST):
            return
        kind, payload = int.from_bytes(frame[12:14], "big"), bytes(frame[14:])
        with self._changed:
            if kind == frames.ETH_ARP:
                self._arp(payload)
            elif kind == frames.ETH_IPV4 and (packet := frames.parse_ipv4(payload)) is not None:
                # Answers go back the way that the question came: this thread must not wait for ARP.
                self._neighbours.setdefault(self._hop(packet.src), frame[6:12])
                self._ip(packet)
            self._changed.notify_all()

    def _arp(self, data: bytes) -> None:
        if len(data) < 28:
            return
        operation, mac, address, target = data[6:8], data[8:14], data[14:18], data[24:28]
        if self.address is None or target != self._own():
            return
        self._neighbours[address] = mac
        if operation == b"\0\1":
            self._frame(mac, frames.ETH_ARP, frames.arp(2, self.mac, self._own(), mac, address))

    def _ip(self, packet: frames.Packet) -> None:
        if packet.protocol == frames.UDP and (parsed := frames.parse_udp(packet)) is not None:
            queue = self._datagrams.get(parsed[1])
            if queue is not None and len(queue) < 64:
                queue.append(parsed[2])
        elif packet.protocol == frames.ICMP and packet.dst == self._own():
            self._icmp(packet)
        elif packet.protocol == frames.TCP and packet.dst == self._own():
            segment = frames.parse_tcp(packet)
            if segment is not None:
                self._tcp(packet.src, segment)

    def _icmp(self, packet: frames.Packet) -> None:
        parsed = frames.parse_icmp(packet)
        if parsed is None:
            return
        kind, code, identity, sequence, payload = parsed
        if kind == 8:
            answer = frames.echo(self._own(), packet.src, 0, identity, sequence, payload)
            self._send_ip(packet.src, answer)
        elif kind == 0 and (identity, sequence) in self._pings:
            self._pings[identity, sequence] = "answered"
        elif kind in (3, 11) and (quoted := frames.parse_ipv4_head(payload)) is not None:
            key = (int.from_bytes(quoted.payload[4:6], "big"), int.from_bytes(quoted.payload[6:8], "big"))
            if quoted.protocol == frames.ICMP and key in self._pings:
                what = "unreachable" if kind == 3 else "time exceeded"
                self._pings[key] = f"{what} (code {code}) from {IPv4Address(packet.src)}"

    def _tcp(self, host: bytes, segment: frames.Segment) -> None:
        key = (host, segment.src_port, segment.dst_port)
        connection = self._connections.get(key)
        if connection is None and segment.flags & (frames.SYN | frames.ACK | frames.RST) == frames.SYN:
            handler = self._servers.get(segment.dst_port)
            if handler is not None:
                connection = self._connection(key)
                threading.Thread(target=_handle, args=(handler, connection), daemon=True).start()
        if connection is not None:
            connection.receive(segment)
            if connection.finished:
                del self._connections[key]
        elif not segment.flags & frames.RST:
            answer = frames.Segment(
                segment.dst_port, segment.src_port, segment.ack, segment.seq + 1, frames.RST | frames.ACK, 0
            )
            self._send_ip(host, frames.tcp(self._own(), host, answer))

    # --- inside ---

    def _connection(self, key: Key) -> Connection:
        def send(segment: frames.Segment, mss: int) -> None:
            self._send_ip(key[0], frames.tcp(self._own(), key[0], segment, mss))

        with self._changed:
            connection = Connection(key, self._mtu - 40, send, self._changed)
            self._connections[key] = connection
        return connection

    def _dhcp(
        self, transaction: bytes, kind: int, wanted: int, options: dict[int, bytes]
    ) -> messages.DhcpAnswer:
        message = messages.dhcp_message(transaction, self.mac, kind, options)
        packet = frames.udp(_NOWHERE, _EVERYWHERE, 68, 67, message)
        self._datagrams[68] = []
        try:
            for data in self._asking(68, lambda: self._frame(frames.BROADCAST, frames.ETH_IPV4, packet)):
                answer = messages.dhcp_answer(data, transaction)
                if answer is not None and answer.kind == wanted:
                    return answer
        finally:
            del self._datagrams[68]
        raise GuestError("no answer from the DHCP server")

    def _asking(self, port: int, ask: Callable[[], None]) -> list[bytes]:
        """Asks again and again until datagrams come to `port`."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        with self._changed:
            while time.monotonic() < deadline:
                ask()
                if self._changed.wait_for(lambda: bool(self._datagrams[port]), _RETRY_SECONDS):
                    return self._datagrams[port]
        return []

    def _wait(self, done: Callable[[], object]) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: bool(done()), _ANSWER_SECONDS)

    def _own(self) -> bytes:
        return self.address.ip.packed if self.address is not None else _NOWHERE

    def _port(self) -> int:
        self._next_port = self._next_port + 1 if self._next_port < 65535 else 49152
        return self._next_port

    def _frame(self, dst: bytes, kind: int, payload: bytes) -> None:
        self._send(frames.ethernet(dst, self.mac, kind, payload))

    def _hop(self, target: bytes) -> bytes:
        """The neighbour by which an address is reached."""
        if self.address is None or self.router is None or IPv4Address(target) in self.address.network:
            return target
        return self.router.packed

    def _send_ip(self, target: bytes, packet: bytes) -> None:
        if self.address is None or self.router is None:
            raise GuestError("the guest has no address yet")
        hop = self._hop(target)
        mac = self._neighbours.get(hop)
        if mac is None:
            for _ in range(5):
                request = frames.arp(1, self.mac, self._own(), bytes(6), hop)
                self._frame(frames.BROADCAST, frames.ETH_ARP, request)
                with self._changed:
                    if self._changed.wait_for(lambda: hop in self._neighbours, _RETRY_SECONDS):
                        break
            mac = self._neighbours.get(hop)
            if mac is None:
                raise GuestError(f"nobody has the address {IPv4Address(hop)}")
        self._frame(mac, frames.ETH_IPV4, packet)
