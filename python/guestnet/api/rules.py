"""The rules of a running network: its mode, and which guests open flows to each other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from guestnet.api.base import NetworkBase
from guestnet.control.portal import blocking
from guestnet.errors import ConfigError, EndpointNotFound, GuestnetError
from guestnet.model.events import FlowOpened
from guestnet.model.spec import NetMode
from guestnet.model.values import checked_limit, checked_policy, choice
from guestnet.model.values import path as checked_path

if TYPE_CHECKING:
    from guestnet.model.denials import Denial
    from guestnet.policy.limit import Limit
    from guestnet.policy.policy import Policy
    from guestnet.runtime.policy.asking import Hook
    from guestnet.runtime.policy.learning import Learner

_log = logging.getLogger("guestnet")


class RuleMethods(NetworkBase):
    """Changes of the rules while the network runs. They hold until it is stopped."""

    @property
    def mode(self) -> NetMode:
        """The mode now: that of the configuration, or the one that `set_mode` set since the start."""
        session = self._running()
        return self._config.mode if session is None else session.rules.mode

    async def aset_mode(self, mode: str | NetMode) -> int:
        """Changes the mode of the running network. The change holds until the network is stopped.

        Flows that the new mode does not allow are cut: connections are reset at both ends, and what guests
        send on other flows is refused. All of that has happened when this returns.

        Args:
            mode: "nat" or "host_only".

        Returns:
            How many flows were cut.

        Raises:
            NotRunning: The network does not run.
            UnsupportedError: The network has the mode "bridged", or is to get it.
            ConfigError: There is no such mode.

        Example:
            >>> from guestnet import NatNetwork
            >>> with NatNetwork() as network:
            ...     cut = network.set_mode("host_only")
            ...     str(network.mode)
            'host_only'
        """
        return await self._do(self._live().rules.set_mode(choice(NetMode, "mode", mode)))

    set_mode = blocking(aset_mode)

    async def aset_isolation(self, isolated: bool, *, trusted: Iterable[str] = ()) -> int:
        """Isolates the guests of the running network from each other, or ends that.

        An isolated guest opens no flow to another guest. It can answer guests that are not isolated. The
        change holds until the network is stopped.

        Args:
            isolated: Whether guests are isolated.
            trusted: The ids of endpoints that are not isolated. The endpoints may be created later.

        Returns:
            How many conversations were cut that are known to have been open.

        Raises:
            NotRunning: The network does not run.
            UnsupportedError: The network has the mode "bridged".

        Example:
            >>> from guestnet import NatNetwork
            >>> with NatNetwork() as network:
            ...     network.set_isolation(True, trusted=("build-cache",))
            0
        """
        return await self._do(self._live().rules.set_isolation(bool(isolated), _endpoint_ids(trusted)))

    set_isolation = blocking(aset_isolation)

    @property
    def policy(self) -> Policy | None:
        """What guests may reach now; None: everything but the floor."""
        return self._policies.network

    async def aset_policy(
        self, policy: Policy | Mapping[str, Any] | None, *, endpoint: str | None = None
    ) -> int:
        """Puts another policy in force, at once and as a whole.

        Flows that it does not allow are cut: connections are reset at both ends. All of that has happened
        when this returns. When it fails, the policy before it is in force.

        Args:
            policy: The policy, or a mapping with the keys of a policy file. None: no rules; for an endpoint,
                those of the network.
            endpoint: The id of an endpoint that gets rules of its own; None: the network.

        Returns:
            How many flows were cut.

        Raises:
            NotRunning: The network does not run.
            EndpointNotFound: There is no such endpoint.
            UnsupportedError: The network has the mode "bridged".
            PolicyError: Something in the policy is wrong.

        Example:
            >>> from guestnet import NatNetwork, Policy, Rule
            >>> with NatNetwork(policy=Policy("allow")) as network:
            ...     cut = network.set_policy(Policy("deny", [Rule("allow", "pypi.org")]))
            ...     print(network.policy)
            1  allow pypi.org
            -  deny everything else
        """
        wanted, session = checked_policy(policy), self._live()
        if endpoint is not None and self._registry.get(endpoint) is None:
            raise EndpointNotFound(f"There is no endpoint {endpoint!r}: create it first.")
        return await self._do(session.policy.set(wanted, endpoint))

    set_policy = blocking(aset_policy)

    @property
    def limit(self) -> Limit | None:
        """What all guests together may carry now."""
        return self._limits.network

    @property
    def guest_limit(self) -> Limit | None:
        """What each guest may carry now that has no limit of its own."""
        return self._limits.guest

    async def aset_limit(
        self,
        limit: Limit | str | Mapping[str, Any] | None,
        *,
        endpoint: str | None = None,
        each: bool = False,
    ) -> None:
        """Limits what all guests together, or one guest, may carry from now on. It holds until it is changed.

        TCP is slowed by its windows and loses nothing. Datagrams beyond the limit are dropped, and so are
        packets of the uplink "tun". Flows and queries beyond their limit are refused.

        Args:
            limit: The limit, its text such as "10mbit/2mbit", or None for no limit.
            endpoint: The id of an endpoint; None: all guests together.
            each: Instead of all guests together, each guest that has no limit of its own.

        Raises:
            NotRunning: The network does not run.
            EndpointNotFound: There is no such endpoint.
            UnsupportedError: The network has the mode "bridged".
            PolicyError: Something in the limit is wrong.
            ConfigError: There is an endpoint beside `each`.

        Example:
            >>> from guestnet import NatNetwork
            >>> with NatNetwork(guest_limit="10mbit/2mbit") as network:
            ...     vm = network.create_endpoint("vm1")
            ...     network.set_limit("1mbit,flows=20", endpoint="vm1")
        """
        wanted, session = checked_limit(limit), self._live()
        if endpoint is not None and self._registry.get(endpoint) is None:
            raise EndpointNotFound(f"There is no endpoint {endpoint!r}: create it first.")
        if endpoint is not None and each:
            raise ConfigError("The limit is for one guest, or for each: leave `endpoint` or `each` out.")
        await self._do(session.limits.set_guest(wanted) if each else session.limits.set(wanted, endpoint))

    set_limit = blocking(aset_limit)

    def audit(self, path: str | os.PathLike[str], *, starts: bool = False) -> Callable[[], None]:
        """Appends a JSON line to a file for each flow that ends or is refused, and for each refused name.

        A line has the time, the guest, addresses, names, the rule, the verdict and counters. The file is
        rotated at 64 MiB; four older ones are kept. Writing never delays a packet; what is lost is counted in
        the log itself. With `Policy(audit="required")`, everything is denied while the file cannot be
        written.

        Args:
            path: The file.
            starts: Also write a line when a flow starts. Rules with `log` do that for their flows.

        Returns:
            What ends the log.

        Raises:
            ConfigError: The file cannot be written.

        Example:
            >>> import os, tempfile
            >>> from guestnet import NatNetwork
            >>> with tempfile.TemporaryDirectory() as directory, NatNetwork() as network:
            ...     end = network.audit(os.path.join(directory, "audit.jsonl"))
            ...     end()
        """
        from guestnet.runtime.policy.audit import AuditLog

        log = AuditLog(checked_path("audit", path, "audit.jsonl"), starts=self._is_logged(starts))
        log.failed = partial(_audit_failed, weakref.ref(self))
        end = self._events.add_callback(log.note, AuditLog.TYPES)

        def close() -> None:
            end()
            log.close()

        return close

    def _is_logged(self, starts: bool) -> Callable[[FlowOpened], bool]:
        book = self._policies

        def is_logged(event: FlowOpened) -> bool:
            policy = None if event.endpoint is None else book.of(event.endpoint)
            return starts or (policy is not None and event.rule in policy.logged)

        return is_logged

    async def alearn(self) -> Learner:
        """Lets everything pass, and notes what guests open and for which names they asked.

        Returns:
            The learner; its `policy()` would have allowed what was noted.

        Raises:
            NotRunning: The network does not run.
            UnsupportedError: There is a policy, or the network has the mode "bridged".

        Example:
            >>> from guestnet import NatNetwork
            >>> with NatNetwork() as network:
            ...     learner = network.learn()
            ...     print(learner.policy())
            -  deny everything else
        """
        from guestnet.runtime.policy.learning import Learner

        session = self._live()
        await self._do(session.policy.note_names())
        learner = Learner(self._config.zone)
        self._events.add_callback(learner.note, (FlowOpened,))
        return learner

    learn = blocking(alearn)

    async def adecide(self, hook: Hook | None, *, seconds: float = 30.0) -> None:
        """Names the function that decides about flows whose rule says "ask".

        The function gets a `FlowQuestion` and returns "allow", "deny" or a `Ruling`, which can hold for later
        flows too. The flow waits meanwhile; other flows do not. A function that raises, returns something
        else or is too slow denies the flow. An asynchronous function is called in the event loop of the
        caller, or in one of the network's own. A plain one is called in a thread, so it may wait for a
        person.

        Args:
            hook: The function; None: flows that would be asked about are denied.
            seconds: How long an answer may take. `Policy.ask_seconds` is the limit.

        Raises:
            NotRunning: The network does not run.
            ConfigError: The time is not positive.
            TypeError: The hook is not a function.

        Example:
            >>> from guestnet import NatNetwork, Policy, Ruling
            >>> with NatNetwork(policy=Policy("ask")) as network:
            ...     network.decide(lambda question: Ruling("allow", scope="guest", seconds=3600))
        """
        if hook is not None and not callable(hook):
            raise TypeError(f"hook {hook!r} is not a function: give one that takes a FlowQuestion.")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise TypeError(f"seconds {seconds!r} is not a number: give one such as 30.")
        if not (math.isfinite(seconds) and seconds > 0):
            raise ConfigError(f"seconds {seconds!r} is not a positive time: give one such as 30.")
        loop = None
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
        await self._do(self._set_hook(hook, loop, seconds))

    decide = blocking(adecide)

    async def _set_hook(
        self, hook: Hook | None, loop: asyncio.AbstractEventLoop | None, seconds: float
    ) -> None:
        self._live().policy.set_hook(hook, loop, seconds)

    def denials(self, endpoint: str | None = None) -> list[Denial]:
        """What was refused lately, oldest first. Equal denials are counted together.

        Denials are noted while a policy is in force.

        Args:
            endpoint: Those of one guest alone.

        Returns:
            The denials, at most 256 of each guest.

        Example:
            >>> from guestnet import NatNetwork
            >>> NatNetwork().denials()
            []
        """
        return self._denials.recent(endpoint)


def _endpoint_ids(value: object) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"`trusted` {value!r} is not a list of endpoint ids: give a tuple such as ('vm1',).")
    ids = frozenset(value)
    if not all(isinstance(id, str) for id in ids):
        raise TypeError(f"`trusted` {value!r} has something that is not an endpoint id: ids are text.")
    return ids


def _audit_failed(this: weakref.ref[RuleMethods], reason: str | None) -> None:
    """The audit log cannot be written (None: it can again). Called in a thread for callbacks."""
    network = this()
    session = None if network is None else network._running()
    if network is None or session is None:
        return
    if reason is not None:
        _log.error("the audit log cannot be written: %s", reason)
    policy = network._policies.network
    if policy is not None and policy.audit == "required":
        why = None if reason is None else f"the audit log cannot be written ({reason})"
        with contextlib.suppress(GuestnetError):  # it was stopped meanwhile
            network._run(session.policy.deny_all(why))
