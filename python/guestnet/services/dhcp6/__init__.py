"""DHCPv6 for the guests of a network (RFC 8415)."""

from guestnet.services.dhcp6.message import Dhcp6Refusal, IaAddress, IaOption, Kind, Message6, Status
from guestnet.services.dhcp6.server import Dhcp6Config, Dhcp6Server

__all__ = [
    "Dhcp6Config",
    "Dhcp6Refusal",
    "Dhcp6Server",
    "IaAddress",
    "IaOption",
    "Kind",
    "Message6",
    "Status",
]
