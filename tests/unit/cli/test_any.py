"""Whatever is written on a command line, it is understood or refused in one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from guestnet import cli
from guestnet.cli import UsageError, arguments
from guestnet.cli.commands import run, up, vm
from guestnet.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="0123456789.:/-[]=,abcdxtu *", max_size=30),
    st.from_regex(r"[0-9.]{1,15}/[0-9]{1,3}"),
    st.from_regex(r"[0-9a-f:.\[\]]{0,20}:?[0-9]{1,6}(-[0-9]{1,6})?:([a-z]{1,4}:)?[0-9]{1,6}(/(tcp|udp|x))?"),
)
QEMU = st.one_of(TEXT, st.sampled_from(["-m", "-M", "-machine", "-device", "-netdev", "-nic", "-numa"]))
OPTIONS = st.one_of(TEXT, st.sampled_from(["--", "-p", "--mtu", "--subnet", "-q", "--pcap"]))
READERS = [
    arguments.subnet,
    arguments.mtu,
    arguments.dns_record,
    arguments.mac,
    arguments.hostname,
    arguments.publication,
    up.lease,
]


def refusal(call: Callable[[], object]) -> str | None:
    try:
        call()
    except (UsageError, ConfigError) as error:
        return str(error)
    except SystemExit as ended:
        # Only --help ends it.
        return None if ended.code == 0 else "no sentence"
    return None


@pytest.mark.parametrize("read", READERS)
@given(text=TEXT)
def test_values(read: Callable[[str], object], text: str) -> None:
    said = refusal(lambda: read(text))
    assert said is None or (
        said.endswith(".") and (len(said.splitlines()) == 1 or len(text.splitlines()) > 1)
    )


@pytest.mark.parametrize("name", ["run", "vm", "up"])
@given(words=st.lists(OPTIONS, max_size=6))
def test_command_lines(name: str, words: list[str]) -> None:
    parser = {"run": run, "vm": vm, "up": up}[name].parser()
    if name == "up":
        said = refusal(lambda: parser.parse_args(words))
    else:
        said = refusal(lambda: arguments.parse_with_command(parser, words, "CMD"))
    # A question is what a misspelled option is answered with.
    assert said is None or said.endswith((".", "?"))


@given(words=st.lists(TEXT, min_size=1, max_size=3))
def test_commands(words: list[str]) -> None:
    if words[0] not in (*cli.COMMANDS, "-h", "--help", "help", "--version", "version"):
        assert cli.main(words) == cli.EXIT_USAGE


@given(command=st.lists(QEMU, min_size=1, max_size=8))
def test_qemu_commands(command: list[str]) -> None:
    with contextlib.suppress(UsageError):
        vm.own_mac(command)
        vm.other_network(command)
        assert len(vm.card_options(command, bytes(6), vhost_user=True)) in (0, 2)
        assert "-netdev" in vm.vhost_user_options(command, "/a,b")
