"""The command `guestnet`: which subcommand is meant, and how errors and exit statuses reach the caller.

A subcommand's module is imported when it is the one that was asked for, so that `guestnet run` does not pay
for what `demo` needs. argparse and not typer: reading the same options takes 10 ms with the one and 120 ms
with the other (measured with -X importtime and time(1), interpreter included), of the 400 ms that `guestnet
run -- true` may take in all.

Exit statuses: the command's own for `run` and `vm` (128 + signal when one ended it), 2 for wrong usage, 125
when guestnet failed, 126 when the command cannot be executed, 127 when there is no such command; 1 from
`doctor` and `demo` when something they looked at is not right.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from guestnet.cli.terminal import OutputError, answer, complain

EXIT_OK = 0
EXIT_PROBLEM = 1
EXIT_USAGE = 2
EXIT_FAILED = 125

COMMANDS = {
    "run": "run a command in a namespace whose only way out is guestnet",
    "vm": "run QEMU with a network card attached to guestnet",
    "up": "run a network that guests attach to by sockets",
    "nat": "translate a capture as a NAT would have done",
    "demo": "see guestnet at work, with nothing but itself",
    "doctor": "see what this system supports and how to get the rest",
}

_HELP = """usage: guestnet COMMAND [OPTIONS]

The network for guests that nobody trusts: address, names, NAT and published ports for programs and virtual
machines. No root.

commands:
{commands}

options:
  -h, --help     show this help; `guestnet COMMAND --help` shows a command's own
  --version      show the version

example:
  guestnet run -p 8080:80 -- python3 -m http.server 80
"""


class UsageError(Exception):
    """The command line is wrong: one sentence that says what to write instead."""


def version() -> str:
    """The version of the installed package."""
    from importlib import metadata

    try:
        return metadata.version("guestnet")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    _hold_standard_descriptors()
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        complain(str(error))
        return EXIT_USAGE
    except BrokenPipeError:
        # The reader of our output has gone (`guestnet doctor | head -1`): nothing to say, and to nobody.
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
        raise UsageError("Say what to do: `guestnet --help` lists the commands.")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        lines = "\n".join(f"  {command:<14} {about}" for command, about in COMMANDS.items())
        answer(_HELP.format(commands=lines))
        return EXIT_OK
    if name in ("--version", "version"):
        answer(f"guestnet {version()}\n")
        return EXIT_OK
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(f"There is no {kind} {name!r}: `guestnet --help` lists the commands.")
    return int(import_module(f"guestnet.cli.{name}").main(rest))


def failure(error: Exception) -> int:
    """Says what failed in one sentence; returns the exit status that tells it to a script."""
    from guestnet.errors import ConfigError, GuestnetError

    if os.environ.get("GUESTNET_DEBUG"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, ConfigError):
        complain(str(error))
        return EXIT_USAGE
    if isinstance(error, GuestnetError):
        complain(str(error))
        return int(getattr(error, "exit_status", EXIT_FAILED))
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        complain("Too many files are open: raise the limit (`ulimit -n`).")
        return EXIT_FAILED
    if (isinstance(error, OSError) and error.errno == errno.EAGAIN) or _no_thread(error):
        complain("No more processes or threads can be started: end some, or raise the limit (`ulimit -u`).")
        return EXIT_FAILED
    text = str(error) or type(error).__name__
    complain(
        f"Unexpected {type(error).__name__}: {text}; set GUESTNET_DEBUG=1 and run it again to see where."
    )
    return EXIT_FAILED


def _no_thread(error: Exception) -> bool:
    """Python has no type for it."""
    return isinstance(error, RuntimeError) and "start new thread" in str(error)
