"""The TUN device that translated packets leave through, and its addresses and routes on the host.

The device, its addresses and its routes disappear when the process that made it ends, for any reason. What
would stay (forwarding, rules of nftables) is in `guestnet._linux.masquerade`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network

from guestnet._linux import links
from guestnet.errors import AddressInUse, ConfigError, UnsupportedError

CAP_NET_ADMIN = 12
RANGE = IPv4Network("100.64.0.0/10")
"""RFC 6598: shared by networks that translate, and routed nowhere."""

_IFF_TUN = 0x0001
_SIOCADDRT, _SIOCSIFDSTADDR = 0x890B, 0x8918
_RTF_UP, _RTF_HOST = 0x1, 0x4
_NAMES = "guestnet%d"


def open_tun(name: str = _NAMES) -> tuple[int, str]:
    """Makes a TUN device. Returns its descriptor and its name; the kernel replaces `%d` in the name with a
    number.

    Raises UnsupportedError if this process may not, or the kernel has no TUN.
    """
    try:
        fd = os.open(links.TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(
            f"The uplink 'tun' needs {links.TUN_DEVICE} ({error.strerror}): load the module with "
            "`sudo modprobe tun`, or use the uplink 'sockets'."
        ) from error
    try:
        flags = _IFF_TUN | links._IFF_NO_PI | links._IFF_VNET_HDR
        asked = struct.pack("16sH22x", name.encode(), flags)
        got = fcntl.ioctl(fd, links._TUNSETIFF, asked)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EPERM, errno.EACCES):
            raise UnsupportedError(
                "The uplink 'tun' needs CAP_NET_ADMIN in this network namespace: run as root, in a namespace "
                "of your own (`unshare -Urn`), or use the uplink 'sockets', which needs no privilege."
            ) from error
        if error.errno == errno.EBUSY:
            raise ConfigError(f"There is a device {name!r} already: choose another name.") from error
        raise UnsupportedError(f"The TUN device {name!r} cannot be made ({error.strerror}).") from error
    return fd, got[:16].rstrip(b"\0").decode()


def set_up(name: str, mtu: int, external: Sequence[IPv4Address], host: IPv4Address | None) -> None:
    """Brings the device up with a route to each external address. `host` is the host's own address on it."""
    links.set_mtu(name, mtu)
    # There is no IPv6 behind it; the kernel would ask for routers there for ever.
    links.write_sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
    left = list(external)
    if host is not None:
        with links._control() as sock:
            fcntl.ioctl(sock, links._SIOCSIFADDR, links._ifreq(name, links._sockaddr(host)))
            # The other end of the pair: the kernel makes the route to it.
            peer = links._ifreq(name, links._sockaddr(left.pop(0)))
            fcntl.ioctl(sock, _SIOCSIFDSTADDR, peer)
    links.set_up(name)
    for address in left:
        _add_host_route(name, address)


def _add_host_route(name: str, address: IPv4Address) -> None:
    device = ctypes.create_string_buffer(name.encode())
    everything = links._sockaddr(IPv4Address("255.255.255.255"))
    # struct rtentry of linux/route.h: "@" makes the longs and the pointers the machine's own.
    entry = struct.pack(
        "@L16s16s16sHhLPhPLLH",
        0,
        links._sockaddr(address),
        bytes(16),
        everything,
        _RTF_UP | _RTF_HOST,
        0,
        0,
        0,
        0,
        ctypes.addressof(device),
        0,
        0,
        0,
    )
    try:
        with links._control() as sock:
            fcntl.ioctl(sock, _SIOCADDRT, entry)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
        raise AddressInUse(
            f"There is a route to the external address {address} already: choose another address."
        ) from error


def check_external(external: Sequence[IPv4Address]) -> None:
    """Refuses addresses of the host itself, because packets for them never reach the device."""
    for address in external:
        if _is_local(address):
            raise AddressInUse(
                f"The external address {address} is one of this host's own, which answers for it itself: "
                "choose one that is routed here, or none, and masquerading."
            )


def free_pair() -> tuple[IPv4Address, IPv4Address]:
    """The host's and the external address: the first free /30 of the range. Raises AddressInUse."""
    taken = _routes()
    for network in RANGE.subnets(new_prefix=30):
        if not any(network.overlaps(route) for route in taken):
            return network[1], network[2]
    raise AddressInUse(f"All of {RANGE} is routed here: give an external address of your own.")


def _routes() -> list[IPv4Network]:
    """The destinations of this namespace's routes, without the default route."""
    found = []
    with open("/proc/net/route", encoding="ascii") as file:
        next(file, None)
        for line in file:
            fields = line.split()
            destination, mask = (struct.pack("=I", int(fields[i], 16)) for i in (1, 7))
            if mask != bytes(4):
                found.append(IPv4Network((destination, IPv4Address(mask).__str__())))
    return found


def _is_local(address: IPv4Address) -> bool:
    """Whether the address is one of the host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError:
            return False
    return True
