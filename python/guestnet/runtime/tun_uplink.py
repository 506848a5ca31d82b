"""The uplink 'tun' of a running network: a device of the host through which translated packets leave."""

from __future__ import annotations

import logging
import os
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from guestnet._linux import links, masquerade, tun

if TYPE_CHECKING:
    from guestnet.model.spec import NatConfig

_log = logging.getLogger("guestnet")


class TunUplink:
    """The device, its addresses and what the host was told of it. `close` takes all of it back."""

    def __init__(self, config: NatConfig) -> None:
        """Makes it. Raises UnsupportedError for a missing privilege or program, AddressInUse for an address
        that the host has itself or has a route to."""
        self.external: tuple[IPv4Address, ...]
        self._changed: masquerade.Masquerade | None = None
        masquerade.sweep_dead()
        self.host: IPv4Address | None = None
        """The host's own address on the device, None with external addresses of your own."""
        if config.external:
            tun.check_external(config.external)
            self.external = config.external
        self.fd, self.device = tun.open_tun()
        """The descriptor; belongs to this object, who needs it duplicates it."""
        try:
            if not config.external:
                self.host, external = tun.free_pair()
                self.external = (external,)
            tun.set_up(self.device, config.mtu, self.external, self.host)
            if config.forwarding or config.masquerade:
                self._changed = masquerade.Masquerade(
                    self.device, self.external, masquerade=config.masquerade
                )
            elif links.read_sysctl("net/ipv4/ip_forward") != "1":
                _log.warning(
                    "this host does not forward: guests reach it alone (net.ipv4.ip_forward is 0; "
                    "`forwarding` turns it on while the network runs)"
                )
        except BaseException:
            self.close()
            raise

    def release(self) -> None:
        """The worker has the device: our descriptor is not needed any more."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        """Takes back what was changed; may be called again."""
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.close()
        self.release()
