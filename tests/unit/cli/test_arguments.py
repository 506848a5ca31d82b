"""What the command line takes and what it refuses, and in which words."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from ipaddress import IPv4Address

import pytest
from guestnet import ConfigError, NatConfig, cli
from guestnet._linux import links
from guestnet.cli import arguments
from guestnet.cli.commands import demo, doctor, run, up, vm
from guestnet.cli.runner import session


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("guestnet: ")
    assert lines[0].endswith(".")
    return lines[0]


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("192.168.64.9", {"ip": "192.168.64.9"}),
        ("192.168.64.9,web", {"ip": "192.168.64.9", "name": "web"}),
        ("fd00::5,web", {"ip6": "fd00::5", "name": "web"}),
        ("192.168.64.9,fd00::5", {"ip": "192.168.64.9", "ip6": "fd00::5"}),
        ("fd00::5,192.168.64.9,web", {"ip": "192.168.64.9", "ip6": "fd00::5", "name": "web"}),
    ],
)
def test_a_lease_has_an_address_of_either_family_or_of_both(text: str, rest: dict[str, str]) -> None:
    assert up.lease(f"02:00:00:00:00:01={text}") == {"mac": "02:00:00:00:00:01", **rest}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["walk"], "'walk'"),
        (["--wibble"], "'--wibble'"),
        (["run"], "Say what to run"),
        (["run", "--"], "Say what to run"),
        (["run", "--wibble", "--", "true"], "--wibble"),
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
        (["run", "--dns-record", "web=x", "--", "true"], "write web=192.0.2.1"),
        (["run", "--dns-record", "a..b=1.2.3.4", "--", "true"], "a..b"),
        (["run", "--hostname", "a b", "--", "true"], "'a b'"),
        (["run", "--pcp", "x", "--", "true"], "'x'"),
        (["run", "--pcp", "40000-", "--", "true"], "'40000-'"),
        (["run", "--pcp", "0-9", "--", "true"], "--pcp 0 is not between 1 and 65535"),
        (["run", "--pcp", "9-8", "--", "true"], "give the lower one first"),
        (["run", "--pcp", "8-65536", "--", "true"], "65535"),
        (["run", "-q", "-v", "--", "true"], "leave one out"),
        (["run", "--publish-address", "x", "--", "true"], "'x'"),
        (["run", "--publish-address", "::1", "--pcp", "8-9", "--", "true"], "IPv4"),
        (["run", "-p", "80:1", "-p", "80:2", "--", "true"], "TCP port 80 of the host twice"),
        (["run", "-p", "80:1", "-p", "127.0.0.1:79-81:1-3", "--", "true"], "TCP port 80 of the host twice"),
        (["run", "-p", "[::]:80:1", "-p", "[::1]:80:1", "--", "true"], "TCP port 80 of the host twice"),
        (["run", "--pcap", "", "--", "true"], "guests.pcapng"),
        (["run", "-6", "--", "true"], "'-6'"),
        (["run", "--", ""], "Say what to run"),
        (["run", "--pcp", "nowhere:8-9", "--", "true"], "'nowhere'"),
        (["run", "--pcp", ":8-9", "--", "true"], "''"),
        (["run", "--dns", "dns.example", "--", "true"], "'dns.example'"),
        (["run", "--search", "a..b", "--", "true"], "'a..b'"),
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
        (["up", "--stream", "/tmp/a", "--lease", "02:00:00:00:00:01=10.0.0.1"], "from 192.168.64.2 to"),
        (["up", "--stream", "/tmp/a", "--lease", "02:00:00:00:00:01=192.168.64.9,a b"], "--lease name 'a b'"),
        (["up", "--stream", "/tmp/a", "--lease", "zz=192.168.64.9"], "--lease 'zz'"),
        (["up", "--stream", "/tmp/a", "--lease", "02:00:00:00:00:01=fd00::5"], "needs --prefix"),
        (
            ["up", "--stream", "/tmp/a", "--lease", "02:00:00:00:00:01=fd00::5,fd00::6"],
            "one address of a family",
        ),
        (["up", "--stream", "/tmp/a", "--prefix", "fd00::/48"], "--prefix fd00::/48"),
        (["up", "--stream", "/tmp/a", "--json", "--pcap", "-"], "stdout"),
        (["up", "--stream", "/tmp/a", "--pid-file", "-"], "--pid-file '-'"),
        (["up", "--stream", "/tmp/a", "--ready-fd", "x"], "3>ready"),
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


def test_a_prefix_of_the_hosts_own_is_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(links, "routes_into", lambda subnet: [])
    monkeypatch.setattr(links, "routes6_into", lambda prefix: [f"{prefix} on eth0"])
    words = ["--prefix", "fd12::/64", "--", "true"]
    options, _ = arguments.parse_with_command(run.parser(), words, "CMD")
    session.note_overlap(options)
    assert (
        "fd12::/64 on eth0, which guests cannot reach: choose another with --prefix"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"forwarding": True}, "--uplink tun has --forwarding"),
        ({"external": ["192.0.2.1"], "masquerade": True}, "--external and --masquerade"),
        ({"mode": "host_only", "pcp_ports": (8, 9)}, "leave --pcp out"),
        ({"mode": "host_only", "host_loopback": True}, "leave --host-loopback out"),
        ({"workers": 2, "uplink": "tun"}, "2 --workers cannot share the one device of --uplink tun"),
        ({"mode": "bridged", "bridge": "b", "uplink": "tun"}, "--mode bridged"),
        ({"pcp_ports": (8, 9), "pcp_address": "0.0.0.0"}, "--pcp address"),
        ({"static_leases": [{"mac": "02:00:00:00:00:01", "ip": "192.168.64.1"}]}, "--lease address"),
    ],
)
def test_a_setting_is_named_as_the_option_that_it_is_here(
    settings: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        NatConfig(**settings)  # type: ignore[arg-type]
    assert cli.failure(caught.value) == cli.EXIT_USAGE
    line = capsys.readouterr().err
    assert words in line
    assert "`" not in line
    assert not any(f"{name}" in line.replace("host_only", "") for name in ("_ports", "_leases", "_loopback"))


def test_publish_address_is_that_of_ports_that_name_none() -> None:
    words = ["--publish-address", "localhost", "-p", "1:2", "-p", "0.0.0.0:3:4", "--pcp", "8-9", "true"]
    options, _ = arguments.parse_with_command(run.parser(), words, "CMD")
    arguments.settle(options, command=False)
    assert [str(spec.host_ip) for spec in options.publish] == ["127.0.0.1", "0.0.0.0"]
    assert options.pcp == (IPv4Address("127.0.0.1"), 8, 9)


@pytest.mark.parametrize(
    "specs", [("80:1", "80:1/udp"), ("127.0.0.1:80:1", "127.0.0.2:80:1"), ("0:1", "0:1"), ("80", "80")]
)
def test_ports_that_do_not_collide(specs: tuple[str, str]) -> None:
    options, _ = arguments.parse_with_command(run.parser(), ["-p", specs[0], "-p", specs[1], "true"], "CMD")
    arguments.settle(options, command=False)


def test_addresses_of_a_small_subnet() -> None:
    options, _ = arguments.parse_with_command(run.parser(), ["--subnet", "10.9.8.4/30", "true"], "CMD")
    arguments.settle(options, command=False)
    config = options.config
    assert (str(config.gateway), str(config.first_guest_address)) == ("10.9.8.5", "10.9.8.6")


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--subnet", "10.0.0.1/24"], {"subnet": "10.0.0.1/24"}),
        (["--subnet", "169.254.0.0/24"], {"subnet": "169.254.0.0/24"}),
        (["--subnet", "10.0.0.0/31"], {"subnet": "10.0.0.0/31"}),
        (["--search", "a b"], {"search": ["a b"]}),
        (["--dns", "x"], {"resolvers": ["x"]}),
        (["--external", "x"], {"external": ["x"], "uplink": "tun"}),
        (["--external", "192.0.2.1"], {"external": ["192.0.2.1"]}),
        (["--workers", "2", "--uplink", "tun"], {"workers": 2, "uplink": "tun"}),
        (["--mode", "host_only", "--host-loopback"], {"mode": "host_only", "host_loopback": True}),
        (["--host-loopback", "--subnet", "10.0.0.0/30"], {"host_loopback": True, "subnet": "10.0.0.0/30"}),
    ],
)
def test_the_command_line_and_the_constructor_refuse_the_same(
    words: list[str], settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["run", *words, "--", "true"], capsys)
    with pytest.raises(ConfigError) as caught:
        NatConfig(**settings)  # type: ignore[arg-type]
    # Both end with the same advice, in which the constructor quotes values.
    ends = [text.translate(str.maketrans("", "", "'`."))[-8:] for text in (line, str(caught.value))]
    assert ends[0][-3:] == ends[1][-3:]


def test_mac_reads_what_it_writes() -> None:
    address = arguments.random_mac()
    assert arguments.mac(arguments.format_mac(address)) == address
    assert address[0] == 2
    with pytest.raises(ConfigError):
        arguments.mac("00:00:00:00:00:00")


def test_starting_imports_little() -> None:
    """The budget of `guestnet run -- true` is 0.4 s: these would take a good part of it."""
    code = "import sys, guestnet.cli.commands.run, guestnet._linux.namespace; print(*sys.modules)"
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
        (MemoryError(), "ulimit -v"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "at '/x' (No space left on device)"),
    ],
)
def test_what_the_system_has_no_more_of(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.failure(error) == cli.EXIT_FAILED
    assert words in capsys.readouterr().err
