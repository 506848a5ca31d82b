"""Network interfaces by ioctl, and by netlink where ioctl is not enough.

ioctl cannot make a veth pair, and allows only the host's root to set the length of a queue.

A netlink library is not used: importing pyroute2 takes 140 ms (measured), these lines take 2 ms, and
`guestnet run -- true` takes 55 ms in all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)

from guestnet.model.frozen_record import FrozenRecord

TUN_DEVICE = "/dev/net/tun"

# linux/sockios.h, linux/if_tun.h
_SIOCADDRT = 0x890B
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFBRDADDR = 0x891A
_SIOCSIFNETMASK = 0x891C
_SIOCSIFMTU = 0x8922
_SIOCSIFHWADDR = 0x8924
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
TUNSETOFFLOAD = 0x400454D0

_IFF_UP = 0x1
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_RTF_UP = 0x1
_RTF_GATEWAY = 0x2
_RTF_DEFAULT = 0x10000
_RTF_ADDRCONF = 0x40000
_ARPHRD_ETHER = 1


class Interface(FrozenRecord, kw_only=False):
    """The guest's interface. With `address` None it has no address; a DHCP client may get one."""

    mac: bytes
    address: IPv4Interface | None
    gateway: IPv4Address | None
    mtu: int = 1500
    name: str = "eth0"
    address6: IPv6Interface | None = None
    """Without, the interface has no IPv6."""
    gateway6: IPv6Address | None = None
    """The router, if it leads out at the start."""


def _ifreq(name: str, tail: bytes) -> bytes:
    return struct.pack("16s24s", name.encode(), tail)


def _sockaddr(address: IPv4Address) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, address.packed)


def _control() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


QUEUE_LENGTH = 2000
"""Frames: the kernel's 500 are gone in two milliseconds of a busy sender, and a reader may have to wait as
long for the processor."""


def set_up(name: str) -> None:
    """Brings an interface up."""
    with _control() as sock:
        got = fcntl.ioctl(sock, _SIOCGIFFLAGS, _ifreq(name, b""))
        flags = struct.unpack_from("=H", got, 16)[0] | _IFF_UP
        fcntl.ioctl(sock, _SIOCSIFFLAGS, _ifreq(name, struct.pack("=H", flags)))


def set_mac(name: str, mac: bytes) -> None:
    """Sets the hardware address; the interface must be down."""
    with _control() as sock:
        fcntl.ioctl(sock, _SIOCSIFHWADDR, _ifreq(name, struct.pack("=H6s", _ARPHRD_ETHER, mac)))


def set_mtu(name: str, mtu: int) -> None:
    """Sets the MTU in bytes (68 to 65535 for a TAP)."""
    with _control() as sock:
        fcntl.ioctl(sock, _SIOCSIFMTU, _ifreq(name, struct.pack("=i", mtu)))


def set_address(name: str, address: IPv4Interface) -> None:
    """Gives the interface its IPv4 address, mask and broadcast address."""
    network = address.network
    with _control() as sock:
        fcntl.ioctl(sock, _SIOCSIFADDR, _ifreq(name, _sockaddr(address.ip)))
        fcntl.ioctl(sock, _SIOCSIFNETMASK, _ifreq(name, _sockaddr(network.netmask)))
        if network.prefixlen < 31:
            fcntl.ioctl(sock, _SIOCSIFBRDADDR, _ifreq(name, _sockaddr(network.broadcast_address)))


def add_route(destination: IPv4Network, gateway: IPv4Address) -> None:
    """Adds a route by a gateway that must be on an interface's subnet already."""
    # struct rtentry of linux/route.h: "@" makes the longs and the pointers the machine's own.
    entry = struct.pack(
        "@L16s16s16sHhLPhPLLH",
        0,
        _sockaddr(destination.network_address),
        _sockaddr(gateway),
        _sockaddr(destination.netmask),
        _RTF_UP | _RTF_GATEWAY,
        *(0,) * 8,
    )
    with _control() as sock:
        fcntl.ioctl(sock, _SIOCADDRT, entry)


def configure(interface: Interface) -> None:
    """Configures and brings up an existing interface, with a default route."""
    name = interface.name
    set_mac(name, interface.mac)
    set_mtu(name, interface.mtu)
    # Nothing depends on it but speed.
    with contextlib.suppress(OSError):
        set_queue_length(name, QUEUE_LENGTH)
    if interface.address6 is None:
        # Left on in a network without IPv6, the kernel would solicit routers for ever, and every such frame
        # would wake guestnet; programs would also wait for an IPv6 that never answers.
        write_sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
    else:
        # The address is the guest's alone, and is ready before the command starts. Router advertisements
        # still say when the router comes or goes; nobody has to ask for one.
        for setting, value in _SETTINGS6:
            write_sysctl(f"net/ipv6/conf/{setting.format(name)}", value)
    if interface.address is not None:
        set_address(name, interface.address)
    set_up(name)
    if interface.address is not None and interface.gateway is not None:
        add_route(IPv4Network("0.0.0.0/0"), interface.gateway)
    if interface.address6 is not None:
        _add_ipv6(name, interface.address6, interface.gateway6)


_SETTINGS6 = (
    ("all/accept_dad", "0"),
    ("{}/accept_dad", "0"),
    ("{}/autoconf", "0"),
    ("{}/router_solicitations", "0"),
)


