"""A segment of the host that guests can join.

A bridge gets a TAP device as a port. For another interface, a packet socket sends and receives the frames.
Nothing is left when the descriptor is closed, or the process ends: the TAP is not persistent.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import socket
import struct
from dataclasses import dataclass

from guestnet._linux import links
from guestnet.errors import ConfigError, UnsupportedError

_TUNGETIFF = 0x800454D2
_SIOCBRADDIF = 0x89A2
_SIOCGIFMTU = 0x8921
_SIOCGIFHWADDR = 0x8927
_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 1, 15, 23
_PACKET_MR_PROMISC = 1
_SO_ATTACH_FILTER = 26
_RECEIVE_BYTES = 4 << 20
_ETHERNET = 1
_NO_VLAN = (
    (0x30, 0, 0, 0xFFFFF000 + 48),  # the tag, which the kernel keeps apart from the frame: is there one?
    (0x15, 0, 1, 0),
    (0x06, 0, 0, 0x40000),
    (0x06, 0, 0, 0),
)
"""Classic BPF: a tagged frame would be taken for one without a tag."""


@dataclass
class Segment:
    """A connection to a segment: `fd` is for an attachment of the kind "tap"."""

    name: str
    fd: int
    mtu: int
    is_bridge: bool


def join(name: str) -> Segment:
    """Joins the bridge or interface `name`.

    Raises:
        ConfigError: There is none.
        UnsupportedError: This process may not.
    """
    try:
        socket.if_nametoindex(name)
    except (OSError, ValueError):
        raise ConfigError(
            f"There is no bridge or interface {name!r}: `ip link` lists those that there are."
        ) from None
    is_bridge = os.path.isdir(f"/sys/class/net/{name}/bridge")
    try:
        mtu = _mtu(name)
        fd = _join_bridge(name, mtu) if is_bridge else _open_interface(name)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            what = "CAP_NET_ADMIN" if is_bridge else "CAP_NET_RAW"
            raise UnsupportedError(
                f"This process may not join {name!r}: that takes {what} in its network namespace; "
                "run guestnet as root, or use the mode 'nat', which needs no privilege."
            ) from error
        raise UnsupportedError(f"{name!r} cannot be joined: {os.strerror(error.errno or 0)}.") from error
    return Segment(name, fd, mtu, is_bridge)


def _mtu(name: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        got = fcntl.ioctl(sock, _SIOCGIFMTU, struct.pack("16s24x", name.encode()))
    return min(int(struct.unpack_from("=i", got, 16)[0]), 65520)


def _join_bridge(name: str, mtu: int) -> int:
    fd = links.open_tap("gnbr%d")
    try:
        chosen = fcntl.ioctl(fd, _TUNGETIFF, bytes(40))
        own = chosen[:16].rstrip(b"\0").decode()
        # A bridge takes the lowest MAC of its ports for its own. This one is lower than no card's, so that
        # the host keeps the address that it is known by.
        links.set_mac(own, b"\xfe" + secrets.token_bytes(5))
        links.set_mtu(own, mtu)
        links.write_sysctl(f"net/ipv6/conf/{own}/disable_ipv6", "1")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = struct.pack("16si20x", name.encode(), socket.if_nametoindex(own))
            fcntl.ioctl(sock, _SIOCBRADDIF, request)
        links.set_up(own)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_interface(name: str) -> int:
    # Protocol 0 until all is set: nothing comes before the filter is there.
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as sock:
        asked = struct.pack("16s24x", name.encode())
        (kind,) = struct.unpack_from("=H", fcntl.ioctl(sock, _SIOCGIFHWADDR, asked), 16)
        if kind != _ETHERNET:
            raise UnsupportedError(
                f"{name!r} is no Ethernet interface: guests can be joined to one, or to a bridge."
            )
        code = b"".join(struct.pack("=HBBI", *step) for step in _NO_VLAN)
        buffer = ctypes.create_string_buffer(code)
        program = struct.pack("@HP", len(_NO_VLAN), ctypes.addressof(buffer))
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        sock.bind((name, _ETH_P_ALL))
        member = struct.pack("=iHH8s", socket.if_nametoindex(name), _PACKET_MR_PROMISC, 0, bytes(8))
        sock.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, member)
        return sock.detach()
