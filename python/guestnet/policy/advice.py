"""What is probably not meant in a policy.

Theory of operation: a rule can never match when an earlier rule matches at least the same flows. An earlier
rule that could cover another one has the same destination, a wider prefix, a suffix of its name, or "any"; so
only these are looked at, and at most some of each.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterator, Sequence

from guestnet.policy.destination import Destination
from guestnet.policy.rule import Rule

_LOOKS = 8
"""Earlier rules with the same destination that are compared."""
_WARNINGS_MOST = 1000
_SERVER_FIRST = {21: "FTP", 22: "SSH", 25: "SMTP", 110: "POP3", 143: "IMAP", 587: "SMTP", 3306: "MySQL"}
_STARTS_PLAIN = {5432: "PostgreSQL", 6379: "Redis", 1433: "SQL Server", 27017: "MongoDB"}


def warnings(rules: Sequence[Rule]) -> list[str]:
    """A sentence for each thing that is probably not meant."""
    found: list[str] = []
    earlier: defaultdict[tuple[str, Destination], list[int]] = defaultdict(list)
    for number, rule in enumerate(rules):
        if len(found) >= _WARNINGS_MOST:
            found.append("There are more warnings than these.")
            break
        for at in _candidates(rule, earlier):
            if _covers(rules[at], rule):
                found.append(
                    f"Rule {number + 1} ({rule}) can never match: rule {at + 1} ({rules[at]}) decides "
                    "before it."
                )
                break
        found += _about_names(number, rule)
        same = earlier[rule.direction, rule.destination]
        if len(same) < _LOOKS:
            same.append(number)
    return found


def _candidates(rule: Rule, earlier: dict[tuple[str, Destination], list[int]]) -> Iterator[int]:
    for destination in _wider(rule.destination):
        yield from earlier.get((rule.direction, destination), ())


def _wider(destination: Destination) -> Iterator[Destination]:
    """The destination, and those that contain it."""
    yield destination
    yield Destination("any")
    if destination.kind == "net":
        net = ipaddress.ip_network(destination.value)
        while net.prefixlen:
            net = net.supernet()
            yield Destination("net", str(net))
    elif destination.is_name and destination.kind != "names":
        if destination.kind in ("name", "below"):
            yield Destination("at_or_below", destination.value)
        labels = destination.value.split(".")
        for at in range(1, len(labels)):
            suffix = ".".join(labels[at:])
            yield Destination("below", suffix)
            yield Destination("at_or_below", suffix)


def _covers(a: Rule, b: Rule) -> bool:
    """Whether `a`, whose destination contains that of `b`, matches every flow that `b` matches."""
    if a.expires is not None and (b.expires is None or b.expires > a.expires):
        return False
    if a.source and not (b.source and set(b.source) <= set(a.source)):
        return False
    if a.destination.is_name and a.match == "conversation" and a.action != "deny" and b.match == "address":
        return False
    if a.destination.is_name and a.action == "deny" and b.destination.is_name and b.match == "address":
        return False
    outer, inner = a.ranges(), b.ranges()
    if not outer:
        return True
    return bool(inner) and all(any(_within(one, wide) for wide in outer) for one in inner)


def _within(one: tuple[str, int, int], wide: tuple[str, int, int]) -> bool:
    return wide[0] in ("any", one[0]) and wide[1] <= one[1] and one[2] <= wide[2]


def _about_names(number: int, rule: Rule) -> Iterator[str]:
    if not rule.destination.is_name or rule.action == "deny":
        return
    if rule.match == "address":
        yield (
            f"Rule {number + 1} ({rule}) matches by address: whoever shares an address with {rule.to} is "
            "reached too."
        )
        return
    ports = [port for first, last in rule.ports or () if first == last for port in (first,)]
    for port in ports:
        if port in _SERVER_FIRST:
            why = f"in {_SERVER_FIRST[port]} the server speaks first and no name is shown"
        elif port in _STARTS_PLAIN:
            why = f"{_STARTS_PLAIN[port]} shows no name at first"
        else:
            continue
        yield f"Rule {number + 1} ({rule}) can allow nothing at port {port}: {why}. Write match = 'address'."
