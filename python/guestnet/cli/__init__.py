"""The command `guestnet`: which subcommand is meant, and how errors and exit statuses reach the caller.

A subcommand's module is imported when it is the one that was asked for, so that `guestnet run` does not pay
for what `demo` needs. argparse and not typer: reading the same options takes 10 ms with the one and 120 ms
with the other (measured with -X importtime and time(1), interpreter included); `guestnet run -- true` takes
55 ms in all.

Exit statuses: the command's own for `run` and `vm` (128 + signal when one ended it), 2 for wrong usage, 125
when guestnet failed, 126 when the command cannot be executed, 127 when there is no such command; 1 from
`doctor` and `demo` when something they looked at is not right.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import re
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from guestnet.cli.terminal import OutputError, answer, complain, say

EXIT_OK = 0
EXIT_PROBLEM = 1
EXIT_USAGE = 2
EXIT_FAILED = 125

COMMANDS = {
    "run": "run a command in a namespace whose only way out is guestnet",
    "vm": "run QEMU with a network card attached to guestnet",
    "up": "run a network that guests attach to by sockets",
    "join": "connect an existing network namespace",
    "policy": "say what a policy allows, and show its rules",
    "nat": "translate a capture as a NAT would have done",
    "demo": "show guestnet at work",
    "doctor": "report what this system supports and how to get the rest",
}

_HELP = """usage: guestnet COMMAND [OPTIONS]
       guestnet run [OPTIONS] -- PROGRAM [ARGS...]

The network for guests that nobody trusts: address, names, NAT and published ports for programs and virtual
machines, without root.

commands:
{commands}

options:
  -h, --help     show this help; `guestnet help COMMAND` shows the help of a command
  -V, --version  show the version

example:
  guestnet run -p 8080:80 -- python3 -m http.server 80
"""


_STARTING_OBJECTS = 200_000
_USUAL_THRESHOLDS = gc.get_threshold()


class UsageError(Exception):
    """The command line is wrong: one sentence that says what to write instead."""


def version() -> str:
    """The version, as it was built: asking for that of the installed package takes 16 ms."""
    from guestnet import __version__

    return str(__version__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    _hold_standard_descriptors()
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        complain(str(error))
        return EXIT_USAGE
    except BrokenPipeError:
        # The reader of our output is gone (`guestnet doctor | head -1`): there is nothing to report.
        _close_stdout()
        return EXIT_FAILED
    except OutputError as error:
        complain(str(error))
        _close_stdout()
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        status = failure(error)
    return int(status)


def entry_point() -> NoReturn:
    """The console script: runs the command line and ends the process with the exit status.

    It leaves by `os._exit` after the exit handlers ran and the streams were flushed. Tearing down the
    interpreter takes some 9 ms of `guestnet run -- true`, and frees nothing that the kernel does not free.
    If a thread still runs, the interpreter ends as usual and waits for it.

    Imports make many objects and no garbage, so the garbage collector waits until `settled`, or until there
    are very many objects.
    """
    gc.set_threshold(_STARTING_OBJECTS)
    status = main()
    if threading.active_count() > 1:
        sys.exit(status)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:  # an exit handler failed, which Python has reported, or the output cannot be written
        status = status or EXIT_FAILED
    os._exit(status & 0xFF)


def settled() -> None:
    """The command has started what it serves. What exists now stays, so the garbage collector need not look
    at it again, and from here on collects as usual."""
    if gc.get_threshold()[0] == _STARTING_OBJECTS:
        gc.freeze()
        gc.set_threshold(*_USUAL_THRESHOLDS)


def _close_stdout() -> None:
    """Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _hold_standard_descriptors() -> None:
    """Where the shell closed one of them (`<&-`), no file of ours may take its number: what is meant for
    stderr would be written to it. A command still finds it closed, as the shell left it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # Python has no stream for a descriptor that was closed when it started.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        say(_help_text().rstrip())
        return EXIT_USAGE
    name, rest = arguments[0], arguments[1:]
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("-h", "--help", "help"):
        answer(_help_text())
        return EXIT_OK
    if name in ("-V", "--version", "version"):
        answer(f"guestnet {version()}\n")
        return EXIT_OK
    if name not in COMMANDS:
        from guestnet.cli.hints import unknown_command

        raise unknown_command(name, rest)
    return int(import_module(f"guestnet.cli.commands.{name}").main(rest))


def _help_text() -> str:
    return _HELP.format(commands="\n".join(f"  {command:<14} {about}" for command, about in COMMANDS.items()))


def failure(error: Exception) -> int:
    """Says what failed in one sentence; returns the exit status that tells it to a script."""
    from guestnet.errors import ConfigError, GuestnetError

    if os.environ.get("GUESTNET_DEBUG"):
        import traceback

        traceback.print_exception(error)
    status = EXIT_USAGE if isinstance(error, ConfigError) else getattr(error, "exit_status", EXIT_FAILED)
    complain(_as_options(str(error)) if isinstance(error, GuestnetError) else _system_failure(error))
    return int(status)


def _system_failure(error: Exception) -> str:
    """What an error that is not guestnet's own means, where that is known."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return "Too many files are open: raise the limit (`ulimit -n`)."
    if number == errno.EAGAIN or _no_thread(error):
        return "No more processes or threads can be started: end some, or raise the limit (`ulimit -u`)."
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return "There is not enough memory: free some, or raise the limit (`ulimit -v`)."
    if isinstance(error, OSError) and error.strerror:
        where = f" at {error.filename!r}" if error.filename else ""
        return f"The system refused something{where} ({error.strerror}): set GUESTNET_DEBUG=1 to see what."
    text = str(error) or type(error).__name__
    return f"Unexpected {type(error).__name__}: {text}; set GUESTNET_DEBUG=1 and run it again to see where."


_SAME = (
    "mode",
    "uplink",
    "external",
    "forwarding",
    "masquerade",
    "bridge",
    "workers",
    "subnet",
    "search",
    "source",
    "proxy",
)
_OPTIONS = {name: f"--{name}" for name in _SAME} | {
    "host_loopback": "--host-loopback",
    "pcp_ports": "--pcp",
    "pcp_address": "--pcp address",
    "capture": "--pcap",
    "resolvers": "--dns",
    "dns_records": "--dns-record",
    "static_leases": "--lease",
    "subnet6": "--prefix",
}
"""Settings of NatConfig that the command line has too."""


def _as_options(text: str) -> str:
    """Settings of the configuration, which its messages name in backquotes, as command-line options."""

    def option(match: re.Match[str]) -> str:
        name = _OPTIONS.get(match[1])
        return match[0] if name is None else name + (f" {match[2]}" if match[2] else "")

    return re.sub(r"`([a-z_]+6?)(?:='?(\w+)'?)?`", option, text)


def _no_thread(error: Exception) -> bool:
    """Python has no type for it."""
    return isinstance(error, RuntimeError) and "start new thread" in str(error)
