"""DHCP for the guests of a network (RFC 2131)."""

from guestnet.services.dhcp.leases import AddressBook, Lease, LeaseStore
from guestnet.services.dhcp.message import DhcpRefusal, Message, MessageType
from guestnet.services.dhcp.server import DhcpConfig, DhcpReply, DhcpServer

__all__ = [
    "AddressBook",
    "DhcpConfig",
    "DhcpRefusal",
    "DhcpReply",
    "DhcpServer",
    "Lease",
    "LeaseStore",
    "Message",
    "MessageType",
]