def _add_ipv6(name: str, address: IPv6Interface, gateway: IPv6Address | None) -> None:
    index = socket.if_nametoindex(name)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        # struct in6_ifreq and struct in6_rtmsg of linux/ipv6_route.h.
        own = struct.pack("=16sIi", address.packed, address.network.prefixlen, index)
        fcntl.ioctl(sock, _SIOCSIFADDR, own)
        if gateway is None:
            return
        # As if the router had advertised itself: its next advertisement keeps the route, or takes it away.
        flags = _RTF_UP | _RTF_GATEWAY | _RTF_DEFAULT | _RTF_ADDRCONF
        none = bytes(16)
        route = struct.pack("@16s16s16sIHHILIi", none, none, gateway.packed, 0, 0, 0, 1024, 0, flags, index)
        fcntl.ioctl(sock, _SIOCADDRT, route)


def open_tun_device() -> int:
    """Returns a descriptor from which an interface of this network namespace can be made (`open_tap`)."""
    return os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def open_tap(name: str, device: int | None = None) -> int:
    """Makes the TAP interface `name` and returns its descriptor, which is `device` if that is given.

    It has a virtio header if the kernel supports one, for checksum and segmentation offload. The receiver
    asks the kernel (TUNGETIFF) whether there is one.
    """
    fd = open_tun_device() if device is None else device
    try:
        flags = _IFF_TAP | _IFF_NO_PI
        try:
            fcntl.ioctl(fd, _TUNSETIFF, _ifreq(name, struct.pack("=H", flags | _IFF_VNET_HDR)))
        except OSError as error:
            if error.errno != 22:
                raise
            fcntl.ioctl(fd, _TUNSETIFF, _ifreq(name, struct.pack("=H", flags)))
    except BaseException:
        os.close(fd)
        raise
    return fd


def leave_to_namespace(tap: int) -> None:
    """Lets a TAP end with its network namespace instead of with its descriptor.

    Closing the descriptor then waits for nothing. Otherwise it unregisters the interface, which takes 10 to
    30 ms; the kernel ends a namespace in the background. Best effort: failures are ignored.
    """
    with contextlib.suppress(OSError):
        fcntl.ioctl(tap, _TUNSETPERSIST, 1)


def write_sysctl(name: str, value: str) -> bool:
    """Writes /proc/sys/`name`; False where it is missing or read-only (some containers)."""
    try:
        with open(f"/proc/sys/{name}", "w", encoding="utf-8") as file:
            file.write(value)
    except OSError:
        return False
    return True


def read_sysctl(name: str) -> str | None:
    """Returns the text of /proc/sys/`name`, None if there is none."""
    try:
        with open(f"/proc/sys/{name}", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return None


def routes_into(subnet: IPv4Network, table: str = "/proc/net/route") -> list[str]:
    """Returns the routes of this network namespace, except the default route, that lead into `subnet`."""
    try:
        with open(table, encoding="utf-8") as file:
            rows = [line.split() for line in file.readlines()[1:]]
    except OSError:
        return []
    found = []
    for row in rows:
        address, mask = (IPv4Address(int.from_bytes(bytes.fromhex(row[at]), "little")) for at in (1, 7))
        if int(mask) and (network := IPv4Network(f"{address}/{mask}")).overlaps(subnet):
            found.append(f"{network} on {row[0]}")
    return found


def routes6_into(prefix: IPv6Network, table: str = "/proc/net/ipv6_route") -> list[str]:
    """Returns the IPv6 routes of this network namespace, except the default route, that overlap `prefix`."""
    try:
        with open(table, encoding="utf-8") as file:
            rows = [line.split() for line in file]
    except OSError:
        return []
    found: dict[str, None] = {}
    for row in rows:
        length = int(row[1], 16)
        network = IPv6Network((int(row[0], 16), length))
        # The table also has an entry for each own address, which a prefix covers.
        if 0 < length < 128 and network.overlaps(prefix):
            found[f"{network} on {row[-1]}"] = None
    return list(found)


# --- netlink
# ---------------------------------------------------------------------------------------------

_RTM_NEWLINK = 16
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_EXCL, _NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
_IFLA_IFNAME, _IFLA_TXQLEN, _IFLA_LINKINFO, _IFLA_NET_NS_PID = 3, 13, 18, 19
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_VETH_INFO_PEER = 1


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _change_link(body: bytes, flags: int, what: str) -> None:
    flags |= _NLM_F_REQUEST | _NLM_F_ACK
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sock:
        sock.send(struct.pack("=IHHII", 16 + len(body), _RTM_NEWLINK, flags, 1, 0) + body)
        answer = sock.recv(65536)
    error = -struct.unpack_from("=i", answer, 16)[0]
    if error:
        raise OSError(error, os.strerror(error), what)


def set_queue_length(name: str, frames: int) -> None:
    """Sets how many frames wait for the reader of a TAP before the guest loses one."""
    link = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(name), 0, 0)
    _change_link(link + _attribute(_IFLA_TXQLEN, struct.pack("=I", frames)), 0, name)


def add_veth(name: str, peer: str, peer_pid: int) -> None:
    """Makes a veth pair: `name` here and `peer` in the network namespace of process `peer_pid`."""
    info = bytes(16)  # struct ifinfomsg: the kernel chooses the index
    other = (
        info
        + _attribute(_IFLA_IFNAME, peer.encode() + b"\0")
        + _attribute(_IFLA_NET_NS_PID, struct.pack("=I", peer_pid))
    )
    data = _attribute(_IFLA_INFO_DATA, _attribute(_VETH_INFO_PEER, other))
    body = info + _attribute(_IFLA_IFNAME, name.encode() + b"\0")
    body += _attribute(_IFLA_LINKINFO, _attribute(_IFLA_INFO_KIND, b"veth") + data)
    _change_link(body, _NLM_F_EXCL | _NLM_F_CREATE, f"veth {name}")
