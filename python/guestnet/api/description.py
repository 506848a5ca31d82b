"""A network as data: its description, its state, and changes of both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from guestnet.api.exact import exact
from guestnet.api.guests import GuestMethods
from guestnet.api.ports import PortMethods
from guestnet.api.rules import RuleMethods
from guestnet.control.portal import blocking
from guestnet.errors import GuestnetError
from guestnet.model.spec import NetMode
from guestnet.runtime.endpoint import Endpoint
from guestnet.runtime.published.forward import Forward
from guestnet.runtime.registry import NOWHERE

if TYPE_CHECKING:
    from guestnet.model.network_spec import EndpointSpec, Spec
    from guestnet.model.network_state import NetworkState
    from guestnet.model.spec import NatConfig
    from guestnet.model.spec_diff import Change


class DescriptionMethods(GuestMethods, PortMethods, RuleMethods):
    """The description of a network, and its state."""

    def spec(self) -> Spec:
        """The description of the network as it is now.

        Returns:
            The configuration with the DNS records of now, the endpoints that the program created, and the
            ports that it published. Guests of listeners, and ports that guests opened, are not part of it.

        Example:
            >>> from guestnet import NatNetwork
            >>> network = NatNetwork()
            >>> vm = network.create_endpoint("vm1")
            >>> [endpoint.id for endpoint in network.spec().endpoints]
            ['vm1']
        """
        from guestnet.model.network_spec import Spec

        config = self._config_now()
        if config.dns:
            config = config.replace(dns_records=self._services.dns.records())
        endpoints = [self._described(endpoint) for endpoint in self._own_endpoints()]
        return Spec(config, endpoints, [exact(one) for one in self._own_forwards()])

    def _config_now(self) -> NatConfig:
        """The configuration with the rules and limits of now."""
        config, rules = self._config, self._policies.network
        if (rules, self.limit, self.guest_limit) == (config.policy, config.limit, config.guest_limit):
            return config
        return config.replace(policy=rules, limit=self.limit, guest_limit=self.guest_limit)

    def state(self) -> dict[str, Any]:
        """Everything that it takes to make the same network again, as plain data that JSON can carry.

        Flows and attachments end with their network and are not part of it.

        Returns:
            The version of the format, the configuration, endpoints, guests of listeners, DHCP leases, DNS
            records, published ports and listeners.

        Example:
            >>> import json
            >>> from guestnet import NatNetwork
            >>> network = NatNetwork()
            >>> vm = network.create_endpoint("vm1")
            >>> again = NatNetwork.from_state(json.loads(json.dumps(network.state())))
            >>> again["vm1"].mac == vm.mac, again["vm1"].ip == vm.ip
            (True, True)
        """
        from guestnet.model.network_state import EndpointState, NetworkState

        guests = {
            mac: (id, None if ip == NOWHERE else ip) for mac, (id, ip) in self._registry.remembered().items()
        }
        for one in self._registry.all():
            if one.listener is not None:
                guests[one.mac] = (one.id, None if one.ip == NOWHERE else one.ip)
        own = self._own_endpoints()
        services, config = self._services, self._config_now()
        return NetworkState(
            config,
            tuple(
                EndpointState(
                    one.id,
                    one.mac,
                    self._registry.is_proposed(one.id),
                    None if one.ip == NOWHERE else str(one.ip),
                    self._registry.given_hostname(one.id),
                )
                for one in own
            ),
            guests,
            tuple(services.leases()),
            services.dns.records() if config.dns else None,
            tuple(map(exact, self._own_forwards())),
            tuple((one.kind, one.path) for one in self.listeners),
        ).as_dict()

    def _take_over(self, state: NetworkState) -> None:
        """Makes endpoints, guests, leases and records as they were. The network has none yet."""
        registry = self._registry
        for one in state.endpoints:
            registry.restore(one.id, one.mac, one.ip, one.hostname, proposed=one.mac_is_generated)
        for mac, (id, ip) in state.guests.items():
            registry.recall(mac, id, ip)
        if self._config.dhcp:
            own = {one.id for one in state.endpoints}
            self._services.restore([one for one in state.leases if one.endpoint_id in own])
        if self._config.dns and state.records is not None:
            dns = self._services.dns
            for name in set(dns.records()) - set(state.records):
                dns.remove_record(name)
            for name, values in state.records.items():
                if dns.records().get(name) != values:
                    self._set_records(name, values)

    async def aapply(self, changes: Iterable[Change]) -> None:
        """Applies changes to the running network: all of them, or none.

        When one fails, those before it are undone, and its error is raised. What guests can notice most is
        done last: endpoints are removed after everything else has succeeded.

        Args:
            changes: What `guestnet.diff` returned.

        Raises:
            UnsupportedError: A change takes effect with a new start only (`Change.live`).
            NotRunning: The network does not run.
            ForwardNotFound: A port that is to be unpublished is not published.
            EndpointNotFound: An endpoint that is to be removed does not exist.
            PortInUse: A port of the host is in use.
            EndpointExists: An endpoint with this id exists.
            AddressInUse: An address is another's.
            ConfigError: A value is wrong.

        Example:
            >>> from guestnet import EndpointSpec, NatNetwork, Spec, diff
            >>> with NatNetwork() as network:
            ...     wanted = Spec(network.config, [EndpointSpec("vm1")], ["127.0.0.1:0:vm1:80"])
            ...     network.apply(diff(network.spec(), wanted))
            ...     diff(network.spec(), wanted), network.forwards[0].spec.guest
            ([], 'vm1')
        """
        from guestnet.api.apply_changes import ChangeApplier

        self._live()
        applier = ChangeApplier(
            self, self._config, self._registry, self._services, self._described, self._set_records
        )
        await applier.apply(tuple(changes))

    apply = blocking(aapply)

    def _set_records(self, name: str, values: tuple[str, ...]) -> None:
        """Gives a name these records and no others. Raises ConfigError, and changes nothing then."""
        dns = self._services.dns
        before = dns.records().get(name, ())
        dns.remove_record(name)
        try:
            for value in values:
                dns.add_record(name, value)
        except GuestnetError:
            dns.remove_record(name)
            for value in before:
                with contextlib.suppress(GuestnetError):
                    dns.add_record(name, value)
            raise

    def _own_endpoints(self) -> list[Endpoint]:
        return [one for one in self._registry.all() if one.listener is None]

    def _own_forwards(self) -> list[Forward]:
        return [one for one in self.forwards if one.asked_by is None]

    def _described(self, endpoint: Endpoint) -> EndpointSpec:
        from guestnet.model.network_spec import EndpointSpec

        bridged = self._config.mode is NetMode.BRIDGED
        return EndpointSpec(
            endpoint.id,
            None if self._registry.is_proposed(endpoint.id) else endpoint.mac,
            None if bridged else endpoint.ip,
            self._registry.given_hostname(endpoint.id),
        )
