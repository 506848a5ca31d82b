"""A policy: an ordered list of rules, a default, and what holds for all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

from guestnet.errors import PolicyError
from guestnet.model.frozen_record import FrozenRecord
from guestnet.policy.destination import NAME_GROUPS, _short, nearest, parse_target
from guestnet.policy.rule import ACTIONS, Rule, _choice, _flag

if TYPE_CHECKING:
    from guestnet._native import PolicyTable

RULES_MOST = 1 << 20
OPTIONS: dict[str, Any] = {
    "refuse": "reset",
    "ech": "outer",
    "dns_refusal": "nxdomain",
    "pin_min": 30,
    "names_per_suffix": 100,
    "name_bytes_per_suffix": 4096,
    "ask_seconds": 30,
    "explain": False,
    "audit": "best_effort",
}
"""What holds for all rules, with its defaults."""
_CHOICES = {
    "refuse": ("reset", "prohibited"),
    "ech": ("outer", "deny"),
    "dns_refusal": ("nxdomain", "refused"),
    "audit": ("best_effort", "required"),
}
_NUMBERS = {
    "pin_min": (1, 86400),
    "names_per_suffix": (1, 1 << 20),
    "name_bytes_per_suffix": (64, 1 << 24),
    "ask_seconds": (1, 3600),
}
_KEYS = ("default", "rule", *OPTIONS)
_SOME_ADDRESS = "192.0.2.1"
"""Stands for the address of a name that is checked."""


class _RuleError(PolicyError):
    """A rule is wrong; `number` counts from 1."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Decision(FrozenRecord):
    """What a policy says of a flow, and why.

    Example:
        >>> print(Policy(default="deny").check("pypi.org"))
        deny pypi.org:443/tcp: default (the name may not be asked for)
    """

    verdict: str
    """"allow", "deny" or "ask"."""
    subject: str
    """The flow as text."""
    rule: str
    """The label of the rule that decides; "default" when none does."""
    number: int | None = None
    """The place of the rule in the policy, from 1; None for the default."""
    reason: str

    @property
    def allowed(self) -> bool:
        """Whether the flow may be opened without asking."""
        return self.verdict == "allow"

    def __str__(self) -> str:
        place = "" if self.number is None else f"rule {self.number}, "
        return f"{self.verdict} {self.subject}: {place}{self.rule} ({self.reason})"


