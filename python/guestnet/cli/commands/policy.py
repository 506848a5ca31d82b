"""`guestnet policy`: asks a policy what it says, and shows its rules."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from guestnet.cli import EXIT_OK, EXIT_PROBLEM, UsageError, arguments
from guestnet.cli.policy_options import add_rule_options, policy_of
from guestnet.cli.terminal import answer, complain
from guestnet.errors import ConfigError

if TYPE_CHECKING:
    import argparse

    from guestnet.policy.policy import Policy

_ABOUT = """\
`check` says which rule decides about a flow, and why. It exits with 0 when the flow is allowed and with 1
when it is not. `show` prints the rules in their order, and what is probably not meant."""
_EXAMPLE = """\
  guestnet policy check net.toml pypi.org
  guestnet policy check net.toml 10.1.2.3:5432/tcp --guest vm1
  guestnet policy show --preset dev --deny github.com"""
_ACTIONS = ("check", "show")
_OF_RULE = re.compile(r"Rule (\d+) ")


def parser() -> arguments.Parser:
    """The options of `guestnet policy`."""
    made = arguments.Parser("policy", "check|show [FILE] [DEST...] [OPTIONS]", _ABOUT, _EXAMPLE)
    made.add_argument("words", nargs="*", help="check [FILE] DEST..., or show [FILE]")
    add_rule_options(made)
    made.add_argument("--guest", metavar="ID", help="check: the guest that opens the flow")
    made.add_argument(
        "--tag", action="append", default=[], metavar="TAG", help="check: a tag of the guest (repeatable)"
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command line after `guestnet policy`; returns the exit status."""
    options = parser().parse_intermixed_args(argv)
    words = list(options.words)
    if not words or words[0] not in _ACTIONS:
        from guestnet.policy.destination import nearest

        given = f"{words[0]!r} is not one" if words else "Nothing was given"
        hint = nearest(words[0], _ACTIONS) if words else ""
        raise UsageError(
            f"{given}: write `guestnet policy check FILE DEST` or `guestnet policy show FILE`.{hint}"
        )
    action, words = words[0], words[1:]
    by_options = bool(options.rules) or options.preset is not None
    if action == "show":
        options.file = words[:1]
        return _show(_policy(options, words, by_options, at_most=1), options)
    options.file = file = words[:1] if not by_options else []
    destinations = words[len(file) :]
    if not destinations:
        raise UsageError("Say what to check: `guestnet policy check FILE DEST`, such as pypi.org:443.")
    return _check(_policy(options, file, by_options, at_most=1), destinations, options)


def _policy(options: argparse.Namespace, file: list[str], by_options: bool, *, at_most: int) -> Policy:
    if len(file) > at_most:
        raise UsageError(f"{file[at_most]!r} is one file too many: give one policy.")
    if not file and not by_options:
        raise UsageError("Say which policy: give a file, --preset NAME, or --allow and --deny.")
    try:
        found = policy_of(options, file[0] if file else None)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    assert found is not None
    return found


def _check(policy: Policy, destinations: list[str], options: argparse.Namespace) -> int:
    try:
        decisions = [policy.check(to, guest=options.guest, tags=options.tag) for to in destinations]
    except ConfigError as error:
        raise UsageError(str(error)) from None
    warnings = _warnings(policy, options)
    if options.json:
        found = [{**vars(decision), "allowed": decision.allowed} for decision in decisions]
        answer(json.dumps({"decisions": found, "warnings": warnings}, indent=2) + "\n")
    else:
        for decision in decisions:
            answer(f"{decision}\n")
        for warning in warnings:
            complain(f"Note: {warning}")
    return EXIT_OK if all(decision.allowed for decision in decisions) else EXIT_PROBLEM


def _warnings(policy: Policy, options: argparse.Namespace) -> list[str]:
    """The warnings, with the place in the file that each is about."""
    found = policy.warnings()
    if not options.file or options.rules or options.file[0].endswith(".json"):
        return found
    from guestnet.policy.files import line_of_rule, read_file

    name, text = read_file(options.file[0])
    number = [int(at[1]) if (at := _OF_RULE.match(one)) else None for one in found]
    return [
        one if at is None else f"{name}{line_of_rule(text, at)}: {one}"
        for one, at in zip(found, number, strict=True)
    ]


def _show(policy: Policy, options: argparse.Namespace) -> int:
    warnings = _warnings(policy, options)
    if options.json:
        rules = [{"number": n, "label": r.label, **r.to_dict()} for n, r in enumerate(policy.rules, 1)]
        answer(json.dumps({**policy.to_dict(), "rule": rules, "warnings": warnings}, indent=2) + "\n")
        return EXIT_OK
    width = len(str(len(policy.rules)))
    for number, rule in enumerate(policy.rules, 1):
        label = "" if rule.label == str(rule) else f"  # {rule.label}"
        address = "  (by address)" if rule.match == "address" else ""
        answer(f"{number:>{width}}  {rule}{address}{label}\n")
    answer(f"{'-':>{width}}  {policy.default} everything else\n")
    for warning in warnings:
        complain(f"Note: {warning}")
    return EXIT_OK
