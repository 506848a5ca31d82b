"""Frames of IPv6 that a guest sends, made by hand."""

from __future__ import annotations

from ipaddress import IPv6Address

EVERYONE = IPv6Address("ff02::1")


def checksum(data: bytes) -> int:
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def advertisement(mac: bytes, address: IPv6Address) -> bytes:
    """An unsolicited neighbour advertisement: the guest uses the address."""
    message = b"\x20\0\0\0" + address.packed + b"\x02\x01" + mac
    pseudo = address.packed + EVERYONE.packed + (len(message) + 4).to_bytes(4, "big") + b"\0\0\0\x3a"
    total = 0xFFFF - checksum(pseudo + b"\x88\0\0\0" + message)
    icmp = b"\x88\0" + total.to_bytes(2, "big") + message
    head = b"\x60\0\0\0" + len(icmp).to_bytes(2, "big") + b"\x3a\xff"
    dst = b"\x33\x33" + EVERYONE.packed[12:]
    return dst + mac + b"\x86\xdd" + head + address.packed + EVERYONE.packed + icmp
