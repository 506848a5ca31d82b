"""The rows of docs/conformance.md about the services of the network in IPv6; `conformance.py` writes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One requirement. `tests` are prefixes of test names; none of them means that it is not offered."""

    name: str
    text: str
    tests: tuple[str, ...] = ()
    note: str = ""


TABLE6: dict[str, list[Row]] = {
    "RFC 8415, DHCPv6 server": [
        Row("8415-11", "DUIDs are opaque, 3 to 130 bytes", ("another_duid_or_iaid", "clones_with_one_duid")),
        Row("8415-12", "one address for an association, the others get a status", ("one_association_has",)),
        Row(
            "8415-13",
            "only from the link, to ff02::1:2",
            ("dhcpv6_reaches_its_service", "unicast_of_other_types"),
        ),
        Row("8415-16", "messages that must be discarded", ("messages_that_get_no_answer",)),
        Row("8415-18.3.1", "Solicit", ("solicit_is_offered",)),
        Row(
            "8415-18.3.2", "Request", ("a_request_for_what", "a_request_with_an_address", "two_addresses_in")
        ),
        Row(
            "8415-18.3.3", "Confirm", ("confirm",), "not on link also for another guest's address of the link"
        ),
        Row("8415-18.3.4", "Renew", ("renewing_and_rebinding", "a_wrong_address_is_taken_away")),
        Row("8415-18.3.5", "Rebind", ("renewing_and_rebinding", "an_own_address_beside")),
        Row("8415-18.3.6", "Information-request", ("information_without_an_address",)),
        Row("8415-18.3.7", "Release", ("release_ends_the_lease",)),
        Row("8415-18.3.8", "Decline", ("a_declined_address_is_replaced", "a_guest_that_declines_everything")),
        Row("8415-18.4", "unicast is refused by status", ("unicast_is_answered_with_a_status",)),
        Row("8415-19", "relay agents", (), "a network is one segment; their messages are discarded"),
        Row("8415-20", "authentication and Reconfigure", (), "the core keeps other servers from the segment"),
        Row("8415-21.7", "only options that are asked for", ("only_what_is_asked_for",)),
        Row("8415-21.14", "rapid commit", ("rapid_commit_is_a_lease", "rapid_commit_without_an_address")),
        Row("8415-21.21", "prefix delegation", (), "refused by status (NoPrefixAvail)"),
        Row("8415-21.24", "SOL_MAX_RT, INF_MAX_RT and refresh time", ("information_without_an_address",)),
        Row("3646", "search list", ("only_what_is_asked_for", "options_without_room")),
        Row(
            "4704",
            "name of the client",
            ("the_name_of_a_client", "a_client_that_wants_no_name", "names_that_no"),
        ),
    ],
    "RFC 3596, names and addresses of guests": [
        Row("3596-2.1", "AAAA", ("names_and_addresses_in_ipv6",)),
        Row(
            "3596-2.5", "ip6.arpa", ("names_and_addresses_in_ipv6", "addresses_of_the_prefix_that_nobody_has")
        ),
    ],
}


def lines_of(outcomes: dict[str, bool]) -> tuple[list[str], list[str]]:
    """The lines of the tables, and what is wrong, from the outcomes of tests by name."""
    lines: list[str] = []
    problems: list[str] = []
    for title, rows in TABLE6.items():
        lines += ["", f"## {title}", "", "| requirement | | state | tests |", "|---|---|---|---|"]
        for row in rows:
            mine = {name for name in outcomes if any(name.startswith(prefix) for prefix in row.tests)}
            problems += [
                f"{row.name}: no test is named {prefix}*"
                for prefix in row.tests
                if not any(name.startswith(prefix) for name in outcomes)
            ]
            failed = sorted(name for name in mine if not outcomes[name])
            problems += [f"{row.name}: {name} failed" for name in failed]
            state = "not offered" if not row.tests else "**not met**" if failed or not mine else "met"
            cell = f"{state}: {row.note}" if row.note else state
            lines.append(f"| {row.name} | {row.text} | {cell} | {len(mine) or ''} |")
    return lines, problems
