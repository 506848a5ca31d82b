"""DNS for the guests of a network: its own names, and everything else from the host's name servers."""

from guestnet.services.dns.config import Directory, DnsConfig
from guestnet.services.dns.server import DnsServer

__all__ = ["Directory", "DnsConfig", "DnsServer"]