class Policy:
    """What guests may reach. The first rule that matches a flow decides, else the default.

    A policy does not change, can be hashed, and is written to and read from TOML and JSON.

    Args:
        default: "allow", "deny" or "ask": what becomes of flows to the outside that no rule matches.
        rules: The rules.
        refuse: How TCP is refused: "reset", or "prohibited" (ICMP, administratively prohibited).
        ech: What becomes of TLS with Encrypted ClientHello: "outer" judges it by its outer name, "deny"
            refuses it. Browsers always send something that looks like it.
        dns_refusal: The answer to queries for names that are not allowed: "nxdomain" or "refused".
        pin_min: The shortest time in seconds for which an answer allows its addresses, 1 to 86400.
        names_per_suffix: Distinct names below an allowed suffix that one guest may ask for in five minutes.
        name_bytes_per_suffix: The bytes of these names.
        ask_seconds: How long a flow waits for an answer when a rule asks, 1 to 3600.
        explain: Guests read their rules and denials at http://policy.guestnet.internal/.
        audit: "best_effort" goes on when the audit log cannot be written; "required" denies everything.

    Raises:
        PolicyError: Something is wrong.

    Example:
        >>> policy = Policy(default="deny", rules=[Rule("allow", to="pypi.org", ports=(443,))])
        >>> policy.check("pypi.org:443").verdict, policy.check("example.org").verdict
        ('allow', 'deny')
        >>> Policy.from_toml(policy.to_toml()) == policy
        True
        >>> print(policy)
        1  allow pypi.org:443
        -  deny everything else
    """

    __slots__ = ("default", "rules", *OPTIONS)
    default: str
    rules: tuple[Rule, ...]
    refuse: str
    ech: str
    dns_refusal: str
    pin_min: int
    names_per_suffix: int
    name_bytes_per_suffix: int
    ask_seconds: int
    explain: bool
    audit: str

    def __init__(self, default: str = "deny", rules: Iterable[Rule] = (), **options: Any) -> None:
        set_value = object.__setattr__
        set_value(self, "default", _choice("default", default, ACTIONS))
        if isinstance(rules, str | bytes | Mapping) or not isinstance(rules, Iterable):
            raise PolicyError(
                f"rules {_short(rules)} is not a list of rules: write [Rule('allow', 'pypi.org')]."
            )
        several = tuple(rules)
        for one in several:
            if not isinstance(one, Rule):
                raise PolicyError(
                    f"{_short(one)} is not a Rule: write one such as Rule('allow', 'pypi.org')."
                )
        if len(several) > RULES_MOST:
            raise PolicyError(
                f"A policy has at most {RULES_MOST} rules, not {len(several)}: merge some of them."
            )
        set_value(self, "rules", several)
        for name in options:
            if name not in OPTIONS:
                known = ", ".join(OPTIONS)
                raise PolicyError(
                    f"A policy has no option {_short(name)}: its options are {known}.{nearest(name, OPTIONS)}"
                )
        for name, usual in OPTIONS.items():
            set_value(self, name, _option(name, options.get(name, usual)))

    # --- files ---

    @classmethod
    def from_toml(cls, text: str, *, file: str | None = None) -> Policy:
        """Reads a policy from TOML.

        Args:
            text: The content of the file: `default = "deny"`, options, and tables `[[rule]]`.
            file: What errors call the file.

        Returns:
            The policy.

        Raises:
            PolicyError: It cannot be read. The message names the line and the rule.

        Example:
            >>> print(Policy.from_toml('default = "deny"\\n[[rule]]\\naction = "allow"\\nto = "public"'))
            1  allow public
            -  deny everything else
        """
        from guestnet.policy.files import located, parse_toml

        name = "the policy" if file is None else file
        values = parse_toml(text, name)
        try:
            return cls.from_dict(values)
        except _RuleError as error:
            raise located(text, name, error.number, error) from None
        except PolicyError as error:
            raise located(text, name, None, error) from None

    @classmethod
    def from_json(cls, text: str, *, file: str | None = None) -> Policy:
        """Reads a policy from JSON: the keys of the TOML, with the rules in a list called `rule`.

        Args:
            text: The content of the file.
            file: What errors call the file.

        Returns:
            The policy.

        Raises:
            PolicyError: It cannot be read.
        """
        from guestnet.policy.files import parse_json

        name = "the policy" if file is None else file
        values = parse_json(text, name)
        try:
            return cls.from_dict(values)
        except PolicyError as error:
            raise PolicyError(f"{name}: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Reads a file; one that ends with `.json` is JSON, all others are TOML.

        Args:
            path: The file.

        Returns:
            The policy.

        Raises:
            PolicyError: It cannot be read.
        """
        from guestnet.policy.files import read_file

        name, text = read_file(path)
        read = cls.from_json if name.endswith(".json") else cls.from_toml
        return read(text, file=name)

    def to_toml(self) -> str:
        """Writes the policy as TOML.

        Returns:
            What `from_toml` reads.
        """
        from guestnet.policy.files import dump_toml

        return dump_toml(self.to_dict())

    def to_json(self) -> str:
        """Writes the policy as JSON.

        Returns:
            What `from_json` reads.
        """
        import json

        return json.dumps(self.to_dict(), indent=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file at once, in place of an earlier one.

        Args:
            path: The file; one that ends with `.json` is JSON, all others are TOML.

        Raises:
            PolicyError: It cannot be written.
        """
        from guestnet.policy.files import write_file

        write_file(path, self.to_toml, self.to_json)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Policy:
        """Makes a policy of the keys that files have.

        Args:
            values: The keys: `default`, options, and `rule`, a list of mappings.

        Returns:
            The policy.

        Raises:
            PolicyError: A key or a value is wrong. The message names the rule.
        """
        if not isinstance(values, Mapping):
            raise PolicyError(
                f"A policy {_short(values)} is no table: write default = 'deny' and tables [[rule]]."
            )
        for key in values:
            if key not in _KEYS:
                known = ", ".join(_KEYS)
                raise PolicyError(
                    f"A policy has no key {_short(key)}: its keys are {known}.{nearest(str(key), _KEYS)}"
                )
        given = values.get("rule", [])
        if not isinstance(given, list | tuple):
            raise PolicyError("rule is no list of tables: write [[rule]] above each rule.")
        if len(given) > RULES_MOST:
            raise PolicyError(
                f"A policy has at most {RULES_MOST} rules, not {len(given)}: merge some of them."
            )
        rules = []
        for number, one in enumerate(given, 1):
            try:
                rules.append(Rule.from_dict(one))
            except PolicyError as error:
                raise _RuleError(f"Rule {number}: {error}", number) from None
        options = {name: value for name, value in values.items() if name != "rule"}
        return cls(rules=rules, **options)

    def to_dict(self) -> dict[str, Any]:
        """The policy as the keys that files have.

        Returns:
            What `from_dict` takes; options that are the default are left out.
        """
        found: dict[str, Any] = {"default": self.default}
        found |= {
            name: getattr(self, name) for name, usual in OPTIONS.items() if getattr(self, name) != usual
        }
        if self.rules:
            found["rule"] = [rule.to_dict() for rule in self.rules]
        return found

    @classmethod
    def preset(cls, name: str) -> Policy:
        """Makes a policy that has a name.

        Args:
            name: "open" (everything but the floor), "public" (no private addresses), "dev" (package
                registries and code hosts) or "none" (nothing).

        Returns:
            The policy.

        Raises:
            PolicyError: There is no such policy.

        Example:
            >>> Policy.preset("dev").check("pypi.org").verdict
            'allow'
        """
        from guestnet.policy.presets import preset

        default, rules = preset(name)
        return cls(default, rules)

    # --- questions ---

    def check(
        self,
        destination: str,
        *,
        guest: str | None = None,
        tags: Iterable[str] = (),
        host_addresses: Iterable[str | IPv4Address | IPv6Address] = (),
    ) -> Decision:
        """Says what becomes of a flow to a destination, and why.

        A name is checked as a guest uses it: it asks for the name, opens a flow to the address that it gets,
        and shows the name.

        Args:
            destination: A name or an address, with a port (443 by default) and a protocol ("tcp" by default):
                `pypi.org`, `10.1.2.3:5432/tcp`, `[2001:db8::1]:53/udp`.
            guest: The endpoint that opens it; by default one that no rule names.
            tags: Tags of the endpoint.
            host_addresses: The addresses of the host, for rules about the group "host".

        Returns:
            The decision.

        Raises:
            PolicyError: The destination cannot be read.

        Example:
            >>> policy = Policy(default="allow", rules=[Rule("deny", to="private")])
            >>> print(policy.check("10.1.2.3:22"))
            deny 10.1.2.3:22/tcp: rule 1, deny private (the address matches)
        """
        target = parse_target(destination)
        to = target.destination
        address = None if to.kind != "net" else to.value.partition("/")
        if to.kind not in ("name", "net") or (address and address[2] not in ("32", "128")):
            raise PolicyError(f"{_short(destination)} is not one destination: write a name or an address.")
        protocol = target.protocol or "tcp"
        if protocol == "any":
            raise PolicyError("The protocol 'any' is not one: write tcp, udp or icmp.")
        port = 0 if protocol == "icmp" else target.ports[0][0] if target.ports else 443
        place = to.value if to.kind == "name" else address[0] if address else ""
        shown = f"[{place}]" if ":" in place else place
        subject = f"{shown}:{port}/{protocol}" if port else f"{shown}/{protocol}"
        numbers = _Numbers(guest, tags)
        table = self.compile(numbers)
        if to.kind == "name":
            verdict, number, label = table.judge_name(to.value, endpoint=1)
            if verdict == "deny":
                return _decision("deny", subject, number, label, "the name may not be asked for")
        verdict, number, label = table.judge(
            "out",
            protocol,
            None,
            (ip_address(_SOME_ADDRESS if to.kind == "name" else place), port),
            endpoint=1,
            pins=[to.value] if to.kind == "name" else [],
            shown=to.value if to.kind == "name" else None,
            host_addresses=[ip_address(str(one)) for one in host_addresses],
        )
        reason = "no rule matches" if number is None else "the address matches"
        if number is not None and self.rules[number].destination.is_name:
            by = self.rules[number].match
            reason = "the name matches" if by == "conversation" else "the name's address matches"
        if verdict == "inspect":
            verdict, reason = "allow", "unless it shows a name that a rule above denies"
        return _decision(verdict, subject, number, label, reason)

    def warnings(self) -> list[str]:
        """What is probably not meant: rules that can never match, and the like.

        Returns:
            A sentence for each; none when there is nothing to say.

        Example:
            >>> Policy(rules=[Rule("allow", "any"), Rule("deny", "10.0.0.0/8")]).warnings()
            ['Rule 2 (deny 10.0.0.0/8) can never match: rule 1 (allow any) decides before it.']
        """
        from guestnet.policy.advice import warnings

        return warnings(self.rules)

    # --- other policies ---

    def replace(self, **changes: Any) -> Policy:
        """Makes a policy that differs from this one.

        Args:
            **changes: `default`, `rules` and options.

        Returns:
            The other policy.

        Raises:
            PolicyError: Something is wrong.
        """
        values = {name: getattr(self, name) for name in ("default", "rules", *OPTIONS)}
        return Policy(**{**values, **changes})

    def with_rules_first(self, rules: Sequence[Rule]) -> Policy:
        """Makes a policy with more rules in front.

        Args:
            rules: The rules that decide first.

        Returns:
            The other policy.
        """
        return self.replace(rules=(*rules, *self.rules))

    def without_expired(self, now: float | None = None) -> Policy:
        """Makes the policy without the rules that have ended.

        Args:
            now: Seconds since the epoch; by default the time now.

        Returns:
            This policy when none has ended.
        """
        at = time.time() if now is None else now
        rules = tuple(rule for rule in self.rules if rule.expires is None or rule.expires > at)
        return self if len(rules) == len(self.rules) else self.replace(rules=rules)

    @property
    def asks(self) -> bool:
        """Whether flows may have to wait for an answer: the default or a rule is "ask"."""
        return "ask" in (self.default, *(rule.action for rule in self.rules))

    @property
    def next_expiry(self) -> float | None:
        """When the next rule ends, in seconds since the epoch; None when none does."""
        return min((rule.expires for rule in self.rules if rule.expires is not None), default=None)

    @property
    def logged(self) -> frozenset[str]:
        """The labels of rules whose flows are logged at their start."""
        return frozenset(rule.label for rule in self.rules if rule.log)

    @property
    def sources(self) -> frozenset[str]:
        """The endpoints and tags that rules name."""
        named = {one for rule in self.rules if rule.direction != "in" for one in rule.source}
        to = (rule.destination for rule in self.rules)
        return frozenset(named | {one.value.removeprefix("guest:") for one in to if one.kind == "endpoints"})

    # --- the data plane ---

    def compile(self, ports_of: Callable[[str], Sequence[int]], *, note_names: bool = False) -> PolicyTable:
        """Compiles the policy for the data plane.

        Args:
            ports_of: The numbers of the ports that an endpoint's id, or `tag:TAG`, stands for.
            note_names: Also note which names guests ask for where no rule is about names. A policy that asks
                notes them always, since its questions name them.

        Returns:
            The table.
        """
        from guestnet._native import PolicyTable

        options = {
            "refuse": self.refuse,
            "ech": self.ech,
            "dns_refusal": self.dns_refusal,
            "pin_min_s": self.pin_min,
            "names_per_suffix": self.names_per_suffix,
            "name_bytes_per_suffix": self.name_bytes_per_suffix,
            "ask_s": self.ask_seconds,
            "note_names": note_names or self.asks,
        }
        return PolicyTable([_tuple(rule, ports_of) for rule in self.rules], self.default, options)

    # --- values ---

    def __str__(self) -> str:
        width = len(str(len(self.rules)))
        lines = [f"{number:<{width}}  {rule}" for number, rule in enumerate(self.rules, 1)]
        return "\n".join([*lines, f"{'-':<{width}}  {self.default} everything else"])

    def __repr__(self) -> str:
        changed = {n: getattr(self, n) for n, usual in OPTIONS.items() if getattr(self, n) != usual}
        rules = list(self.rules) if len(self.rules) <= 20 else f"<{len(self.rules)} rules>"
        words = [f"default={self.default!r}", f"rules={rules}", *(f"{n}={v!r}" for n, v in changed.items())]
        return f"Policy({', '.join(words)})"

    def _key(self) -> tuple[object, ...]:
        return (self.default, self.rules, *(getattr(self, name) for name in OPTIONS))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Policy) and self._key() == other._key())

    def __hash__(self) -> int:
        return hash(self._key())

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"A policy does not change: use replace({name}=...) to make another one.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"A policy does not change: {name!r} cannot be deleted.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Policy.from_dict, (self.to_dict(),)


