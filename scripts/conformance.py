#!/usr/bin/env python3
"""Runs the RFC tests and writes docs/conformance.md: which requirements each uplink meets.

The packet engine meets a requirement if there are tests named for it and all of them pass. For the socket
relay, guestnet meets it, with tests, or the host's kernel does, or it does not apply: the table says which.
The exit status is 1 if a test fails, if a test that the table names is missing, or if a test names no
requirement.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from conformance_ipv6 import lines_of

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^test (?:[\w:]+::)?(\w+) \.\.\. (ok|FAILED)")
#: Tests in Python: of what the control side does, and on which uplink a guest finds it.
PYTHON_TESTS = (
    "tests/unit/services/test_pcp_messages.py",
    "tests/unit/services/test_pcp_mappings.py",
    "tests/unit/runtime/services/test_pcp_ports.py",
    "tests/unit/services/test_dhcp6_server.py",
    "tests/unit/services/test_dns_own.py",
)
PYTHON_LINE = re.compile(r"^\S+::test_(\w+?)(?:\[.*\])? (PASSED|FAILED|ERROR)")

KERNEL = "by the host's kernel"
NOT_APPLICABLE = "not applicable"
#: Tests of the relay that a cell of the table may name, by the word that the cell uses.
NO_EXTERNAL = "the host picks the port of its own sockets"
UNLESS_EVICTED = "unless it is a one-shot flow that is evicted at the guest's cap (6888-11)"
ECHO_ALONE = "the host's ping sockets send no other query"
ENGINE_ALONE = "a setting of `NatEngineConfig` only, not of a network"


@dataclass(frozen=True)
class Requirement:
    """One row. `tests` are prefixes of test names; none of them means that it is not met, and `note` why."""

    name: str
    text: str
    tests: tuple[str, ...] = ()
    note: str = ""
    relay: str = ""
    relay_tests: tuple[str, ...] = ()


def r(
    name: str,
    text: str,
    *,
    relay: str,
    note: str = "",
    by: tuple[str, ...] = (),
    tests: tuple[str, ...] | None = None,
) -> Requirement:
    """A row whose engine tests are named for it unless said otherwise: `4787-13a` -> `rfc4787_req13a_`."""
    if tests is None:
        rfc, number = name.split("-", 1)
        tests = (f"rfc{rfc}_req{number}_",)
    return Requirement(name, text, tests, note, relay, by)


TABLE: dict[str, list[Requirement]] = {
    "RFC 4787, UDP": [
        r(
            "4787-1",
            "endpoint-independent mapping",
            note="the default",
            relay=f"met, {UNLESS_EVICTED}",
            by=("req_1_one_socket_for_all_destinations",),
        ),
        r(
            "4787-2",
            "pooling is paired",
            note="while the guest has a flow; packets from a port that is published on another "
            "address use that address",
            relay=f"{KERNEL}: one route, one address",
        ),
        r("4787-3", "no port overloading", relay=f"{KERNEL}: a port has one socket"),
        r(
            "4787-3a",
            "ports below 1024 stay below",
            note="where the port range has free ones below 1024; the default, 49152 to 65535, has none",
            relay=f"not met: {NO_EXTERNAL}, and below 1024 needs a privilege",
        ),
        r(
            "4787-4",
            "parity kept (recommended)",
            note="while the range has a free port of that parity",
            relay=f"not met: {NO_EXTERNAL}",
        ),
        r(
            "4787-5",
            "mapping lives 300 s",
            note="the default; 4787-5a is the only exception",
            relay=f"met by default, {UNLESS_EVICTED}",
            by=("req_5_and_6_timeouts",),
        ),
        r(
            "4787-5a",
            "shorter for well-known destinations",
            note="port 53: 10 s after an answer",
            relay="met for port 53: 10 s after an answer",
            by=("req_5_and_6_timeouts",),
        ),
        r("4787-6", "outbound packets refresh", relay="met", by=("req_5_and_6_timeouts",)),
        r(
            "4787-6a",
            "inbound refresh can be chosen",
            note=f"they refresh by default; {ENGINE_ALONE}",
            relay="met: they refresh",
            by=("req_5_and_6_timeouts",),
        ),
        r(
            "4787-7",
            "address conflict is an error",
            note="an external address inside the guests' subnet is refused; no other subnet is chosen",
            relay=f"{NOT_APPLICABLE}: the guests' subnet never leaves",
        ),
        r(
            "4787-8",
            "filtering: independent or address-dependent",
            note="address-dependent by default",
            relay="met, address-dependent by default",
            by=("req_8_filtering",),
        ),
        r(
            "4787-9",
            "hairpinning",
            note="as far as the filtering of the other guest's mapping allows",
            relay=f"{KERNEL}: a socket reaches another on the same host",
        ),
        r("4787-9a", "hairpinned source is the external end", relay=KERNEL),
        r("4787-10", "no ALG", relay="met", by=("replies_come_back",)),
        r("4787-11", "deterministic", relay="met", by=("req_1_one_socket_for_all_destinations",)),
        r("4787-12", "ICMP keeps the mapping", relay="met", by=("errors_of_the_network_quote",)),
        r(
            "4787-13",
            "DF and too big: ICMP 3/4",
            note="within the rate of ICMP errors (5508-8)",
            relay="met, as far as the host's socket reports it, within the rate of ICMP errors; "
            "the host fragments what a guest sends through a published port",
            by=("errors_at_once_are_told", "an_echo_keeps_dont_fragment"),
        ),
        r(
            "4787-13a",
            "fragments in order",
            note="within the sender's share of the output, 1 MiB in all; else the packet is dropped",
            relay=f"met towards the guest; outbound {KERNEL}",
            by=("req_13_and_14_fragments",),
        ),
        r(
            "4787-14",
            "fragments in any order",
            note="fragments before the first wait 15 s, within the sender's share of 1 MiB; overlaps are "
            "refused",
            relay="met within the guest's share of buffers, 30 s; overlaps are refused",
            by=("req_13_and_14_fragments",),
        ),
        r("4787-14a", "fragment floods are bounded", relay="met", by=("req_14a_incomplete_datagrams",)),
    ],
    "RFC 5382, TCP": [
        r(
            "5382-1",
            "endpoint-independent mapping",
            note="the default",
            relay="not met: each connect has a port of its own",
        ),
        r(
            "5382-2",
            "all valid sequences",
            relay="met",
            by=("half_closed_for_an_hour", "urgent_is_plain_data"),
        ),
        r("5382-2a", "simultaneous open", relay="met towards the guest", by=("both_open_at_once",)),
        r(
            "5382-3",
            "filtering",
            note="address-dependent by default",
            relay=f"{KERNEL}: address and port dependent, except for published ports",
        ),
        r(
            "5382-4",
            "unsolicited SYN waits six seconds",
            note="128 at a time; more are dropped without an answer, as are those beyond the rate of "
            "ICMP errors",
            relay=f"{KERNEL}: RST at once, as any host",
        ),
        r(
            "5382-5",
            "established 7440 s, transitory 240 s",
            note="the defaults",
            relay="met by default; for a guest at its limit, a new connection replaces the oldest one "
            "that is "
            "being opened; a connection that its guest denies ends",
            by=("idle_limits",),
        ),
        r("5382-6", "no ALG", relay="met", by=("payload_goes_straight",)),
        r("5382-7", "no port overloading", relay=f"{KERNEL}: four-tuples are unique"),
        r(
            "5382-8",
            "hairpinning",
            note="as far as the filtering of the other guest's mapping allows",
            relay=f"{KERNEL}: through published ports",
        ),
        r(
            "5382-9",
            "ICMP unreachable reaches the guest",
            note="when it quotes a live connection or mapping",
            relay="met",
            by=("unreachable_is_told",),
        ),
        r("5382-10", "ICMP does not end a connection", relay=KERNEL),
    ],
    "RFC 5508, ICMP": [
        r(
            "5508-1",
            "queries permitted",
            note="types 0, 8 and 13 to 18",
            relay=f"met for echo; {ECHO_ALONE}",
            by=("echo_is_relayed",),
        ),
        r(
            "5508-1a",
            "identifier mapping is endpoint-independent",
            relay=f"met for echo; {ECHO_ALONE}",
            by=("echo_is_relayed",),
        ),
        r("5508-2", "query lives 60 s", note="the default", relay="met by default", by=("echo_is_relayed",)),
        r(
            "5508-3",
            "bad outer checksum is dropped",
            note="for errors of types 3, 11 and 12; the receiver checks the checksums of "
            "queries; a fragmented error is dropped",
            relay="met",
            by=("bad_checksums_and_sizes",),
        ),
        r("5508-3a", "bad inner IP checksum is dropped", relay="met", by=("errors_of_a_guest_are_checked",)),
        r("5508-3b", "inner options are understood", relay=KERNEL),
        r("5508-3c", "inner transport checksum is not verified", relay=KERNEL),
        r("5508-3d", "extensions are left alone", relay=f"{NOT_APPLICABLE}: the error is rebuilt"),
        r(
            "5508-4",
            "errors from outside are reverted; one that names an MTU under 68 is dropped",
            relay="met",
            by=("errors_of_the_network_quote",),
        ),
        r(
            "5508-5",
            "errors from inside are reverted; a guest's error about another guest's packet is dropped",
            relay=f"{NOT_APPLICABLE}: sockets cannot send them",
        ),
        r("5508-6", "errors neither refresh nor delete", relay="met", by=("errors_of_the_network_quote",)),
        r(
            "5508-7",
            "hairpinned queries, to an identifier that another guest's query has outside",
            relay=f"{NOT_APPLICABLE}: the host answers for its own addresses",
        ),
        r("5508-7a", "hairpinned errors", relay=f"{NOT_APPLICABLE}: sockets cannot send them"),
        r(
            "5508-8",
            "refusals are reported, at a limited rate",
            note="100 a second for a guest, 1600 for all; `refusal` can turn it off",
            relay="met",
            by=("icmp_errors_are_limited_in_rate",),
        ),
        r(
            "5508-10",
            "unreachable, time exceeded, echo",
            note="unless `decrement_ttl` is off; echo to the gateway itself is answered by the network",
            relay="met",
            by=("ttl_runs_out_here",),
        ),
    ],
    "RFC 6888, with guests for subscribers": [
        r(
            "6888-4",
            "cap of ports per guest",
            note="in a network: a share of the remaining ports, and the cap of 6888-5; in an "
            "engine alone: `ports_per_endpoint`, whose default, 65536, is no cap",
            relay="met: 1024 UDP sockets by default, and the cap of 6888-5",
            by=("the_cap_evicts_one_shot_flows",),
        ),
        r(
            "6888-5",
            "cap of state per guest",
            note="in a network: 65536 flows by default (half of the table), and a share of what "
            "is left; in an engine alone: none by default",
            relay="met: 16384 flows by default, fewer where descriptors are scarce",
            by=("a_flood_of_flows_stays_within_the_caps",),
        ),
        r(
            "6888-6",
            "translation off for destinations",
            note=f"{ENGINE_ALONE}",
            relay=f"{NOT_APPLICABLE}: nothing leaves untranslated",
        ),
        r(
            "6888-7",
            "endpoint-independent filtering",
            note="when it is chosen; the default is address-dependent",
            relay="met for UDP, when it is chosen; the default is address-dependent",
            by=("req_8_filtering",),
        ),
        r(
            "6888-8",
            "a freed port rests 120 s",
            note="UDP and ICMP with endpoint-independent filtering; TCP and other filtering need no rest "
            "(exceptions A and C); the guest that had the port may get it earlier, and it may be "
            "published earlier",
            relay=f"not met: {NO_EXTERNAL}",
        ),
        r(
            "6888-9",
            "Port Control Protocol",
            tests=("rfc6887_", "rfc6886_", "rfc6888_req9_"),
            note="a service of the gateway, with NAT-PMP; for guests that are allowed ports (`--pcp`)",
            relay="met; datagrams that the guest sends first from a mapped UDP port leave from another port",
            by=("mapped_port_",),
        ),
        r(
            "6888-11",
            "never evict a live mapping",
            relay="one-shot UDP flows are evicted, least recently used first; nothing else is",
            by=("the_cap_evicts_one_shot_flows",),
        ),
        r(
            "6888-12",
            "destinations are not logged",
            tests=(),
            note="met by construction: the engine logs nothing",
            relay="only the owner of the network gets flow events",
        ),
        r(
            "6888-15",
            "unguessable ports",
            note="for ports that are drawn; by default a guest keeps its own port if it is free, "
            "which is as guessable as the guest's choice",
            relay=KERNEL,
        ),
    ],
    "RFC 7857, updates": [
        r("7857-2.1", "TCP state machine", tests=("rfc7857_2_1_",), relay="met", by=("both_close_at_once",)),
        r(
            "7857-2.2",
            "opening and closing timers",
            tests=("rfc7857_2_2_",),
            note="240 s each by default; a network has one setting for both",
            relay="met, with one setting for both",
            by=("idle_limits",),
        ),
        r(
            "7857-2.3",
            "a reset does not end the session",
            tests=("rfc7857_2_3_",),
            note="for 240 s by default",
            relay=KERNEL,
        ),
        r(
            "7857-3",
            "port overlap",
            tests=("rfc7857_3_",),
            relay=KERNEL,
            note="not offered, which is allowed",
        ),
        r("7857-4", "refusals do not refresh", tests=("rfc7857_4_",), relay=NOT_APPLICABLE),
        r(
            "7857-5",
            "behaviour per protocol",
            tests=("rfc7857_5_",),
            note=f"{ENGINE_ALONE}, which has one setting for all protocols",
            relay="met for UDP; TCP is filtered by the host's kernel",
            by=("req_8_filtering",),
        ),
        r(
            "7857-8",
            "parity may be off",
            tests=("rfc7857_8_",),
            note=f"{ENGINE_ALONE}",
            relay=NOT_APPLICABLE,
        ),
        r(
            "7857-9",
            "port randomisation",
            tests=("rfc7857_9_",),
            note="for ports that are drawn; by default the guest's own port is kept if it is free (see "
            "6888-15)",
            relay=KERNEL,
        ),
        r(
            "7857-10",
            "IP identification",
            tests=("rfc7857_10_",),
            note="unique for fragments; other packets keep the guest's, so that errors quote what it sent",
            relay=KERNEL,
        ),
        r("7857-11", "ICMP mapping goes with its last session", tests=("rfc7857_11_",), relay="met"),
    ],
    "RFC 3022 and 1624, the basics": [
        r("UDP zero", "checksum 0 stays 0", tests=("rfc3022_udp_checksum_zero",), relay=KERNEL),
        r(
            "UDP ones",
            "a computed 0 goes out as 0xffff",
            tests=("rfc3022_a_computed_udp_zero",),
            relay=KERNEL,
        ),
        r("Partial sums", "are completed", tests=("rfc3022_a_partial_checksum",), relay=KERNEL),
        r(
            "Published ports",
            "DNAT",
            tests=("rfc3022_published_ports",),
            relay="met",
            by=("published_udp_keeps",),
        ),
        r(
            "Others",
            "GRE, ESP and SCTP where unambiguous",
            tests=("rfc3022_protocols_without_ports",),
            relay="refused: no socket for them",
        ),
        r("Not ours", "passes unchanged", tests=("rfc3022_what_is_not_ours",), relay=NOT_APPLICABLE),
    ],
}


def run_tests() -> dict[str, bool]:
    """Name and outcome of every test of guestnet-core, and of those in Python that it may name."""
    command = ["cargo", "test", "--locked", "--no-fail-fast", "-p", "guestnet-core", "--tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {m[1]: m[2] == "ok" for line in done.stdout.splitlines() if (m := LINE.match(line))}
    if not found:
        sys.stderr.write(done.stderr[-4000:])
        return {}
    own = ROOT / ".venv" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    command = [python, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *PYTHON_TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    outcomes = [
        (m[1], m[2] == "PASSED") for line in done.stdout.splitlines() if (m := PYTHON_LINE.match(line))
    ]
    if not outcomes:
        sys.stderr.write(done.stdout[-4000:] + done.stderr[-4000:])
        return {}
    for name, passed in outcomes:
        # One with several cases is one test.
        found[name] = passed and found.get(name, True)
    return found


def main() -> int:
    outcomes = run_tests()
    problems = [f"{name} failed" for name, ok in outcomes.items() if not ok and name.startswith("rfc")]
    if not outcomes:
        problems.append("the tests did not run")
    named: set[str] = set()
    lines = [
        "# Conformance of guestnet's NAT and services",
        "",
        "Written by `make conformance`, which runs the tests that it counts. Do not edit.",
        "",
        "`tun` is the packet engine behind `--uplink tun`, tested with a simulated outside and a virtual",
        "clock. `sockets` is the relay over host sockets. The relay sees no packets of the outside, so the",
        "host's kernel meets requirements about them, or they do not apply. The control side opens the ports",
        'that guests ask for (PCP), for both alike. Where a row says "the default", the owner can choose',
        "another setting. The last tables are about services that are the same on both uplinks.",
    ]
    met = total = 0
    for title, rows in TABLE.items():
        lines += ["", f"## {title}", "", "| requirement | | tun | tests | sockets |", "|---|---|---|---|---|"]
        for row in rows:
            mine = [n for n in outcomes if any(n.startswith(p) for p in row.tests)]
            named.update(mine)
            total += 1
            if not row.tests:
                state = "met" if row.note.startswith("met") else "**not met**"
            elif not mine:
                state = "**no test**"
                problems.append(f"{row.name}: no test is named {' or '.join(row.tests)}*")
            else:
                state = "met" if all(outcomes[n] for n in mine) else "**not met**"
            met += state == "met"
            note = row.note.removeprefix("met ")
            relay = row.relay
            for prefix in row.relay_tests:
                by = [n for n in outcomes if n.startswith(prefix)]
                if not by:
                    problems.append(f"{row.name}: no test of the relay is named {prefix}*")
                elif not all(outcomes[n] for n in by):
                    relay = f"**not met**: {prefix} fails"
                    problems.append(f"{row.name}: {prefix} failed")
            tested = " (tested)" if row.relay_tests else ""
            cell = f"{state}: {note}" if note else state
            lines.append(f"| {row.name} | {row.text} | {cell} | {len(mine) or ''} | {relay}{tested} |")
    lines += ["", f"{met} of {total} met by the packet engine, each as far as its row says."]
    more, wrong = lines_of(outcomes)
    lines += [*more, ""]
    problems += wrong
    # Tests beyond a requirement's letter are welcome; a test that claims a requirement must be counted.
    claims = re.compile(r"^rfc\d+_req\d+")
    problems += [
        f"{n} names a requirement that the table lacks"
        for n in outcomes
        if claims.match(n) and n not in named
    ]
    out = ROOT / "docs" / "conformance.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines[8:]))
    for p in problems:
        print(p, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
