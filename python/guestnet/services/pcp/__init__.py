"""Ports that guests open themselves: PCP (RFC 6887) and NAT-PMP (RFC 6886)."""

from guestnet.services.pcp.mapper import PcpConfig
from guestnet.services.pcp.message import Opcode, PcpError, Result
from guestnet.services.pcp.ports import PortsOfHost
from guestnet.services.pcp.server import PcpServer
from guestnet.services.pcp.table import Mapping

__all__ = ["Mapping", "Opcode", "PcpConfig", "PcpError", "PcpServer", "PortsOfHost", "Result"]
