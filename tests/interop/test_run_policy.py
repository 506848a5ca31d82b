"""Policies on the command line of `guestnet run`, as an ordinary user, with real tools in the guest."""

from __future__ import annotations

import json
import time

import pytest
from guestnet import Policy, Rule
from lab import need
from lab.namespaces import OUT4, SECOND4
from lab.runner import Blob, GuestRunner

PAGE = "a page from outside\n"
URL = "http://www.example.test/"
CURL = ("curl", "-sS", "-m", "15")


def ours(guest: GuestRunner) -> None:
    if guest.peer != "guestnet":
        pytest.skip("policies are guestnet's own")


def test_with_one_allowed_name_the_rest_is_denied(guest: GuestRunner) -> None:
    ours(guest)
    assert guest.check([*CURL, URL], "--allow", "www.example.test") == PAGE
    for url, status in (
        (f"http://{OUT4}/", 7),
        (f"http://{SECOND4}/", 7),
        ("http://second.example.test/", 6),
    ):
        done = guest([*CURL, url], "--allow", "www.example.test")
        assert done.returncode == status, done.stderr
    before = time.monotonic()
    done = guest(["ping", "-c", "1", "-W", "10", OUT4], "--allow", "www.example.test")
    assert "Packet filtered" in done.stdout
    assert time.monotonic() - before < 8


def test_denied_prefixes_leave_the_rest_allowed(guest: GuestRunner) -> None:
    ours(guest)
    assert guest.check([*CURL, f"http://{OUT4}/"], "--deny", f"{SECOND4}/32") == PAGE
    assert guest([*CURL, f"http://{SECOND4}/"], "--deny", f"{SECOND4}/32").returncode == 7


def test_a_refused_name_says_why(guest: GuestRunner) -> None:
    ours(guest)
    need.program("dig", "bind9-dnsutils")
    answer = guest.check(["dig", "+tries=1", "second.example.test"], "--allow", "www.example.test")
    assert "status: NXDOMAIN" in answer
    assert "guestnet: default: name not allowed" in answer


def test_a_changed_policy_file_cuts_a_running_download(guest: GuestRunner, blob: Blob) -> None:
    ours(guest)
    policy = guest.lab.dir / "policy.toml"
    policy.write_text(Policy("deny", [Rule("allow", "public")]).to_toml())
    policy.chmod(0o644)
    script = f"curl -sS --limit-rate 1M http://{OUT4}/blob -o /dev/null & sleep 0.5; echo runs; wait $!"
    command = guest.start(["sh", "-c", script], "--policy", str(policy), ready="runs")
    policy.write_text('default = "deny"\n')
    command.wait_line("was read again, 1 flows were cut")
    # curl first reads, at its own rate, what the kernel has received: up to 32 MB.
    assert command.wait(60) == 56  # the connection was reset
    wrong = guest.lab.dir / "wrong.toml"
    wrong.write_text('default = "denied"\n')
    wrong.chmod(0o644)
    done = guest(["true"], "--policy", str(wrong))
    assert done.returncode == 2
    assert "line 1" in done.stderr
    assert "Did you mean deny?" in done.stderr


def test_what_was_learned_allows_it_again(guest: GuestRunner) -> None:
    ours(guest)
    learned = guest.lab.dir / "learned.toml"
    assert guest.check([*CURL, URL], "--learn", str(learned)) == PAGE
    policy = Policy.load(learned)
    assert [str(rule) for rule in policy.rules] == ["allow www.example.test"]
    learned.chmod(0o644)
    assert guest.check([*CURL, URL], "--policy", str(learned)) == PAGE
    assert guest([*CURL, f"http://{SECOND4}/"], "--policy", str(learned)).returncode == 7


def test_the_audit_log_tells_what_the_command_did(guest: GuestRunner) -> None:
    ours(guest)
    log = guest.lab.dir / "audit.jsonl"
    script = f"curl -sS {URL}; curl -sS http://{SECOND4}/; curl -sS http://second.example.test/; true"
    guest.check(["sh", "-c", script], "--allow", "www.example.test", "--audit", str(log))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    found = {(line["event"], line.get("rule"), line.get("name") or line.get("destination")) for line in lines}
    assert ("end", "allow www.example.test", "www.example.test") in found
    assert ("denied", "default", f"{SECOND4}:80") in found
    assert ("name_denied", "default", "second.example.test") in found
    (flow,) = [line for line in lines if line["event"] == "end" and line.get("name") == "www.example.test"]
    assert flow["shown"] == "www.example.test"
    assert flow["bytes_in"] > len(PAGE)


def test_the_capture_says_why_packets_were_refused(guest: GuestRunner) -> None:
    ours(guest)
    tshark = need.program("tshark")
    capture = guest.lab.dir / "denied" / "guest.pcapng"
    capture.parent.mkdir()
    capture.parent.chmod(0o777)
    script = f"curl -sS {URL}; curl -sS http://{SECOND4}/; curl -sS http://second.example.test/; true"
    guest.check(["sh", "-c", script], "--allow", "www.example.test", "--pcap", str(capture))
    fields = ["-T", "fields", "-e", "frame.comment", "-e", "tcp.dstport", "-e", "dns.qry.name"]
    done = guest.lab.run([tshark, "-r", str(capture), "-Y", "frame.comment", *fields])
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert ["guestnet: default: policy", "80", ""] in rows, rows
    assert any(
        row[0].startswith("guestnet: default: name") and row[2] == "second.example.test" for row in rows
    )
    assert not any("www.example.test" in row for row in rows)
