"""The addresses of this host, whether it has IPv6, and sockets that tell when that changes (rtnetlink(7)).

>>> from ipaddress import ip_address
>>> ip_address("127.0.0.1") in host_addresses() or not host_addresses()
True
"""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import IPv4Address, IPv6Address

# linux/rtnetlink.h, linux/if_addr.h
_RTM_NEWADDR = 20
_RTM_GETADDR = 22
_NLM_F_REQUEST = 0x1
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100
_RTMGRP_IPV6_ROUTE = 0x400
_OUTSIDE = "2000::1"
"""An address of the global range: who has a route to it has IPv6."""
_HEADER = struct.Struct("=IHHII")
_IFADDRMSG = struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_BUFFER = 1 << 16


def host_addresses() -> frozenset[IPv4Address | IPv6Address]:
    """All addresses of the interfaces of this network namespace.

    Returns:
        The addresses, of both families.

    Raises:
        OSError: The system does not list them.
    """
    found: set[IPv4Address | IPv6Address] = set()
    with _netlink(0) as sock:
        body = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        sock.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETADDR, flags, 1, 0) + body)
        while True:
            data = sock.recv(_BUFFER)
            if not data:
                return frozenset(found)
            if _read(data, found):
                return frozenset(found)


def changes() -> socket.socket:
    """Makes a socket that becomes readable when an address of this host comes or goes.

    Returns:
        The socket, which does not block. Read it until it is empty, then call `host_addresses`.

    Raises:
        OSError: The system has no such sockets.
    """
    sock = _netlink(_RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR)
    sock.setblocking(False)
    return sock


def has_ipv6() -> bool:
    """Whether this host has a route of IPv6 that leads out. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect((_OUTSIDE, 9))
            source = IPv6Address(sock.getsockname()[0])
    except OSError:
        return False
    return not (source.is_loopback or source.is_link_local)


def ipv6_changes() -> socket.socket:
    """Makes a socket that becomes readable when a route or an address of IPv6 comes or goes.

    Returns:
        The socket, which does not block. Read it until it is empty, then call `has_ipv6`.

    Raises:
        OSError: The system has no such sockets.
    """
    sock = _netlink(_RTMGRP_IPV6_IFADDR | _RTMGRP_IPV6_ROUTE)
    sock.setblocking(False)
    return sock


def _netlink(groups: int) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        sock.bind((0, groups))
        sock.settimeout(2.0)
    except BaseException:
        sock.close()
        raise
    return sock


def _read(data: bytes, found: set[IPv4Address | IPv6Address]) -> bool:
    """Adds the addresses of a datagram. True at the end of the list."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _flags, _sequence, _sender = _HEADER.unpack_from(data, at)
        if kind == _NLMSG_DONE:
            return True
        if kind == _NLMSG_ERROR:
            code = -struct.unpack_from("=i", data, at + _HEADER.size)[0]
            raise OSError(code, os.strerror(code))
        if length < _HEADER.size:
            return True
        if kind == _RTM_NEWADDR:
            body = data[at + _HEADER.size : at + length]
            family = body[0]
            attributes = _attributes(body[_IFADDRMSG.size :])
            # On a point-to-point link IFA_ADDRESS is the peer's.
            packed = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
            if packed is not None and family == socket.AF_INET:
                found.add(IPv4Address(packed))
            elif packed is not None and family == socket.AF_INET6:
                found.add(IPv6Address(packed))
        at += (length + 3) & ~3
    return False


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found
