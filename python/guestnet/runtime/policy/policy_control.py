"""Puts policies in force, and keeps what they depend on up to date.

Theory of operation:

- `PolicyBook` has the policies of a network and of its endpoints, and the tags of endpoints. It belongs to
  the network and outlives its runs.
- `PolicyControl` belongs to one run. It compiles a policy in a thread, because a large one takes long, and
  gives the table to the data plane. A table that is replaced is kept until the data plane says so.
- A policy that names endpoints or tags is compiled again when one of them gets a port.
- A rule that has ended is taken out at its time.
- The addresses of the host are followed while a policy is in force.
- An audit log that must be written and cannot be denies everything, until it can.

Its methods run in the control thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from guestnet.errors import ConfigError, UnsupportedError
from guestnet.model.spec import NetMode

if TYPE_CHECKING:
    import socket
    from ipaddress import IPv4Address

    from guestnet import _native
    from guestnet._native import PolicyTable
    from guestnet.control.channel import Control
    from guestnet.model.asking import FlowQuestion, Ruling
    from guestnet.policy.policy import Policy
    from guestnet.runtime.policy.asking import Asking, Hook
    from guestnet.runtime.policy.denial_log import DenialLog
    from guestnet.runtime.policy.explain import ExplainPage
    from guestnet.runtime.port_table import PortTable

_log = logging.getLogger("guestnet")

_LONGEST_TIMER = 86400.0
_PAGE = 16
"""The number of the service, for the data plane."""


class PolicyBook:
    """The policies of a network and its endpoints, and the tags of endpoints."""

    def __init__(self, policy: Policy | None) -> None:
        self.network = policy
        self.endpoints: dict[str, Policy] = {}
        self.tags: dict[str, frozenset[str]] = {}
        self.note_names = False
        """Names that guests ask for are noted although no rule is about names."""

    def of(self, endpoint_id: str) -> Policy | None:
        """The policy that holds for an endpoint.

        Args:
            endpoint_id: Its id.

        Returns:
            Its own, else that of the network.
        """
        return self.endpoints.get(endpoint_id, self.network)

    def forget(self, endpoint_id: str) -> None:
        """Forgets an endpoint that was removed.

        Args:
            endpoint_id: Its id.
        """
        self.endpoints.pop(endpoint_id, None)
        self.tags.pop(endpoint_id, None)

    @property
    def is_empty(self) -> bool:
        """Whether no policy is in force."""
        return self.network is None and not self.endpoints and not self.note_names


class PolicyControl:
    """The policies of one running network.

    Args:
        mode: The mode of the network.
        in_force: Called with whether there is a policy, when that changes.
        gateway: The gateway's address.
        denials: Recent denials, for the page that explains them to guests.
        name: What the network is called.
    """

    def __init__(
        self,
        book: PolicyBook,
        mode: NetMode,
        control: Control,
        ports: PortTable,
        in_force: Callable[[bool], object],
        gateway: IPv4Address,
        denials: DenialLog,
        name: str,
    ) -> None:
        self._book, self._mode, self._control, self._ports = book, mode, control, ports
        self._in_force = in_force
        self._gateway, self._denials = gateway, denials
        self._page: ExplainPage | None = None
        self._asking: Asking | None = None
        self._name = name
        self._tables: dict[str | None, PolicyTable] = {}
        """Those in force, by endpoint; None: that of the network."""
        self._changing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._host_changes: socket.socket | None = None
        self.denied_because: str | None = None
        """Why everything is denied at the moment."""

    async def open(self) -> None:
        """Puts the policies in force, before the first guest has a port."""
        if self._book.is_empty:
            return
        if self._mode is NetMode.BRIDGED:
            raise UnsupportedError(
                "With `mode='bridged'` guests are on a segment of the host, for which guestnet has no rules: "
                "leave `policy` out."
            )
        await self._refresh()

    def close(self) -> None:
        """Ends timers and sockets."""
        if self._timer is not None:
            self._timer.cancel()
        self._follow_host(False)
        page, self._page = self._page, None
        if page is not None:
            page.close()
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.close()
        self._in_force = _nobody_hears  # leads to the session, and that leads here

    async def set(self, policy: Policy | None, endpoint_id: str | None = None) -> int:
        """Puts another policy in force.

        Args:
            policy: The policy; None: that of the network for an endpoint, no rules for the network.
            endpoint_id: The endpoint; None: the network.

        Returns:
            How many flows were cut.
        """
        if self._mode is NetMode.BRIDGED:
            raise UnsupportedError(
                "Guests of a network in the mode 'bridged' are on a segment of the host, for which guestnet "
                "has no rules: filter there."
            )
        async with self._changing:
            book = self._book
            before = book.network if endpoint_id is None else book.endpoints.get(endpoint_id)
            self._put(policy, endpoint_id)
            try:
                return await self._push(endpoint_id)
            except BaseException:
                self._put(before, endpoint_id)
                raise

    def _put(self, policy: Policy | None, endpoint_id: str | None) -> None:
        if endpoint_id is None:
            self._book.network = policy
        elif policy is None:
            self._book.endpoints.pop(endpoint_id, None)
        else:
            self._book.endpoints[endpoint_id] = policy

    async def deny_all(self, reason: str | None) -> None:
        """Denies everything, or ends that.

        Args:
            reason: Why; None: the policies are in force again.
        """
        async with self._changing:
            self.denied_because = reason
            await self._refresh_locked()

    async def note_names(self) -> None:
        """Has the names noted that guests ask for, although no rule is about names."""
        if self._mode is NetMode.BRIDGED or self._book.network is not None or self._book.endpoints:
            raise UnsupportedError(
                "A policy is learned where everything passes: leave the policy (and the mode 'bridged') out."
            )
        self._book.note_names = True
        await self._refresh()

    def port_added(self, endpoint_id: str) -> None:
        """An endpoint has a port from now on, which has sent nothing yet.

        Args:
            endpoint_id: Its id.
        """
        if self._book.is_empty:
            return
        names = {endpoint_id, *(f"tag:{tag}" for tag in self._book.tags.get(endpoint_id, ()))}
        for key, policy in self._policies():
            if key == endpoint_id or names & policy.sources:
                self._push_now(key, policy)

    def _policies(self) -> list[tuple[str | None, Policy]]:
        found: list[tuple[str | None, Policy]] = list(self._book.endpoints.items())
        network = self._network_policy()
        return found if network is None else [(None, network), *found]

    def _network_policy(self) -> Policy | None:
        if self._book.network is None and self._book.note_names:
            from guestnet.policy.policy import Policy

            return Policy(default="allow")
        return self._book.network

    def _effective(self, key: str | None) -> Policy | None:
        if self.denied_because is not None and not self._book.is_empty:
            from guestnet.policy.policy import Policy

            return Policy(default="deny")
        found = self._network_policy() if key is None else self._book.endpoints.get(key)
        return None if found is None else found.without_expired()

    async def _refresh(self) -> None:
        async with self._changing:
            await self._refresh_locked()

    async def _refresh_locked(self) -> None:
        for key in [None, *self._book.endpoints]:
            if key is None or self._ports.port(key) is not None:
                await self._push(key)

    async def _push(self, key: str | None) -> int:
        policy = self._effective(key)
        self._note_in_force()
        if policy is not None and policy.explain:
            await self._explain()
        port = None if key is None else self._ports.port(key)
        if key is not None and port is None:
            return 0  # it gets its rules with its port
        table = None
        if policy is not None:
            table = await asyncio.to_thread(policy.compile, self._ports_of, note_names=self._book.note_names)
        cut: int = await self._control.do(self._control.plane.set_rules, port, table)
        self._keep(key, table)
        return cut

    def _push_now(self, key: str | None, policy: Policy) -> None:
        """As `_push`, when the caller cannot wait: commands that follow find it done."""
        effective = self._effective(key) or policy
        port = None if key is None else self._ports.port(key)
        if key is not None and port is None:
            return
        table = effective.compile(self._ports_of, note_names=self._book.note_names)
        before = self._tables.get(key)
        self._control.ensure(self._control.plane.set_rules, port, table)
        self._keep(key, table)
        if before is not None:
            # Freed here, some time after the data plane has let it go.
            self._control.loop.call_later(1.0, lambda: before)

    def _keep(self, key: str | None, table: PolicyTable | None) -> None:
        if table is None:
            self._tables.pop(key, None)
        else:
            self._tables[key] = table
        self._set_timer()

    def _note_in_force(self) -> None:
        used = not self._book.is_empty
        self._in_force(used)
        self._follow_host(used)

    # --- questions ---

    def set_hook(self, hook: Hook | None, loop: asyncio.AbstractEventLoop | None, seconds: float) -> None:
        """Names the function that decides about flows whose rule says "ask".

        Args:
            hook: The function; None: nobody decides.
            loop: The event loop that calls it; None: one of the network's own.
            seconds: How long an answer may take.
        """
        if self._asking is None:
            if hook is None:
                return
            from guestnet.runtime.policy.asking import Asking

            self._asking = Asking(self._control.loop, self._decide, self._ruled)
        self._asking.set_hook(hook, loop, seconds)

    def on_ask(self, event: _native.PolicyAsk) -> None:
        """A flow waits.

        Args:
            event: The event.
        """
        endpoint_id = self._ports.endpoint(event.port)
        if self._asking is None or endpoint_id is None:
            self._decide((event.port, event.ticket), False)
            return
        from guestnet.model.asking import FlowQuestion

        protocol = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp"}.get(event.proto, str(event.proto))
        question = FlowQuestion(
            network=self._name,
            endpoint=endpoint_id,
            protocol=protocol,
            guest=event.guest,
            remote=event.remote,
            name=event.name,
            rule=event.rule,
        )
        self._asking.ask((event.port, event.ticket), question)

    def on_ask_ended(self, event: _native.PolicyAskEnded) -> None:
        """A flow waits no longer.

        Args:
            event: The event.
        """
        if self._asking is not None:
            self._asking.withdraw((event.port, event.ticket))

    def _decide(self, ticket: tuple[int, int], allow: bool) -> None:
        self._control.ensure(self._control.plane.decide, *ticket, allow)

    def _ruled(self, question: FlowQuestion, ruling: Ruling, then: Callable[[], None]) -> None:
        """A ruling holds for later flows too: it becomes a rule in front of the policy."""
        from guestnet.runtime.policy.asking import rule_for

        ends = None if ruling.seconds is None else time.time() + ruling.seconds
        rule = rule_for(
            question,
            ruling.action,
            source=question.endpoint if ruling.scope == "guest" else (),
            label=f"answer: {question.name or question.remote[0]}",
            expires=ends,
        )
        own = self._book.endpoints.get(question.endpoint)
        before = own if own is not None else self._book.network
        if before is None:
            then()
            return
        key = question.endpoint if own is not None else None
        self._control.spawn(self._rule(before.with_rules_first([rule]), key, then))

    async def _rule(self, policy: Policy, endpoint_id: str | None, then: Callable[[], None]) -> None:
        try:
            await self.set(policy, endpoint_id)
        finally:
            then()

    # --- the page ---

    async def _explain(self) -> None:
        """Serves the page that tells guests their rules."""
        if self._page is not None:
            return
        from guestnet.runtime.policy.explain import HTTP_PORT, ExplainPage

        self._page = ExplainPage(self._describe)
        name = await self._page.open()
        await self._control.do(self._control.plane.add_service, _PAGE, "tcp", self._gateway, HTTP_PORT, name)

    def _describe(self, port: int) -> dict[str, Any] | None:
        """What the guest on a port may know: its rules and its denials."""
        endpoint_id = self._ports.endpoint(port)
        policy = None if endpoint_id is None else self._book.of(endpoint_id)
        if endpoint_id is None or policy is None or not policy.explain:
            return None
        mine = {endpoint_id, *(f"tag:{tag}" for tag in self._book.tags.get(endpoint_id, ()))}
        rules = [
            rule
            for rule in policy.without_expired().rules
            if rule.direction == "in" or not rule.source or mine & set(rule.source)
        ]
        denials = [denial.as_dict() for denial in self._denials.recent(endpoint_id)]
        told: dict[str, Any] = {"guest": endpoint_id, "default": policy.default}
        if self.denied_because is not None:
            told["denied"] = self.denied_because
        return {**told, "rules": [{"label": one.label, **one.to_dict()} for one in rules], "denials": denials}

    def _ports_of(self, source: str) -> list[int]:
        if source.startswith("tag:"):
            tag = source[4:]
            ids = [id for id, tags in self._book.tags.items() if tag in tags]
        else:
            ids = [source]
        return [port for id in ids if (port := self._ports.port(id)) is not None]

    # --- time, and the host's addresses ---

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ends = [end for _, policy in self._policies() if (end := policy.next_expiry) is not None]
        coming = [end for end in ends if end > time.time()]
        if coming:
            delay = min(max(0.0, min(coming) - time.time()) + 0.001, _LONGEST_TIMER)
            self._timer = self._control.loop.call_later(delay, self._expired)

    def _expired(self) -> None:
        self._timer = None
        self._control.spawn(self._refresh())

    def _follow_host(self, on: bool) -> None:
        if on == (self._host_changes is not None):
            return
        if not on:
            sock, self._host_changes = self._host_changes, None
            if sock is not None:
                self._control.loop.remove_reader(sock.fileno())
                sock.close()
            return
        try:
            from guestnet._linux.host_addresses import changes

            self._host_changes = changes()
        except (ImportError, OSError, AttributeError) as error:
            _log.warning("the addresses of this host are not followed: %s", error)
            return
        self._control.loop.add_reader(self._host_changes.fileno(), self._host_changed)
        self._tell_host()

    def _host_changed(self) -> None:
        sock = self._host_changes
        if sock is None:
            return
        try:
            while sock.recv(65536):
                pass
        except OSError:
            pass  # it is empty, or some changes were lost: all are read now
        self._tell_host()

    def _tell_host(self) -> None:
        from guestnet._linux.host_addresses import host_addresses

        try:
            found = sorted(host_addresses(), key=lambda one: (one.version, int(one)))
        except OSError as error:
            _log.warning("the addresses of this host cannot be listed: %s", error)
            return
        self._control.ensure(self._control.plane.set_host_addresses, found)


def _nobody_hears(_on: bool) -> None:
    pass


def checked_tags(value: Any) -> frozenset[str]:
    """The tags of an endpoint.

    Args:
        value: Several of them.

    Returns:
        The tags.

    Raises:
        ConfigError: One of them is no tag.
        TypeError: It is not a list of text.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"tags {value!r} is not a list of tags: give a tuple such as ('ci',).")
    tags = frozenset(value)
    for tag in tags:
        if not isinstance(tag, str):
            raise TypeError(f"{tag!r} is no tag: tags are text.")
        if not tag or not tag.isprintable():
            raise ConfigError(f"{tag!r} is no tag: write printable text such as 'ci'.")
    return tags