def _option(name: str, value: object) -> Any:
    if name in _CHOICES:
        return _choice(name, value, _CHOICES[name])
    if name in _NUMBERS:
        low, high = _NUMBERS[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise PolicyError(f"{name} {_short(value)} is no whole number from {low} to {high}: write one.")
        return value
    return _flag(name, value)


def _tuple(rule: Rule, ports_of: Callable[[str], Sequence[int]]) -> Any:
    to, inbound = rule.destination, rule.direction == "in"
    destination: tuple[Any, ...] = (to.kind, to.value) if to.value else (to.kind,)
    if to.kind == "names":
        destination = ("any_of", " ".join(NAME_GROUPS[to.value]))
    elif to.kind == "endpoints":
        destination = ("endpoints", list(ports_of(to.value.removeprefix("guest:"))))
    endpoints = None
    if rule.source and not inbound:
        endpoints = sorted({port for one in rule.source for port in ports_of(one)})
    clients = list(rule.source) if inbound else []
    return (
        *(rule.label, rule.action, rule.direction, endpoints, clients, destination, rule.ranges()),
        *(rule.match, rule.log, rule.query_types),
        None if rule.limit is None else rule.limit.for_data_plane(),
    )


class _Numbers:
    """Port numbers for a check: the guest that is asked about has number 1, all others 2."""

    def __init__(self, guest: str | None, tags: Iterable[str]) -> None:
        self._mine = {f"tag:{tag}" for tag in tags} | ({guest} if guest is not None else set())

    def __call__(self, source: str) -> list[int]:
        return [1] if source in self._mine else [2]


def _decision(verdict: str, subject: str, number: int | None, label: str, reason: str) -> Decision:
    place = None if number is None else number + 1
    return Decision(verdict=verdict, subject=subject, rule=label, number=place, reason=reason)
