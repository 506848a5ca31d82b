"""What a wrong command line is answered with: the command, option or spelling that was probably meant."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from guestnet import cli
from guestnet.cli import UsageError, arguments
from guestnet.cli.commands import demo, doctor, join, nat, run, up, vm
from guestnet.errors import ConfigError


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("guestnet: ")
    assert line.endswith((".", "?"))
    return line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["rnu"], "did you mean `guestnet run`?"),
        (["RUN"], "did you mean `guestnet run`?"),
        (["VM"], "did you mean `guestnet vm`?"),
        (["dcotor"], "did you mean `guestnet doctor`?"),
        (["help", "dem"], "did you mean `guestnet demo`?"),
        (["sh", "-c", "true"], "write `guestnet run -- sh ...`"),
        (["./build.sh"], "write `guestnet run -- ./build.sh ...`"),
        (["qemu-system-x86_64"], "write `guestnet vm -- qemu-system-x86_64 ...`"),
        (["frobnicate"], "`guestnet --help` lists the commands"),
        (["--mtu", "1400", "run", "--", "true"], "write `guestnet run --mtu ...`"),
        (["-p", "8080:80", "vm", "--", "q"], "write `guestnet vm -p ...`"),
        (["-p", "8080:80", "--", "true"], "write `guestnet run -p ...`"),
        (["--stream=/tmp/x"], "write `guestnet up --stream ...`"),
        (["--hepl"], "did you mean --help?"),
        (["--verison"], "did you mean --version?"),
        (["-t", "8080"], "-p HOST_PORT:GUEST_PORT"),
        (["-Z"], "`guestnet --help` lists the commands"),
        (["run", "--publsh", "80:80", "--", "true"], "did you mean --publish?"),
        (["run", "--host_loopback", "--", "true"], "did you mean --host-loopback?"),
        (["run", "--sub", "10.0.0.0/24", "--", "true"], "did you mean --subnet?"),
        (["run", "-mtu", "1400", "--", "true"], "write --mtu, with two hyphens"),
        (["run", "-publish", "80:80", "--", "true"], "write --publish, with two hyphens"),
        (["run", "-pcap", "x", "--", "true"], "write --pcap, with two hyphens"),
        (["run", "--stream", "/tmp/x", "--", "true"], "belongs to `guestnet up`"),
        (["up", "--mac", "02:00:00:00:00:01"], "belongs to `guestnet vm`"),
        (["run", "--frobnicate", "--", "true"], "`guestnet run --help` lists the options"),
        (["up", "/tmp/net.sock"], "write --stream /tmp/net.sock"),
        (["doctor", "now"], "`guestnet doctor --help`"),
        (["run", "--mode", "hostonly", "true"], "did you mean host_only?"),
        (["run", "--mode", "host-only", "true"], "did you mean host_only?"),
        (["run", "--uplink", "x", "true"], "write sockets or tun"),
        (["run", "--network=none", "--", "true"], "write --mode host_only"),
        (["join", "lab"], "Say which namespace"),
        (["nat", "--external", "1.2.3.4", "--mapping", "none", "a", "b"], "write endpoint_independent, "),
    ],
)
def test_the_intended_option_is_suggested(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(argv, capsys)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("-t", "-p HOST_PORT:GUEST_PORT"),
        ("-u", "/udp"),
        ("-T", "--host-loopback"),
        ("--config-net", "leave it out"),
        ("-c", "leave it out"),
        ("-f", "leave it out"),
        ("-6", "IPv4 only"),
        ("-4", "IPv4 only"),
        ("--disable-host-loopback", "by default"),
        ("--net", "--mode host_only"),
        ("-it", "leave it out"),
        ("-d", "&"),
        ("--add-host=a:1.2.3.4", "--dns-record NAME=ADDRESS"),
        ("--cidr", "--subnet"),
        ("-e", "env NAME=VALUE"),
        ("-V", "guestnet --version"),
        ("-netdev", "guestnet vm -- qemu"),
        ("-listen-vfkit", "guestnet up --unixgram PATH"),
        ("--name", "--hostname NAME"),
    ],
)
def test_options_of_other_tools_lead_to_ours(
    option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(["run", option, "--", "true"], capsys)
    assert words in line
    assert repr(option.partition("=")[0]) in line


def test_a_hint_names_options_that_there_are() -> None:
    from guestnet.cli import hints

    known = {
        name for command in (run, vm, up, join, nat, demo, doctor) for name in command.parser().option_names()
    }
    known |= {"--version", "--help"}
    for hint in hints._PEERS.values():
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", hint.replace("-- ", ""))) <= known, hint
    # What a command has itself needs no hint there, and must not get one.
    for command in (run, vm, up, join):
        for name in command.parser().option_names():
            if name in hints._PEERS:
                assert name in ("-h", "--help", "--name", "--pid"), name


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("hostfwd=tcp::8080-:80", "write 8080:80."),
        ("tcp::8080-:80", "write 8080:80."),
        ("udp:127.0.0.1:53-10.0.2.15:5353", "write 127.0.0.1:53:5353/udp."),
        ("tcp:8080:80", "write 8080:80."),
        ("8080:80:udp", "write 8080:80/udp."),
        ("8080->80", "write 8080:80."),
        ("8080=80", "write 8080:80."),
        ("8080,80", "write 8080:80."),
        ("8080 80", "write 8080:80."),
        ("8080:localhost:80", "write 8080:80."),
        ("127.0.0.1:8080", "write 127.0.0.1:8080:8080, with the guest's port too."),
        ("8000-8010", "write 8000-8010:8000-8010"),
        ("::1:8080:80", "[::1]:8080:80"),
    ],
)
def test_a_published_port_in_another_grammar(text: str, instead: str) -> None:
    with pytest.raises((UsageError, ConfigError)) as caught:
        arguments.publication(text)
    assert instead in str(caught.value)
    for proposed in re.findall(r"write ([\d.:]+\d(?:/udp)?)(?=[.,])", str(caught.value)):
        arguments.publication(proposed)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "such as /tmp/net.sock"),
        ("-", "such as /tmp/net.sock"),
        ("unix:///tmp/x.sock", "write the path alone: /tmp/x.sock"),
        ("unix:/tmp/x.sock", "write the path alone: /tmp/x.sock"),
        ("unixgram:///tmp/x.sock", "write the path alone: /tmp/x.sock"),
        ("UNIX-LISTEN:/tmp/x.sock,fork", "write the path alone: /tmp/x.sock"),
        ("tcp:127.0.0.1:1234", "unix sockets only"),
        ("tcp://127.0.0.1:1234", "unix sockets only"),
        ("vsock://:1024", "unix sockets only"),
        ("fd:3", "unix sockets only"),
        ("c:x", "write ./c:x"),
        ("/tmp", "is a directory"),
        ("/tmp/", "is a directory"),
        ("/nowhere/at/all", "make it first"),
        ("/tmp/" + "x" * 200, "107"),
    ],
)
@pytest.mark.parametrize("option", ["--stream", "--dgram", "--unixgram", "--vhost-user"])
def test_a_socket_that_is_no_path(
    option: str, path: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(["up", option, path], capsys)


_LEAKS = re.compile(
    r"argument\b(?!s)|invalid|expected|explicit|unrecognized|required|Errno|os error|Traceback|object|None\b|"
    r"Unexpected|<|codec|literal|integer string",
    re.IGNORECASE,
)
_VALUES = [
    "",
    " ",
    "-1",
    "-x",
    "x",
    "0",
    "nan",
    "9" * 5000,
    "\u0661",
    "a\0b",
    "x" * 5000,
    "1.5",
    "::",
    "*",
    "é",
]


@pytest.mark.parametrize("module", [run, vm, up, nat, demo, doctor])
def test_no_value_of_any_option_brings_out_words_of_python(module: object) -> None:
    names = module.parser().option_names()  # type: ignore[attr-defined]
    assert len(names) > 1
    for name in names:
        for words in ([name], *([f"{name}={value}"] for value in _VALUES), *([name, v] for v in _VALUES)):
            said = ""
            try:
                module.parser().parse_args(words)  # type: ignore[attr-defined]
            except (UsageError, ConfigError) as error:
                said = str(error)
            except SystemExit:
                continue  # --help
            assert said == "" or said.endswith((".", "?")), (words, said)
            for value in _VALUES:
                said = said.replace(repr(value), "") if len(value) > 2 else said
            assert not _LEAKS.search(said), (words, said)


def test_a_bare_command_prints_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(command in captured.err for command in cli.COMMANDS)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["help", command])
    assert caught.value.code == 0
    assert f"usage: guestnet {command}" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["-V", "--version", "version"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 0
    assert capsys.readouterr().out.startswith("guestnet ")


def test_a_very_long_value_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["run", "--mtu", "9" * 100_000, "true"], capsys)
    assert len(line) < 1100
    assert line.endswith("write 1500.")


def test_hints_are_imported_for_errors_alone() -> None:
    code = """
import sys
from guestnet.cli import arguments
from guestnet.cli.commands import run
words = ["-p", "8080:80", "-p", "127.0.0.1::80", "--mode", "nat", "true"]
arguments.parse_with_command(run.parser(), words, "CMD")
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"guestnet.cli.hints", "difflib", "guestnet.cli.runner.monitor"} & set(done.stdout.split())
