"""A rule of a policy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from guestnet.errors import PolicyError
from guestnet.policy.destination import (
    PROTOCOLS,
    Destination,
    Ports,
    _net,
    _short,
    nearest,
    parse_destination,
    parse_ports,
    parse_target,
)
from guestnet.policy.limit import Limit

ACTIONS = ("allow", "deny", "ask")
DIRECTIONS = ("out", "in", "guests")
MATCHES = ("conversation", "address")
QUERY_TYPES = ("ordinary", "all")
KEYS = (
    *("action", "to", "ports", "protocol", "from", "direction", "match", "query_types"),
    *("limit", "label", "expires", "log"),
)
"""The keys of a rule in a file, in the order in which they are written."""
LABEL_LONGEST = 200
_WEB: tuple[tuple[str, int, int], ...] = (("tcp", 80, 80), ("tcp", 443, 443), ("udp", 443, 443))


class Rule:
    """One rule: what becomes of the flows that it matches.

    Args:
        action: "allow", "deny" or "ask".
        to: The destination: a name (`pypi.org`, `*.debian.org`, `.ok.example`), an address or prefix, a group
            such as "private", or "any". In a rule with the direction "guests" also "guest:ID" and "tag:TAG".
            For the direction "in" it is the guest's own address, and "any" by default.
        ports: Ports: 443, "8000-8100", several of them, or "*". By default an allowed name has TCP 80 and 443
            and UDP 443, and everything else all ports.
        protocol: "tcp", "udp", "icmp" or "any".
        source: The guests that it is about: ids, or tags as "tag:ci". With the direction "in", the prefixes
            of clients. By default all. In files it is called `from`.
        direction: "out" (to the outside), "in" (published ports) or "guests" (from guest to guest).
        match: For names. "conversation": the conversation has to show the name too (TLS, HTTP, QUIC).
            "address": an address that the guest got for the name is enough. Protocols in which the server
            speaks first, such as SSH, need "address".
        query_types: For names. "ordinary": addresses, aliases and the like. "all": also TXT, NULL and ANY,
            which carry data of any kind.
        label: What denials and logs call it. By default its text.
        expires: When it ends: a time with a zone, or seconds since the epoch.
        log: Whether flows that it admits are written to the audit log at their start too.
        limit: What the flows that it admits may carry together: a `Limit`, or its text such as "10mbit". A
            rule limits bytes and packets; `Limit` has the rest for guests and networks.

    Raises:
        PolicyError: An argument is wrong.

    Example:
        >>> rule = Rule("allow", to="pypi.org", ports=(443,))
        >>> print(rule)
        allow pypi.org:443
        >>> rule == Rule("allow", "pypi.org", ports=443)
        True
    """

    __slots__ = (
        *("action", "destination", "direction", "expires", "label", "limit", "log", "match"),
        *("ports", "protocol", "query_types", "source"),
    )
    action: str
    destination: Destination
    ports: Ports | None
    protocol: str | None
    source: tuple[str, ...]
    direction: str
    match: str
    query_types: str
    label: str
    expires: float | None
    log: bool
    limit: Limit | None

    def __init__(
        self,
        action: str,
        to: str = "any",
        *,
        ports: object = None,
        protocol: str | None = None,
        source: object = (),
        direction: str | None = None,
        match: str = "conversation",
        query_types: str = "ordinary",
        label: str | None = None,
        expires: datetime | float | None = None,
        log: bool = False,
        limit: Limit | str | Mapping[str, Any] | None = None,
    ) -> None:
        destination = parse_destination(to)
        if direction is None:
            between = destination.kind == "endpoints" or destination == Destination("group", "guests")
            direction = "guests" if between else "out"
        values = {
            "action": _choice("action", action, ACTIONS),
            "destination": destination,
            "ports": parse_ports(ports),
            "protocol": None if protocol is None else _choice("protocol", protocol, PROTOCOLS),
            "direction": _choice("direction", direction, DIRECTIONS),
            "match": _choice("match", match, MATCHES),
            "query_types": _choice("query_types", query_types, QUERY_TYPES),
            "expires": _expires(expires),
            "log": _flag("log", log),
            "limit": Limit.of(limit),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "source", self._sources(source))
        self._check()
        object.__setattr__(self, "label", self._text() if label is None else _label(label))

    def _sources(self, given: object) -> tuple[str, ...]:
        several: list[object]
        if isinstance(given, str):
            several = [given]
        elif isinstance(given, Iterable) and not isinstance(given, bytes | Mapping):
            several = list(given)
        else:
            raise PolicyError(f"from {_short(given)} is not a list: write one such as ['vm1', 'tag:ci'].")
        return tuple(self._one_source(one) for one in several)

    def _one_source(self, one: object) -> str:
        if self.direction == "in":
            net = _net(one) if isinstance(one, str) else None
            if net is None:
                raise PolicyError(
                    f"from {_short(one)} is no address or prefix of clients: write one such as 192.0.2.0/24."
                )
            return net
        if not isinstance(one, str) or not one.removeprefix("tag:") or not one.isprintable():
            raise PolicyError(f"from {_short(one)} is no guest: write an id such as vm1, or a tag as tag:ci.")
        return one

    def _check(self) -> None:
        kind = self.destination.kind
        if self.direction == "in" and kind not in ("any", "net"):
            raise PolicyError(
                f"A rule with the direction 'in' is about the guest's own ports, not about {self.destination}"
                ": leave `to` out, and name clients with `from`."
            )
        if self.direction == "guests" and self.destination.is_name:
            raise PolicyError(
                f"A rule with the direction 'guests' names guests, not {self.destination}: write guest:ID, "
                "tag:TAG or a prefix."
            )
        if self.direction == "out" and kind == "endpoints":
            raise PolicyError(f"{self.destination} is a guest: write direction = 'guests'.")
        if self.protocol == "icmp" and self.ports:
            raise PolicyError("ports are given with the protocol 'icmp', which has none: leave them out.")
        if self.match == "address" and not self.destination.is_name:
            raise PolicyError(
                f"match = 'address' is for names, and {self.destination} is none: leave it out."
            )
        if self.query_types == "all" and not self.destination.is_name:
            raise PolicyError(f"query_types is for names, and {self.destination} is none: leave it out.")
        if self.limit is not None:
            self._check_limit(self.limit)
        if self.action == "ask" and self.direction != "out":
            raise PolicyError("action 'ask' is for flows to the outside: allow or deny the others.")

    def _check_limit(self, limit: Limit) -> None:
        if self.action == "deny" or self.direction == "guests":
            raise PolicyError(
                "limit is for rules that allow flows to or from the outside: leave it out of this one."
            )
        if (limit.new_flows, limit.open_flows, limit.queries) != (None, None, None):
            raise PolicyError(
                f"The limit {limit} counts flows or queries, which a rule does not: give that to the network "
                "or to guests."
            )

    @classmethod
    def from_text(cls, action: str, text: str) -> Rule:
        """Makes a rule of what `--allow` and `--deny` take.

        Args:
            action: "allow", "deny" or "ask".
            text: DESTINATION[:PORTS][/PROTOCOL].

        Returns:
            The rule.

        Raises:
            PolicyError: The text cannot be read.

        Example:
            >>> Rule.from_text("allow", "10.1.0.0/16:5432/tcp")
            Rule('allow', '10.1.0.0/16', ports=(5432,), protocol='tcp')
        """
        destination, ports, protocol = parse_target(text)
        if ports == ():
            return cls(action, str(destination), ports="*", protocol=protocol)
        return cls(action, str(destination), ports=ports, protocol=protocol)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rule:
        """Makes a rule of the keys that a file has.

        Args:
            values: The keys and their values.

        Returns:
            The rule.

        Raises:
            PolicyError: A key or a value is wrong.
        """
        if not isinstance(values, Mapping):
            raise PolicyError(f"A rule {_short(values)} is no table: write one with `action` and `to`.")
        for key in values:
            if key not in KEYS:
                known = ", ".join(KEYS)
                raise PolicyError(
                    f"A rule has no key {_short(key)}: its keys are {known}.{nearest(str(key), KEYS)}"
                )
        if "action" not in values:
            raise PolicyError("A rule has no action: write action = 'allow', 'deny' or 'ask'.")
        given = {("source" if key == "from" else key): value for key, value in values.items()}
        given.setdefault("to", "any")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The keys of the rule, as files have them.

        Returns:
            Keys and values that `from_dict` takes; what is the default is left out.
        """
        found: dict[str, Any] = {"action": self.action, "to": str(self.destination)}
        if self.ports is not None:
            found["ports"] = [_port(*range) for range in self.ports] or "*"
        between = self.destination.kind == "endpoints" or self.destination == Destination("group", "guests")
        defaults: dict[str, Any] = {
            "protocol": None,
            "direction": "guests" if between else "out",
            "match": "conversation",
        }
        defaults |= {"query_types": "ordinary", "log": False}
        found |= {
            name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value
        }
        if self.source:
            found["from"] = list(self.source)
        if self.label != self._text():
            found["label"] = self.label
        if self.limit is not None:
            found["limit"] = self.limit.to_data()
        if self.expires is not None:
            found["expires"] = datetime.fromtimestamp(self.expires, UTC).isoformat()
        return {key: found[key] for key in KEYS if key in found}

    @property
    def to(self) -> str:
        """The destination as text."""
        return str(self.destination)

    def ranges(self) -> list[tuple[str, int, int]]:
        """Protocols with their first and last port, defaults included.

        Returns:
            The ranges; none for every protocol and port.
        """
        protocols = ["tcp", "udp"] if self.protocol is None else [self.protocol]
        if self.ports is None:
            if self.action != "deny" and self.destination.is_name:
                web = [one for one in _WEB if self.protocol in (None, "any", one[0])]
                return web or [(self.protocol or "any", 0, 65535)]
            return [] if self.protocol in (None, "any") else [(protocols[0], 0, 65535)]
        if not self.ports:
            return [] if self.protocol in (None, "any") else [(protocols[0], 0, 65535)]
        return [(protocol, *ports) for protocol in protocols for ports in self.ports]

    def _text(self) -> str:
        ports = ""
        if self.ports is not None:
            ports = ":" + (",".join(str(_port(*one)) for one in self.ports) or "*")
        place = self.to
        if ports and self.destination.kind == "net" and ":" in place:
            place = f"[{place.partition('/')[0]}]/{place.partition('/')[2]}"
        text = f"{self.action} {place}{ports}"
        if self.protocol is not None:
            text += f"/{self.protocol}"
        if self.source:
            text += f" from {', '.join(self.source)}"
        return text if self.direction == "out" else f"{text} ({self.direction})"

    def __str__(self) -> str:
        return self._text()

    def __repr__(self) -> str:
        values = self.to_dict()
        words = [repr(values.pop("action")), repr(values.pop("to"))]
        if "from" in values:
            values["source"] = tuple(values.pop("from"))
        if isinstance(values.get("ports"), list):
            values["ports"] = tuple(values["ports"])
        if self.expires is not None:
            values["expires"] = self.expires
        return f"Rule({', '.join([*words, *(f'{name}={value!r}' for name, value in values.items())])})"

    def _key(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"A rule does not change: make another one instead of setting {name!r}.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"A rule does not change: {name!r} cannot be deleted.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Rule.from_dict, (self.to_dict(),)


def _port(first: int, last: int) -> int | str:
    return first if first == last else f"{first}-{last}"


def _choice(what: str, value: object, known: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in known:
        return value
    names = ", ".join(repr(one) for one in known)
    raise PolicyError(
        f"{what} {_short(value)} is none of {names}: choose one of them.{nearest(str(value), known)}"
    )


def _flag(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise PolicyError(f"{what} {_short(value)} is neither true nor false: write one of them.")
    return value


def _label(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= LABEL_LONGEST:
        raise PolicyError(
            f"label {_short(value)} is no text of 1 to {LABEL_LONGEST} printable characters: write one."
        )
    return value


def _expires(value: object) -> float | None:
    if value is None:
        return None
    example = "write one such as 2030-01-31T12:00:00Z"
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            if value.tzinfo is None:
                raise PolicyError(f"expires {value.isoformat()} has no time zone: {example}.")
            return value.timestamp()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            datetime.fromtimestamp(value, UTC)
            return float(value)
    except (ValueError, OverflowError, OSError):
        pass
    raise PolicyError(f"expires {_short(value)} is not a time: {example}.")
