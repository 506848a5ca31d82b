"""Addresses of a subnet, and MAC addresses.

Theory of operation: the allocator gives the lowest free address, so a network with one guest always gives it
the same one. It stores what was given, not what is free, so an IPv6 subnet costs no more than an IPv4 one.
"""

from __future__ import annotations

import os
from heapq import heappop, heappush
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Generic, TypeVar, cast

from guestnet.errors import ConfigError

Address = TypeVar("Address", bound=IPv4Address | IPv6Address)


class IpAllocator(Generic[Address]):
    """Gives out the addresses from `start` to `end`, both included.

    It is not for several threads at once.

    Args:
        start: The first address.
        end: The last address.

    Raises:
        ConfigError: An address is wrong, the two are of different families, or the range starts after its
            end.
        TypeError: A value is neither text nor an address.

    Example:
        >>> allocator = IpAllocator("192.168.64.2", "192.168.64.4")
        >>> allocator.allocate(), allocator.allocate_specific("192.168.64.3")
        (IPv4Address('192.168.64.2'), True)
        >>> allocator.available
        1
    """

    def __init__(self, start: Address | str, end: Address | str) -> None:
        self._start, self._end = self._read(start), self._read(end)
        if self._start.version != self._end.version:
            raise ConfigError(f"{self._start} and {self._end} are not of one family: give two alike.")
        if int(self._start) > int(self._end):
            raise ConfigError(
                f"The range {self._start} to {self._end} starts after its end: give the lower one first."
            )
        self._type: type[Address] = type(self._start)
        self._taken: set[int] = set()
        self._next = int(self._start)
        """Everything from here on was never given by `allocate`."""
        self._freed: list[int] = []
        """Given back below `_next`; may hold some that `allocate_specific` took since."""

    @staticmethod
    def _read(value: Address | str) -> Address:
        if isinstance(value, IPv4Address | IPv6Address):
            return value
        if not isinstance(value, str):
            raise TypeError(f"{value!r} is not an IP address: give text, or one of the module ipaddress.")
        try:
            return cast("Address", ip_address(value))
        except ValueError:
            raise ConfigError(f"{value!r} is not an IP address: write one such as 192.168.64.2.") from None

    @property
    def start(self) -> Address:
        """The first address."""
        return self._start

    @property
    def end(self) -> Address:
        """The last address."""
        return self._end

    @property
    def available(self) -> int:
        """How many addresses are free."""
        return int(self._end) - int(self._start) + 1 - len(self._taken)

    @property
    def allocated_count(self) -> int:
        """How many addresses of the range are taken."""
        return len(self._taken)

    def __contains__(self, address: object) -> bool:
        """Whether the address belongs to the range, taken or not."""
        return isinstance(address, self._type) and int(self._start) <= int(address) <= int(self._end)

    def __repr__(self) -> str:
        return f"<IpAllocator {self._start}-{self._end}, {self.available} free>"

    def allocate(self) -> Address | None:
        """Takes the lowest free address.

        Returns:
            The address, None when none is free.
        """
        while self._freed:
            number = heappop(self._freed)
            if number not in self._taken:
                return self._take(number)
        while self._next <= int(self._end):
            number, self._next = self._next, self._next + 1
            if number not in self._taken:
                return self._take(number)
        return None

    def _take(self, number: int) -> Address:
        self._taken.add(number)
        return self._type(number)

    def allocate_specific(self, address: Address | str) -> bool:
        """Takes this address.

        Args:
            address: The address.

        Returns:
            Whether it was free and belongs to the range.

        Raises:
            ConfigError: The text is not an address.
            TypeError: The value is neither text nor an address.
        """
        wanted = self._read(address)
        if wanted not in self or int(wanted) in self._taken:
            return False
        self._take(int(wanted))
        return True

    def release(self, address: Address | str) -> bool:
        """Gives an address back.

        Args:
            address: The address.

        Returns:
            Whether it was taken.

        Raises:
            ConfigError: The text is not an address.
            TypeError: The value is neither text nor an address.
        """
        number = int(self._read(address))
        if self._read(address) not in self or number not in self._taken:
            return False
        self._taken.remove(number)
        if number < self._next:
            heappush(self._freed, number)
        return True

    def is_allocated(self, address: Address | str) -> bool:
        """Says whether an address is taken.

        Args:
            address: The address.

        Returns:
            Whether it is taken.

        Raises:
            ConfigError: The text is not an address.
            TypeError: The value is neither text nor an address.
        """
        wanted = self._read(address)
        return wanted in self and int(wanted) in self._taken


def generate_mac() -> str:
    """Makes a random MAC address: locally administered, of one station.

    Returns:
        The address as text.

    Example:
        >>> len(generate_mac())
        17
    """
    return format_mac(bytes(((os.urandom(1)[0] & 0xFC) | 0x02, *os.urandom(5))))


def format_mac(mac: bytes) -> str:
    """A hardware address as people write it."""
    return ":".join(f"{byte:02x}" for byte in mac)


def parse_mac(value: str | bytes, what: str = "mac") -> bytes:
    """The six bytes of a hardware address of one station, from `02:00:5e:10:00:01` or from themselves.

    `what` names the value in the ConfigError for a wrong one.
    """
    try:
        if isinstance(value, str):
            parts = value.replace("-", ":").split(":")
            if any(not 1 <= len(part) <= 2 for part in parts):
                raise ValueError
            mac = bytes(int(part, 16) for part in parts)
        elif isinstance(value, bytes | bytearray):
            mac = bytes(value)
        else:
            raise TypeError
        if len(mac) != 6:
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(
            f"{what} {value!r} is not a MAC address: write one such as 02:00:5e:10:00:01."
        ) from None
    if mac[0] & 1 or not any(mac):
        raise ConfigError(
            f"{what} {format_mac(mac)} is not the MAC address of one station: "
            "write one such as 02:00:5e:10:00:01."
        )
    return mac
