"""The options that say what guests may reach, and the policy that they make.

Policies are imported only where one of the options is given.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from guestnet.cli import UsageError
from guestnet.errors import ConfigError, PolicyError

if TYPE_CHECKING:
    from guestnet.policy.policy import Policy
    from guestnet.policy.rule import Rule

PRESETS = ("open", "public", "dev", "none")
_PERSON_SECONDS = 120
"""How long a flow waits for a person. A Linux guest repeats a SYN for over two minutes."""


class _RuleAction(argparse.Action):
    """Adds a rule, so that rules keep the order of the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        from guestnet.policy.rule import Rule

        name = (option or "").removeprefix("--")
        try:
            rule = Rule.from_text(name, values)
        except PolicyError as error:
            raise UsageError(f"{option} {values!r}: {error}") from None
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), rule])


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """The options of a policy."""
    add_rule_options(parser)
    parser.add_argument(
        "--policy", metavar="FILE", help="a policy file (TOML or JSON), read again when it changes"
    )
    parser.add_argument(
        "--isolate", action="store_true", help="guests open no flows to each other (default: they do)"
    )
    parser.add_argument(
        "--limit",
        metavar="LIMIT",
        help="what all guests together may carry: DOWN/UP such as 10mbit/2mbit, or one rate for both ways, "
        "and flows=N, new-flows=N, queries=N, packets=N (a second), total=BYTES",
    )
    parser.add_argument("--guest-limit", metavar="LIMIT", help="the same for each guest")
    parser.add_argument(
        "--ask",
        action="store_true",
        help="ask at the terminal about what no rule decides; answers can be saved to the file of --policy",
    )
    parser.add_argument(
        "--audit",
        metavar="FILE",
        help="append a JSON line for each flow that ends or is refused, and each refused name",
    )
    parser.add_argument(
        "--learn",
        metavar="FILE",
        help="let everything pass, and write the policy that would have allowed it to FILE at the end",
    )


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """The options that make rules."""
    what = "DESTINATION[:PORT[-END]][/tcp|/udp|/icmp]: a name, *.NAME, an address, a prefix or a group"
    parser.add_argument(
        "--allow",
        dest="rules",
        action=_RuleAction,
        default=[],
        metavar="DEST",
        help=f"let guests reach {what}. The rest is denied (repeatable)",
    )
    parser.add_argument(
        "--deny",
        dest="rules",
        action=_RuleAction,
        default=[],
        metavar="DEST",
        help="keep guests from it. The first of all rules that matches decides (repeatable)",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="rules behind the others: open, public (nothing private), dev (package registries and code "
        "hosts) or none",
    )


def policy_of(options: argparse.Namespace, file: str | None = None) -> Policy | None:
    """The policy that the options describe; None without any of them. Reads the file.

    Raises:
        UsageError: They contradict each other.
        PolicyError: The file cannot be read, or is wrong.
    """
    rules: Sequence[Rule] = options.rules
    path = getattr(options, "policy", None) if file is None else file
    learn = getattr(options, "learn", None)
    if learn is not None and (rules or path is not None or options.preset is not None):
        raise UsageError(
            "--learn lets everything pass, so rules would not be followed: leave --allow, --deny, --policy "
            "and --preset out."
        )
    asks = getattr(options, "ask", False)
    if asks and learn is not None:
        raise UsageError("--learn lets everything pass, so there is nothing to ask: leave --ask out.")
    if not rules and path is None and options.preset is None and not asks:
        return None
    from guestnet.policy.policy import Policy

    if path is not None and options.preset is not None:
        raise UsageError("--policy and --preset both say what holds for the rest: leave one out.")
    if path is not None and asks and not os.path.exists(path):
        base = Policy("ask", ask_seconds=_PERSON_SECONDS)  # the file is made when an answer is saved
    elif path is not None:
        base = Policy.load(path)
    elif options.preset is not None:
        base = Policy.preset(options.preset)
    else:
        # With an allowed destination, the rest is denied.
        base = Policy("deny" if any(rule.action == "allow" for rule in rules) else "allow")
        if asks:
            base = Policy("ask", ask_seconds=_PERSON_SECONDS)
    if asks and base.default == "deny":
        base = base.replace(default="ask")
    return base.with_rules_first(rules) if rules else base


def checked_policy_of(options: argparse.Namespace) -> Policy | None:
    """As `policy_of`, with errors of the kind that the command line has."""
    try:
        return policy_of(options)
    except ConfigError as error:
        raise UsageError(str(error)) from None
