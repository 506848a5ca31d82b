"""The host's sockets for published ports.

They are opened all of a range or none, so that a port that is in use is reported before a guest starts.
"""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Address, IPv6Address

from guestnet.errors import GuestnetError, PortInUse, TooManyFiles
from guestnet.model.forward_spec import ForwardSpec

BACKLOG = 4096
_EVERYWHERE = IPv4Address("0.0.0.0")


def open_sockets(spec: ForwardSpec) -> list[list[socket.socket]]:
    """For each port of the range the sockets that listen on it: all ports of the range, or none."""
    opened: list[list[socket.socket]] = []
    try:
        for port in spec.host_ports:
            opened.append(_open_port(spec, port))
    except BaseException:
        close_sockets(opened)
        raise
    return opened


def close_sockets(sockets: list[list[socket.socket]]) -> None:
    """Closes them all."""
    for group in sockets:
        for one in group:
            one.close()


def _open_port(spec: ForwardSpec, port: int) -> list[socket.socket]:
    if spec.host_ip is not None:
        return [_open(spec, spec.host_ip, port)]
    first = _open(spec, _EVERYWHERE, port)
    try:
        # The same port for both families, also when the kernel chose it.
        return [first, _open(spec, IPv6Address("::"), int(first.getsockname()[1]))]
    except (PortInUse, TooManyFiles):
        first.close()
        raise
    except (GuestnetError, OSError):
        return [first]  # a host without IPv6


def _open(spec: ForwardSpec, address: IPv4Address | IPv6Address, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if spec.protocol == "tcp" else socket.SOCK_DGRAM
    try:
        made = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise _not_opened(spec, address, port, error) from error
    try:
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            # A connection of an earlier run that lingers in TIME_WAIT does not hold the port.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((str(address), port))
        if kind == socket.SOCK_STREAM:
            made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise _not_opened(spec, address, port, error) from error
    return made


def _not_opened(
    spec: ForwardSpec, address: IPv4Address | IPv6Address, port: int, error: OSError
) -> GuestnetError:
    shown = f"[{address}]" if address.version == 6 else str(address)
    where = f"{spec.protocol.upper()} port {shown}:{port} of the host"
    if error.errno == errno.EADDRINUSE:
        flag = "t" if spec.protocol == "tcp" else "u"
        return PortInUse(
            f"{where} is in use, so {spec} cannot be published: publish another one "
            f"(`ss -ln{flag}p sport = :{port}` says who has it)."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return GuestnetError(
            f"{where} may not be opened by this user: publish a port from 1024 up, or lower the sysctl "
            "net.ipv4.ip_unprivileged_port_start."
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TooManyFiles(
            f"{where} cannot be opened, since too many files are open: publish fewer ports, "
            "or raise the limit (`ulimit -n`)."
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return GuestnetError(f"{where} cannot be opened: this host has no address {address}.")
    return GuestnetError(f"{where} cannot be opened ({error.strerror}): publish another port.")
