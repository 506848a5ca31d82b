"""The demo's guest and outside, in two forms: processes in namespaces, or one process with a guest in
memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from guestnet.cli import arguments
from guestnet.cli.demo import world
from guestnet.cli.runner.session import ENDPOINT
from guestnet.model.defaults import DEFAULT_SUBNET, DEFAULT_ZONE

if TYPE_CHECKING:
    from guestnet.runtime.network import NatNetwork

HTTP_PORT, TRANSFER_PORT = 80, 5201
SUBNET = DEFAULT_SUBNET
MTU = 1500
GREETING = "Hello from outside"


class DemoGuest(Protocol):
    """What the demo asks of its guest and of the outside; each answer is a line for the reader."""

    mac: str
    picture: str
    settings: dict[str, Any]
    publish_on: str

    def attach(self, network: NatNetwork) -> None:
        """Attaches the guest to the network's endpoint `guest` and lets it start."""

    def lease(self) -> str:
        """Gets an address by DHCP."""

    def resolve(self, name: str) -> str:
        """Resolves a name."""

    def fetch(self, name: str) -> str:
        """Fetches a page from the outside."""

    def serve(self, port: int, text: str) -> None:
        """Serves a page in the guest."""

    def fetch_from_outside(self, port: int) -> str:
        """Fetches the guest's page by the published port."""

    def transfer(self, direction: str, seconds: float) -> str:
        """Measures TCP throughput."""

    def close(self) -> None:
        """Ends guest and outside."""


def rate(count: float, seconds: float) -> str:
    """Throughput for people."""
    return f"{count * 8 / seconds / 1e9:.2f} Gbit/s ({count / 1e6:.0f} MB in {seconds:.1f} s)"


class NamespaceGuest:
    """A guest and an outside in namespaces."""

    settings: dict[str, Any] = {"subnet": SUBNET, "mtu": MTU}  # noqa: RUF012 - read only
    publish_on = str(world.HOST.ip)
    picture = (
        "guest --TAP-- guestnet --sockets-- host ==veth== outside\n"
        "Three namespaces without any other link: no frame leaves this machine."
    )

    def __init__(self) -> None:
        from guestnet._linux.links import Interface

        world.become_host()
        from guestnet.model.spec import NatConfig

        config = NatConfig(**self.settings)
        mac = arguments.random_mac()
        self.mac = arguments.format_mac(mac)
        interface = Interface(mac=mac, address=None, gateway=None, mtu=MTU)
        self._world = world.build(interface, str(config.gateway), (DEFAULT_ZONE,))
        self._address = ""
        outside = self._world.outside
        outside.ask("serve_dns", name="web.example", address=str(world.OUTSIDE.ip))
        outside.ask("serve_http", port=HTTP_PORT, text=GREETING)
        outside.ask("serve_transfers", port=TRANSFER_PORT)

    def attach(self, network: NatNetwork) -> None:
        network.attach(ENDPOINT, "tap", fd=self._world.namespace.take_tap())
        self._world.namespace.go()

    def lease(self) -> str:
        got = self._world.guest.ask("lease", interface="eth0", mac=self.mac, mtu=MTU)
        self._address = got["address"].partition("/")[0]
        return f"{got['address']} for {got['seconds']} s, router {got['router']}, name server {got['dns']}"

    def resolve(self, name: str) -> str:
        return f"{name} is {self._world.guest.ask('resolve', name=name)}"

    def fetch(self, name: str) -> str:
        page = self._world.guest.ask("fetch", url=f"http://{name}/")
        return f"http://{name}/ says {page['status']}: {page['text']}"

    def serve(self, port: int, text: str) -> None:
        self._world.guest.ask("serve_http", port=port, text=text)

    def fetch_from_outside(self, port: int) -> str:
        return str(self._world.outside.ask("fetch", url=f"http://{self.publish_on}:{port}/")["text"])

    def transfer(self, direction: str, seconds: float) -> str:
        target = str(world.OUTSIDE.ip)
        got = self._world.guest.ask(
            "transfer", host=target, port=TRANSFER_PORT, seconds=seconds, direction=direction
        )
        return rate(got["bytes"], got["seconds"])

    def close(self) -> None:
        self._world.close()


def make(in_memory: bool) -> DemoGuest:
    """A guest in a namespace where the system allows it, else one in memory."""
    if not in_memory:
        from guestnet.cli import checks

        if all(check.state == checks.OK for check in (checks.check_namespaces(), checks.check_tun())):
            return NamespaceGuest()
    from guestnet.cli.demo.memory import MemoryGuest

    return MemoryGuest()
