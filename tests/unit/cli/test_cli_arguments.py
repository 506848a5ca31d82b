"""What the command line takes and what it refuses, and in which words."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from ipaddress import IPv4Address

import pytest
from guestnet import NatConfig, cli
from guestnet._linux import links
from guestnet.cli import UsageError, arguments, demo, doctor, run, session, up, vm


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("guestnet: ")
    assert lines[0].endswith((".", "."))
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "guestnet --help"),
        (["walk"], "'walk'"),
        (["--walk"], "'--walk'"),
        (["run"], "Say what to run"),
        (["run", "--"], "Say what to run"),
        (["run", "--walk", "--", "true"], "--walk"),
        (["run", "--subnet", "10.0.0.0", "--", "true"], "10.0.0.0"),
        (["run", "--subnet", "10.0.0.7/24", "--", "true"], "write 10.0.0.0/24"),
        (["run", "--subnet", "10.0.0.0/31", "--", "true"], "/31"),
        (["run", "--subnet", "10.0.0.0/7", "--", "true"], "/7"),
        (["run", "--subnet", "127.0.0.0/24", "--", "true"], "127.0.0.0/24"),
        (["run", "--subnet", "224.0.0.0/24", "--", "true"], "224.0.0.0/24"),
        (["run", "--subnet", "fd00::/64", "--", "true"], "fd00::/64"),
        (["run", "--subnet", "x", "--", "true"], "'x'"),
        (["run", "--mtu", "67", "--", "true"], "'67'"),
        (["run", "--mtu", "65521", "--", "true"], "'65521'"),
        (["run", "--mtu", "²", "--", "true"], "'²'"),
        (["run", "--mode", "bridge", "--", "true"], "bridge"),
        (["run", "--dns-record", "web", "--", "true"], "'web'"),
        (["run", "--dns-record", "=1.2.3.4", "--", "true"], "'=1.2.3.4'"),
        (["run", "--dns-record", "web=x", "--", "true"], "'x'"),
        (["run", "--dns-record", "a..b=1.2.3.4", "--", "true"], "a..b"),
        (["run", "--hostname", "a b", "--", "true"], "'a b'"),
        (["run", "--pcp", "x", "--", "true"], "'x'"),
        (["run", "--pcp", "40000-", "--", "true"], "'40000-'"),
        (["run", "--pcp", "0-9", "--", "true"], "'0-9'"),
        (["run", "--pcp", "9-8", "--", "true"], "upside down"),
        (["run", "--pcp", "8-65536", "--", "true"], "65535"),
        (["run", "--pcp", "nowhere:8-9", "--", "true"], "'nowhere'"),
        (["run", "--pcp", ":8-9", "--", "true"], "''"),
        (["run", "--dns", "dns.example", "--", "true"], "'dns.example'"),
        (["run", "--search", "a..b", "--", "true"], "'a..b'"),
        (["run", "--sub", "10.0.0.0/24", "--", "true"], "--sub"),
        (["vm"], "qemu-system-x86_64"),
        (["vm", "--mac", "01:00:00:00:00:01", "--", "q"], "01:00:00:00:00:01"),
        (["vm", "--mac", "zz", "--", "q"], "'zz'"),
        (["vm", "--", "qemu-system-x86_64", "-daemonize"], "-daemonize"),
        (["up"], "--stream"),
        (["up", "--stream", "/nowhere/at/all"], "/nowhere/at/all"),
        (["up", "--stream", "/tmp/" + "x" * 200], "107"),
        (["up", "--stream", "/tmp/a", "--dgram", "/tmp/a"], "twice"),
        (["up", "--stream", "/tmp/a", "--lease", "x"], "'x'"),
        (["up", "--stream", "/tmp/a", "--lease", "02:00:00:00:00:01=x"], "'x'"),
        (["up", "--stream", "/tmp/a", "--lease", "02:00:00:00:00:01=10.0.0.1"], "10.0.0.1"),
        (["up", "--stream", "/tmp/a", "--lease", "02:00:00:00:00:01=192.168.64.1"], "192.168.64.1"),
        (["up", "--stream", "/tmp/a", "--ready-fd", "987"], "987"),
        (["demo", "--seconds", "0"], "--seconds"),
        (["doctor", "--subnet", "x"], "'x'"),
    ],
)
def test_misuse_is_one_sentence_that_names_it(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(argv, capsys)


@pytest.mark.parametrize("command", [run, vm, up, demo, doctor])
def test_every_command_has_an_example(command: object) -> None:
    text = command.parser().format_help()  # type: ignore[attr-defined]
    assert "example:" in text
    assert "guestnet " in text.partition("example:")[2]


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_exits_with_zero(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"guestnet {command}" in capsys.readouterr().out


def test_general_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("guestnet ")


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["--", "true"], ["true"]),
        (["true"], ["true"]),
        (["curl", "-s", "x"], ["curl", "-s", "x"]),
        (["--mtu", "1400", "curl", "--mtu", "x"], ["curl", "--mtu", "x"]),
        (["--", "--odd"], ["--odd"]),
        (["sh", "-c", "x", "--", "y"], ["sh", "-c", "x", "--", "y"]),
        (["--", "sh", "--", "y"], ["sh", "--", "y"]),
    ],
)
def test_the_command_is_what_follows_the_options(argv: list[str], command: list[str]) -> None:
    assert arguments.parse_with_command(run.parser(), argv, "CMD")[1] == command


def test_settings_of_a_network() -> None:
    argv = [
        "--dns-record",
        "a.example=192.0.2.1",
        "--dns-record",
        "a.example.=192.0.2.2",
        "--host-loopback",
        "--",
    ]
    options, _ = arguments.parse_with_command(run.parser(), [*argv, "true"], "CMD")
    settings = arguments.network_settings(options)
    assert settings["dns_records"] == {"a.example": ["192.0.2.1", "192.0.2.2"]}
    assert settings["host_loopback"] is True
    assert settings["subnet"] == "192.168.64.0/24"
    assert (settings["pcp_ports"], settings["pcp_address"]) == (None, None)


@pytest.mark.parametrize(
    ("text", "address", "ports"),
    [
        ("40000-40999", None, (40000, 40999)),
        ("40000", None, (40000, 40000)),
        ("192.0.2.7:1-65535", IPv4Address("192.0.2.7"), (1, 65535)),
    ],
)
def test_ports_that_guests_may_open(text: str, address: IPv4Address | None, ports: tuple[int, int]) -> None:
    for command in (run, vm, up):
        options = command.parser().parse_args(["--pcp", text])
        settings = arguments.network_settings(options)
        assert (settings["pcp_address"], settings["pcp_ports"]) == (address, ports)
        assert NatConfig(**settings).pcp_ports == ports
    assert settings["resolvers"] is None
    assert settings["search"] == ("guestnet.internal",)


def test_other_name_servers_and_domains() -> None:
    words = ["--dns", "192.0.2.53", "--dns", "2001:db8::53", "--search", "Corp.Example.", "--search", "lan"]
    options, _ = arguments.parse_with_command(run.parser(), [*words, "--", "true"], "CMD")
    config = NatConfig(**arguments.network_settings(options))
    assert config.resolvers == ("192.0.2.53", "2001:db8::53")
    assert config.search == ("corp.example", "lan", "guestnet.internal")


@pytest.mark.parametrize(
    ("words", "said"),
    [([], True), (["-q"], False), (["--mode", "host_only"], False), (["--bridge", "b"], False)],
)
def test_a_subnet_of_the_hosts_own_is_noted(
    words: list[str], said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(links, "routes_into", lambda subnet: [f"{subnet} on eth0"])
    options, _ = arguments.parse_with_command(run.parser(), [*words, "--", "true"], "CMD")
    session.note_overlap(options)
    err = capsys.readouterr().err
    assert ("192.168.64.0/24 on eth0" in err) is said
    assert len(err.splitlines()) == said


def test_plan_of_a_small_subnet() -> None:
    where = arguments.plan(arguments.subnet("10.9.8.4/30"))
    assert (str(where.gateway), str(where.guest)) == ("10.9.8.5", "10.9.8.6")


def test_mac_reads_what_it_writes() -> None:
    address = arguments.random_mac()
    assert arguments.mac(arguments.format_mac(address)) == address
    assert address[0] == 2
    with pytest.raises(UsageError):
        arguments.mac("00:00:00:00:00:00")


def test_starting_imports_little() -> None:
    """The budget of `guestnet run -- true` is 0.4 s: these would take a good part of it."""
    code = "import sys, guestnet.cli.run, guestnet.namespace; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"pydantic", "rich", "typer", "dns", "pyroute2", "structlog", "asyncio"} & set(loaded)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"], ["doctor"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_stdout_that_cannot_be_written_is_said_once(words: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "guestnet", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == cli.EXIT_FAILED
    assert done.stderr == b"guestnet: Cannot write to stdout (No space left on device): lead it elsewhere.\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "x"), "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "x"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (RuntimeError("other"), "Unexpected RuntimeError"),
    ],
)
def test_what_the_system_has_no_more_of(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.failure(error) == cli.EXIT_FAILED
    assert words in capsys.readouterr().err
