"""A network for guests that nobody trusts: virtual machines, microVMs and programs in network namespaces.

A `NatNetwork` is one virtual Ethernet segment with a gateway. It gives each guest an address (DHCP), names
(DNS), a way out (NAT) and a way in (published ports). Packet threads in Rust carry the traffic; a control
thread serves the guests. So guests are served whatever the program does.

Make a network, and an endpoint for a guest:

    >>> from guestnet import NatNetwork
    >>> with NatNetwork(subnet="10.9.0.0/24") as network:
    ...     vm = network.create_endpoint("vm1", hostname="web")
    ...     str(network.gateway), str(vm.ip)
    ('10.9.0.1', '10.9.0.2')

Guests attach in one of these ways:

    network.listen("stream", path)          machines come to a socket: QEMU's `-netdev stream`
    network.listen("unixgram", path)        the same for vfkit and libkrun
    network.listen("vhost-user", path)      the same through shared memory
    network.attach("vm1", "tap", fd=fd)     a descriptor that the program has: tap, stream, dgram, vhost-user
    network.attach("vm1", "memory")         the program itself is the guest, one frame at a time

This guest asks which MAC the gateway's address has (an ARP request), and gets a reply:

    >>> question = "ffffffffffff 020000000001 0806 0001 0800 06 04 0001"
    >>> addresses = "020000000001 c0a84002 000000000000 c0a84001"
    >>> with NatNetwork() as network:
    ...     probe = network.create_endpoint("probe", mac="02:00:00:00:00:01")
    ...     guest = network.attach("probe", "memory")
    ...     guest.send(bytes.fromhex(question + addresses))
    ...     answer = guest.recv(timeout=10)
    ...     answer[12:14].hex(), answer[20:22].hex()
    ('0806', '0002')

Publish a port of a guest on the host, as Docker writes it. Port 0 is any free one:

    >>> with NatNetwork() as network:
    ...     vm = network.create_endpoint("vm1")
    ...     forward = network.publish("127.0.0.1:0:vm1:80")
    ...     str(forward.target), forward.host_port > 0
    ('192.168.64.2', True)

Give names of your own, and see what happens:

    >>> kinds = []
    >>> with NatNetwork(dns_records={"db.example": "192.0.2.5"}) as network:
    ...     network.services.dns.add_record("later.example", "192.0.2.6")
    ...     stop_listening = network.on_event(lambda event: kinds.append(event.kind))
    ...     vm = network.create_endpoint("vm1")
    ...     guest = network.attach("vm1", "memory")
    ...     network.stats().connections, network.flows()
    (0, [])
    >>> kinds[0]
    'guest_up'

Say what guests may reach and carry, ask the policy, and change it while the network runs:

    >>> from guestnet import Policy, Rule
    >>> policy = Policy("deny", [Rule("allow", "pypi.org"), Rule("allow", "*.debian.org", limit="50mbit")])
    >>> with NatNetwork(policy=policy, guest_limit="20mbit/5mbit,flows=500") as network:
    ...     print(network.policy.check("198.51.100.7:25"))
    ...     cut = network.set_policy(Policy("deny"))
    ...     network.denials()
    deny 198.51.100.7:25/tcp: default (no rule matches)
    []

Programs with asyncio use `async with`, and methods with an `a` in front:

    >>> import asyncio
    >>> async def main():
    ...     async with NatNetwork() as network:
    ...         return (await network.acreate_endpoint("vm1")).id
    >>> asyncio.run(main())
    'vm1'

Every error is a `GuestnetError`, and its text says what to do:

    >>> NatNetwork(mtu=12)
    Traceback (most recent call last):
    guestnet.errors.ConfigError: mtu 12 is not between 68 and 65520: choose one that is.

What else there is:

- `NatConfig` lists every setting, and checks them.
- `Policy`, `Rule` and `Limit` have every word of a policy; `NatNetwork.decide` asks the program about new
  flows, `audit` writes a log, `learn` writes the policy that would have allowed what guests did.
- `NetworkEvent` and its subclasses (`GuestUp`, `FlowDenied`, ...) are the events of a network.
- `guestnet.errors` has the classes of errors.
- `Runtime` has the threads that the networks of a process share.
- `Spec` describes a network as a value, `diff` compares two descriptions, and `NatNetwork.apply` applies the
  changes.
- `NatEngine` translates packets in place, without a network. `Datapath`, `PacketPool` and `Ring` move frames
  in batches.
- `guestnet.testing` has a guest that speaks ARP, DHCP, DNS and TCP, for tests.
- The command `guestnet` does the same from a shell.

Importing guestnet is cheap: each public name is imported from its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guestnet.control.event_hub import EventStream as EventStream
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
    from guestnet.errors import PolicyError as PolicyError
    from guestnet.errors import PortInUse as PortInUse
    from guestnet.errors import TooManyFiles as TooManyFiles
    from guestnet.errors import UnsupportedError as UnsupportedError
    from guestnet.model.asking import FlowQuestion as FlowQuestion
    from guestnet.model.asking import Ruling as Ruling
    from guestnet.model.denials import Denial as Denial
    from guestnet.model.events import AddressChanged as AddressChanged
    from guestnet.model.events import AddressSeen as AddressSeen
    from guestnet.model.events import EventsLost as EventsLost
    from guestnet.model.events import FlowClosed as FlowClosed
    from guestnet.model.events import FlowDenied as FlowDenied
    from guestnet.model.events import FlowEvent as FlowEvent
    from guestnet.model.events import FlowOpened as FlowOpened
    from guestnet.model.events import GuestDown as GuestDown
    from guestnet.model.events import GuestUp as GuestUp
    from guestnet.model.events import LeaseReleased as LeaseReleased
    from guestnet.model.events import LeaseTaken as LeaseTaken
    from guestnet.model.events import LogMessage as LogMessage
    from guestnet.model.events import NameDenied as NameDenied
    from guestnet.model.events import NetworkEvent as NetworkEvent
    from guestnet.model.events import NetworkFailed as NetworkFailed
    from guestnet.model.events import PortClosed as PortClosed
    from guestnet.model.events import PortOpened as PortOpened
    from guestnet.model.forward_spec import ForwardSpec as ForwardSpec
    from guestnet.model.handles import Handles as Handles
    from guestnet.model.ipam import IpAllocator as IpAllocator
    from guestnet.model.ipam import generate_mac as generate_mac
    from guestnet.model.network_spec import EndpointSpec as EndpointSpec
    from guestnet.model.network_spec import Spec as Spec
    from guestnet.model.spec import Filtering as Filtering
    from guestnet.model.spec import NatConfig as NatConfig
    from guestnet.model.spec import NetMode as NetMode
    from guestnet.model.spec import PollingStrategy as PollingStrategy
    from guestnet.model.spec import StaticLease as StaticLease
    from guestnet.model.spec import Uplink as Uplink
    from guestnet.model.spec_diff import Change as Change
    from guestnet.model.spec_diff import EndpointAdded as EndpointAdded
    from guestnet.model.spec_diff import EndpointRemoved as EndpointRemoved
    from guestnet.model.spec_diff import ForwardAdded as ForwardAdded
    from guestnet.model.spec_diff import ForwardRemoved as ForwardRemoved
    from guestnet.model.spec_diff import LeaseAdded as LeaseAdded
    from guestnet.model.spec_diff import LeaseRemoved as LeaseRemoved
    from guestnet.model.spec_diff import LimitChanged as LimitChanged
    from guestnet.model.spec_diff import PolicyChanged as PolicyChanged
    from guestnet.model.spec_diff import RecordsChanged as RecordsChanged
    from guestnet.model.spec_diff import SettingChanged as SettingChanged
    from guestnet.model.spec_diff import diff as diff
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
    from guestnet.policy.limit import Limit as Limit
    from guestnet.policy.policy import Decision as Decision
    from guestnet.policy.policy import Policy as Policy
    from guestnet.policy.rule import Rule as Rule
    from guestnet.runtime.attachments import Attachment as Attachment
    from guestnet.runtime.attachments import Listener as Listener
    from guestnet.runtime.attachments import MemoryAttachment as MemoryAttachment
    from guestnet.runtime.endpoint import Endpoint as Endpoint
    from guestnet.runtime.network import NatNetwork as NatNetwork
    from guestnet.runtime.published.forward import Forward as Forward
    from guestnet.runtime.services.service_host import Services as Services
    from guestnet.services.dhcp import DhcpServer as DhcpServer
    from guestnet.services.dhcp6 import Dhcp6Server as Dhcp6Server
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
        "PolicyError",
        "PortInUse",
        "TooManyFiles",
        "UnsupportedError",
    ),
    "guestnet.model.events": (
        "AddressChanged",
        "AddressSeen",
        "EventsLost",
        "FlowClosed",
        "FlowDenied",
        "FlowEvent",
        "FlowOpened",
        "GuestDown",
        "GuestUp",
        "LeaseReleased",
        "LeaseTaken",
        "LogMessage",
        "NameDenied",
        "NetworkEvent",
        "NetworkFailed",
        "PortClosed",
        "PortOpened",
    ),
    "guestnet.model.asking": ("FlowQuestion", "Ruling"),
    "guestnet.model.denials": ("Denial",),
    "guestnet.model.handles": ("Handles",),
    "guestnet.policy.limit": ("Limit",),
    "guestnet.policy.policy": ("Decision", "Policy"),
    "guestnet.policy.rule": ("Rule",),
    "guestnet.model.network_spec": ("EndpointSpec", "Spec"),
    "guestnet.model.spec_diff": (
        "Change",
        "EndpointAdded",
        "EndpointRemoved",
        "ForwardAdded",
        "ForwardRemoved",
        "LeaseAdded",
        "LeaseRemoved",
        "LimitChanged",
        "PolicyChanged",
        "RecordsChanged",
        "SettingChanged",
        "diff",
    ),
    "guestnet.control.event_hub": ("EventStream",),
    "guestnet.model.forward_spec": ("ForwardSpec",),
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
    "guestnet.runtime.published.forward": ("Forward",),
    "guestnet.datapath.network_datapath": ("NetworkDatapath",),
    "guestnet.runtime.services.service_host": ("Services",),
    "guestnet.services.dhcp": ("DhcpServer",),
    "guestnet.services.dhcp6": ("Dhcp6Server",),
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
