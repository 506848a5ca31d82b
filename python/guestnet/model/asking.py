"""The question that a rule with the action "ask" asks of the owner's program, and its answer."""

from __future__ import annotations

import math
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Literal

from guestnet.errors import ConfigError
from guestnet.model.events import Side
from guestnet.model.frozen_record import FrozenRecord

_ACTIONS = ("allow", "deny")
_SCOPES = ("once", "guest", "network")


class FlowQuestion(FrozenRecord):
    """A new flow that waits for a decision. `NatNetwork.decide` names the function that gets it.

    Example:
        >>> question = FlowQuestion(network="lab", endpoint="vm1", protocol="tcp", rule="the rest",
        ...                         guest=(IPv4Address("192.168.64.2"), 40000),
        ...                         remote=(IPv4Address("192.0.2.7"), 443), name="pypi.org")
        >>> print(question)
        vm1 wants tcp to pypi.org:443 (192.0.2.7)
    """

    network: str
    endpoint: str
    """The guest that opens the flow."""
    protocol: str
    """"tcp", "udp", "icmp", or the number of another protocol."""
    guest: Side
    remote: Side
    name: str | None = None
    """A name that the guest asked for to get the remote address."""
    rule: str
    """The label of the rule that asks."""

    def __str__(self) -> str:
        address, port = self.remote
        known: str | IPv4Address | IPv6Address = self.name or address
        place = f"{known}:{port}" if port else f"{known}"
        return f"{self.endpoint} wants {self.protocol} to {place}" + (f" ({address})" if self.name else "")


class Ruling:
    """The answer to a `FlowQuestion`: what happens to the flow, and to later ones like it.

    Args:
        action: "allow" or "deny".
        scope: "once" for this flow; "guest" for every flow of this guest to the same name or address, port
            and protocol; "network" for those of all guests.
        seconds: How long a scope other than "once" holds; None until the network is stopped.

    Raises:
        ConfigError: There is no such action or scope, or the time is not positive.

    Example:
        >>> Ruling("allow", scope="guest", seconds=3600)
        Ruling('allow', scope='guest', seconds=3600)
        >>> Ruling("allow") == Ruling("allow", scope="once")
        True
    """

    __slots__ = ("action", "scope", "seconds")

    def __init__(
        self,
        action: Literal["allow", "deny"],
        *,
        scope: Literal["once", "guest", "network"] = "once",
        seconds: float | None = None,
    ) -> None:
        if action not in _ACTIONS:
            raise ConfigError(f"action {action!r} is none of 'allow', 'deny': choose one of them.")
        if scope not in _SCOPES:
            raise ConfigError(f"scope {scope!r} is none of 'once', 'guest', 'network': choose one of them.")
        if seconds is not None:
            if isinstance(seconds, bool) or not isinstance(seconds, int | float):
                raise TypeError(f"seconds {seconds!r} is not a number: give one such as 3600.")
            if not (math.isfinite(seconds) and seconds > 0):
                raise ConfigError(f"seconds {seconds!r} is not a time in the future: give one such as 3600.")
            if scope == "once":
                raise ConfigError("seconds belongs to the scopes 'guest' and 'network': give one of them.")
        self.action, self.scope, self.seconds = action, scope, seconds

    @classmethod
    def of(cls, answer: Any) -> Ruling:
        """What the owner's function returned, as a ruling.

        Args:
            answer: A `Ruling`, "allow", "deny", True or False.

        Returns:
            The ruling.

        Raises:
            ConfigError: It is none of these.
        """
        if isinstance(answer, Ruling):
            return answer
        if isinstance(answer, bool):
            return cls("allow" if answer else "deny")
        if isinstance(answer, str) and answer in _ACTIONS:
            return cls("allow" if answer == "allow" else "deny")
        raise ConfigError(f"{answer!r} is no answer: return 'allow', 'deny' or a Ruling.")

    def __repr__(self) -> str:
        seconds = "" if self.seconds is None else f", seconds={self.seconds!r}"
        return f"Ruling({self.action!r}, scope={self.scope!r}{seconds})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ruling) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return (self.action, self.scope, self.seconds)
