"""`guestnet doctor`: what this system supports, and how to get the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence

from guestnet.cli import EXIT_OK, EXIT_PROBLEM, arguments, checks, version
from guestnet.cli.terminal import answer
from guestnet.model.defaults import DEFAULT_SUBNET

_ABOUT = """\
Tests what guestnet needs from this system and says how to get what is missing. Exits with 1 when
`guestnet run` cannot work here, with 0 otherwise."""
_EXAMPLE = """\
  guestnet doctor
  guestnet doctor --json | jq '.checks[] | select(.state != "ok")'"""
_MARKS = {checks.OK: "ok", checks.LIMITED: "limited", checks.MISSING: "MISSING"}


def parser() -> arguments.Parser:
    """The options of `guestnet doctor`."""
    made = arguments.Parser("doctor", "[--json] [--subnet SUBNET]", _ABOUT, _EXAMPLE)
    made.add_argument("--json", action="store_true", help="print the report as JSON")
    made.add_argument(
        "--subnet",
        type=arguments.checked(arguments.subnet),
        default=DEFAULT_SUBNET,
        help="the subnet to check for conflicts",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the command line after `guestnet doctor`; returns the exit status."""
    options = parser().parse_args(argv)
    found = list(checks.all_checks(str(options.subnet)))
    works = all(check.state != checks.MISSING for check in found if check.needed)
    if options.json:
        report = {"version": version(), "run_works": works, "checks": [check.as_dict() for check in found]}
        answer(json.dumps(report, indent=2) + "\n")
        return EXIT_OK if works else EXIT_PROBLEM
    width = max(len(check.name) for check in found)
    for check in found:
        answer(f"{_MARKS[check.state]:<8} {check.name:<{width}}  {check.found}\n")
        if check.remedy is not None:
            answer(f"{'':<9}{'':<{width}}  -> {check.remedy}\n")
    answer(
        "\n`guestnet run` works here.\n"
        if works
        else "\n`guestnet run` cannot work here until what is MISSING is there.\n"
    )
    return EXIT_OK if works else EXIT_PROBLEM
