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
    from guestnet.control.runtime import Runtime as Runtime
    from guestnet.datapath.network_datapath import NetworkDatapath as NetworkDatapath
    from guestnet.datapath.poller import Datapath as Datapath
    from guestnet.datapath.poller import DatapathPoller as DatapathPoller
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
    from guestnet.model.events import NetworkEvent as NetworkEvent
    from guestnet.model.ipam import IpAllocator as IpAllocator
    from guestnet.model.ipam import generate_mac as generate_mac
    from guestnet.model.spec import Filtering as Filtering
    from guestnet.model.spec import NatConfig as NatConfig
    from guestnet.model.spec import NetMode as NetMode
    from guestnet.model.spec import PollingStrategy as PollingStrategy
    from guestnet.model.spec import StaticLease as StaticLease
    from guestnet.model.spec import Uplink as Uplink
    from guestnet.model.stats import ConnTrackStats as ConnTrackStats
    from guestnet.model.stats import DatapathStats as DatapathStats
    from guestnet.model.stats import FlowRecord as FlowRecord
    from guestnet.model.stats import LeaseRecord as LeaseRecord
    from guestnet.model.stats import MappingRecord as MappingRecord
    from guestnet.model.stats import NatStats as NatStats
    from guestnet.model.stats import NetworkStats as NetworkStats
    from guestnet.nat.engine import Connection as Connection
    from guestnet.nat.engine import NatDirection as NatDirection
    from guestnet.nat.engine import NatEngine as NatEngine
    from guestnet.nat.engine import NatEngineConfig as NatEngineConfig
    from guestnet.nat.engine import NatResult as NatResult
    from guestnet.nat.engine import NatResults as NatResults
    from guestnet.nat.engine import PacketPool as PacketPool
    from guestnet.nat.engine import Ring as Ring
    from guestnet.runtime.attachments import Attachment as Attachment
    from guestnet.runtime.attachments import Listener as Listener
    from guestnet.runtime.attachments import MemoryAttachment as MemoryAttachment
    from guestnet.runtime.endpoint import Endpoint as Endpoint
    from guestnet.runtime.forwards import ForwardSpec as ForwardSpec
    from guestnet.runtime.network import NatNetwork as NatNetwork
    from guestnet.runtime.publishing import Forward as Forward
    from guestnet.runtime.service_host import Services as Services
    from guestnet.services.dhcp import DhcpServer as DhcpServer
    from guestnet.services.dns import DnsServer as DnsServer
    from guestnet.services.pcp import PcpServer as PcpServer

# Where each public name lives. tests/unit/test_package.py holds it against the imports above.
_HOME = {
    "guestnet.control.runtime": ("Runtime",),
    "guestnet.runtime.attachments": ("Attachment", "Listener", "MemoryAttachment"),
    "guestnet.model.spec": ("Filtering", "NatConfig", "NetMode", "PollingStrategy", "StaticLease", "Uplink"),
    "guestnet.datapath.poller": ("Datapath", "DatapathPoller"),
    "guestnet.runtime.endpoint": ("Endpoint",),
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
    "guestnet.model.events": ("NetworkEvent",),
    "guestnet.runtime.forwards": ("ForwardSpec",),
    "guestnet.model.ipam": ("IpAllocator", "generate_mac"),
    "guestnet.nat.engine": (
        "Connection",
        "NatDirection",
        "NatEngine",
        "NatEngineConfig",
        "NatResult",
        "NatResults",
        "PacketPool",
        "Ring",
    ),
    "guestnet.runtime.network": ("NatNetwork",),
    "guestnet.runtime.publishing": ("Forward",),
    "guestnet.datapath.network_datapath": ("NetworkDatapath",),
    "guestnet.runtime.service_host": ("Services",),
    "guestnet.services.dhcp": ("DhcpServer",),
    "guestnet.services.dns": ("DnsServer",),
    "guestnet.services.pcp": ("PcpServer",),
    "guestnet.model.stats": (
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
