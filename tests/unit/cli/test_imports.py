"""What a command imports: most of the time that `guestnet run -- true` takes.

CONTRIBUTING.md says how a module is imported only where it is used.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

_HEAVY = (
    # of Python: 0.5 to 30 ms each
    *("ast", "argcomplete", "bz2", "csv", "dataclasses", "datetime", "decimal", "difflib", "dis", "email"),
    *("hashlib", "hmac", "html", "http", "importlib.metadata", "importlib.resources", "importlib.util"),
    *("inspect", "json", "linecache", "lzma", "multiprocessing", "numbers", "optparse", "pathlib", "pickle"),
    *("platform", "pprint", "queue", "random", "secrets", "shutil", "sqlite3", "ssl", "statistics"),
    *("tempfile", "textwrap", "tokenize", "tomllib", "typing_extensions", "urllib", "uuid", "xml", "zipfile"),
    *("asyncio.sslproto", "asyncio.staggered"),
    # of others
    *("dns", "pydantic", "rich", "tomli_w", "typer", "yaml"),
    # of guestnet: what other commands, other options and guests that ask for something need
    *("guestnet.cli.checks", "guestnet.cli.demo", "guestnet.cli.hints", "guestnet.cli.report"),
    *("guestnet.cli.runner.event_log", "guestnet.cli.runner.joined", "guestnet.cli.runner.monitor"),
    *("guestnet.cli.runner.network_client", "guestnet.cli.runner.pinned"),
    *("guestnet.cli.runner.policy_file", "guestnet.datapath", "guestnet.model.network_spec"),
    *("guestnet.model.network_state", "guestnet.model.spec_diff", "guestnet.nat", "guestnet.policy"),
    *("guestnet.runtime.joining", "guestnet.runtime.policy.audit", "guestnet.runtime.policy.explain"),
    *("guestnet.runtime.policy.learning", "guestnet.runtime.services.pcp_ports"),
    *("guestnet.runtime.tun_uplink", "guestnet.services.dhcp", "guestnet.services.pcp", "guestnet.testing"),
    *("guestnet._linux.in_force", "guestnet._linux.join_namespace", "guestnet._linux.masquerade"),
    *("guestnet._linux.segment", "guestnet._linux.tun"),
)

_REPORT = """
from guestnet.cli.runner.late_modules import LateModule
print(*(name for name, module in sys.modules.items() if not isinstance(module, LateModule)))
"""

_RUN = """
import sys
from importlib import import_module
from guestnet.cli import arguments
run = import_module("guestnet.cli.commands.run")
options, command = arguments.parse_with_command(run.parser(), ["--", "true"], "CMD")
arguments.settle(options, command=True)
import guestnet._linux.links, guestnet._linux.namespace
from guestnet.cli.runner import confined, session
confined.begin = lambda *_, **__: None  # with root's rights it imports what root may not read later
session.import_asyncio()
from guestnet.runtime.services import service_host
service_host._IDLE_SECONDS = 3600.0  # this process may be slow
mac = arguments.random_mac()
with session.network_of_one(options, mac, lambda network: network.attach(session.ENDPOINT, "memory")):
    pass
"""


def _imported(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", program + _REPORT], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.splitlines()[-1].split())


def _without_start(program: str) -> set[str]:
    """Without what this interpreter imports at its start, such as `.pth` files of its environment."""
    return _imported(program) - _imported("import sys\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="`guestnet run` needs Linux")
def test_run_imports_only_what_it_uses() -> None:
    imported = _without_start(_RUN)
    assert {"asyncio", "guestnet.runtime.network", "guestnet.services.dns.server"} <= imported
    heavy = {one for one in imported if any(one == name or one.startswith(f"{name}.") for name in _HEAVY)}
    assert not heavy, f"import these where they are used (CONTRIBUTING.md): {sorted(heavy)}"


@pytest.mark.parametrize("words", [["--version"], ["--help"], []])
def test_the_version_and_the_help_import_next_to_nothing(words: list[str]) -> None:
    program = f"import sys\nfrom guestnet import cli\ncli.main({words!r})\n"
    imported = {one.partition(".")[0] for one in _without_start(program)}
    assert not imported & {"argparse", "asyncio", "ctypes", "email", "inspect", "ipaddress", "json", "socket"}


def test_a_guest_of_a_network_that_runs_costs_no_network() -> None:
    """`guestnet join NETWORK` and `guestnet run --network` import no part of a network."""
    program = """
import sys
from guestnet.cli import main
for words in (["join", "nothing", "--pid", "1"], ["run", "--network", "nothing", "--", "true"]):
    main(words)
"""
    imported = _without_start(program)
    assert "guestnet.cli.runner.network_client" in imported
    unwanted = {
        "asyncio",
        "logging",
        "guestnet.runtime.network",
        "guestnet.runtime.session",
        "inspect",
        "dataclasses",
    }
    assert not imported & unwanted
