"""guestnet: the network for guests that nobody trusts.

>>> from guestnet import NatConfig, NatNetwork
>>> with NatNetwork(NatConfig(subnet="10.9.0.0/24")) as network:
...     vm = network.create_endpoint("vm1")
...     str(vm.ip)
'10.9.0.2'

Importing this costs nothing: each public name is imported from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guestnet.attachments import Attachment as Attachment
    from guestnet.attachments import Listener as Listener
    from guestnet.attachments import MemoryAttachment as MemoryAttachment
    from guestnet.config import Filtering as Filtering
    from guestnet.config import NatConfig as NatConfig
    from guestnet.config import NetMode as NetMode
    from guestnet.config import PollingStrategy as PollingStrategy
    from guestnet.config import StaticLease as StaticLease
    from guestnet.config import Uplink as Uplink
    from guestnet.datapath import Datapath as Datapath
    from guestnet.datapath import DatapathPoller as DatapathPoller
    from guestnet.endpoint import Endpoint as Endpoint
    from guestnet.errors import AddressInUse as AddressInUse
    from guestnet.errors import AddressPoolExhausted as AddressPoolExhausted
    from guestnet.errors import AlreadyRunning as AlreadyRunning
    from guestnet.errors import AttachError as AttachError
    from guestnet.errors import BusyError as BusyError
    from guestnet.errors import ConfigError as ConfigError
    from guestnet.errors import DataPlaneError as DataPlaneError
    from guestnet.errors import EndpointExists as EndpointExists
    from guestnet.errors import EndpointNotFound as EndpointNotFound
    from guestnet.errors import ForwardNotFound as ForwardNotFound
    from guestnet.errors import GuestnetError as GuestnetError
    from guestnet.errors import NotRunning as NotRunning
    from guestnet.errors import PortInUse as PortInUse
    from guestnet.errors import TooManyFiles as TooManyFiles
    from guestnet.errors import UnsupportedError as UnsupportedError
    from guestnet.events import NetworkEvent as NetworkEvent
    from guestnet.forwards import ForwardSpec as ForwardSpec
    from guestnet.ipam import IpAllocator as IpAllocator
    from guestnet.ipam import generate_mac as generate_mac
    from guestnet.nat import Connection as Connection
    from guestnet.nat import NatDirection as NatDirection
    from guestnet.nat import NatEngine as NatEngine
    from guestnet.nat import NatEngineConfig as NatEngineConfig
    from guestnet.nat import NatResult as NatResult
    from guestnet.nat import NatResults as NatResults
    from guestnet.nat import PacketPool as PacketPool
    from guestnet.nat import Ring as Ring
    from guestnet.network import NatNetwork as NatNetwork
    from guestnet.publishing import Forward as Forward
    from guestnet.rings import NetworkDatapath as NetworkDatapath
    from guestnet.service_host import Services as Services
    from guestnet.services.dhcp import DhcpServer as DhcpServer
    from guestnet.services.dns import DnsServer as DnsServer
    from guestnet.services.pcp import PcpServer as PcpServer
    from guestnet.stats import ConnTrackStats as ConnTrackStats
    from guestnet.stats import DatapathStats as DatapathStats
    from guestnet.stats import FlowRecord as FlowRecord
    from guestnet.stats import LeaseRecord as LeaseRecord
    from guestnet.stats import MappingRecord as MappingRecord
    from guestnet.stats import NatStats as NatStats
    from guestnet.stats import NetworkStats as NetworkStats

# Where each public name lives. tests/unit/test_package.py holds it against the imports above.
_HOME = {
    "guestnet.attachments": ("Attachment", "Listener", "MemoryAttachment"),
    "guestnet.config": ("Filtering", "NatConfig", "NetMode", "PollingStrategy", "StaticLease", "Uplink"),
    "guestnet.datapath": ("Datapath", "DatapathPoller"),
    "guestnet.endpoint": ("Endpoint",),
    "guestnet.errors": (
        "AddressInUse",
        "AddressPoolExhausted",
        "AlreadyRunning",
        "AttachError",
        "BusyError",
        "ConfigError",
        "DataPlaneError",
        "EndpointExists",
        "EndpointNotFound",
        "ForwardNotFound",
        "GuestnetError",
        "NotRunning",
        "PortInUse",
        "TooManyFiles",
        "UnsupportedError",
    ),
    "guestnet.events": ("NetworkEvent",),
    "guestnet.forwards": ("ForwardSpec",),
    "guestnet.ipam": ("IpAllocator", "generate_mac"),
    "guestnet.nat": (
        "Connection",
        "NatDirection",
        "NatEngine",
        "NatEngineConfig",
        "NatResult",
        "NatResults",
        "PacketPool",
        "Ring",
    ),
    "guestnet.network": ("NatNetwork",),
    "guestnet.publishing": ("Forward",),
    "guestnet.rings": ("NetworkDatapath",),
    "guestnet.service_host": ("Services",),
    "guestnet.services.dhcp": ("DhcpServer",),
    "guestnet.services.dns": ("DnsServer",),
    "guestnet.services.pcp": ("PcpServer",),
    "guestnet.stats": (
        "ConnTrackStats",
        "DatapathStats",
        "FlowRecord",
        "LeaseRecord",
        "MappingRecord",
        "NatStats",
        "NetworkStats",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 - computed, and checked by the test


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from guestnet._native import __version__ as version

        globals()[name] = version
        return version
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'guestnet' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, "__version__"})
