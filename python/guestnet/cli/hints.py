"""What a wrong command line probably meant. Imported only when an error is about to be printed.

Three sources, in this order: options of similar tools that have a guestnet equivalent, options of other
guestnet commands, and options or commands that are spelled similarly.
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Iterable, Sequence

from guestnet.cli import COMMANDS, UsageError

_NOT_NEEDED = "leave it out"

# Keyed by option; several spellings share one hint. What pasta, passt, slirp4netns, gvproxy, QEMU, Docker,
# podman, unshare, ssh and tcpdump call it.
_PEERS: dict[str, str] = {}
for _names, _hint in (
    ("-t --tcp-ports --expose -L", "write -p HOST_PORT:GUEST_PORT"),
    ("-u --udp-ports", "write -p HOST_PORT:GUEST_PORT/udp"),
    ("-P --publish-all", "write -p HOST_PORT:GUEST_PORT for each port"),
    ("-T --tcp-ns -U --udp-ns --map-gw", "write --host-loopback, and use the name host.guestnet.internal"),
    ("--map-host-loopback", "write --host-loopback, and use the name host.guestnet.internal"),
    (
        "--no-map-gw --disable-host-loopback",
        f"guests do not reach the host's loopback by default: {_NOT_NEEDED}",
    ),
    ("--config-net -c --configure", f"`guestnet run` always configures the interface: {_NOT_NEEDED}"),
    ("-f --foreground", f"guestnet stays in the foreground: {_NOT_NEEDED}"),
    (
        "-d --detach --daemon --daemonize --background",
        "guestnet stays in the foreground: end the line with &",
    ),
    ("--debug --trace", "write -v"),
    (
        "-4 --ipv4-only -6 --ipv6-only --enable-ipv6",
        f"guests have IPv4 only, and no option changes that: {_NOT_NEEDED}",
    ),
    (
        "-a --address -g --gateway -n --netmask --cidr --ip",
        "write --subnet 192.168.64.0/24: the gateway is its first address",
    ),
    ("-m", "write --mtu BYTES"),
    ("-D --dns-forward --dns-server", "write --dns ADDRESS"),
    ("-S --dns-search --search-domain", "write --search DOMAIN"),
    ("--add-host --dns-host", "write --dns-record NAME=ADDRESS"),
    (
        "--macaddress --mac-address --mac-addr --ns-mac-addr",
        "write --mac MAC with `guestnet vm`, or --lease MAC=ADDRESS with `guestnet up`",
    ),
    ("-s --socket --socket-path --listen --listen-qemu -listen-qemu", "write `guestnet up --stream PATH`"),
    ("--listen-vfkit -listen-vfkit", "write `guestnet up --unixgram PATH`"),
    ("--listen-bess -listen-bess", "write `guestnet up --dgram PATH`"),
    ("--ssh-port -ssh-port", "write -p 2222:vm1:22"),
    ("-r", "write --ready-fd FD with `guestnet up`"),
    ("-l --log-file", "messages go to stderr: write 2>FILE"),
    ("-w", "write --pcap FILE"),
    ("-netdev --netdev -nic --nic", "write it behind `guestnet vm -- qemu-system-x86_64`"),
    ("--net", "write --mode host_only to cut guests off, or leave it out"),
    ("--name", "write --hostname NAME with `guestnet run` or `guestnet vm`"),
    (
        "--rm -i --interactive -it --tty",
        f"the command has this terminal and leaves nothing behind: {_NOT_NEEDED}",
    ),
    ("-e --env", "the command has this environment: write `-- env NAME=VALUE CMD`"),
    ("-h", "write --help"),
    ("-V --version", "write `guestnet --version`"),
    ("--port --ports --forward --hostfwd", "write -p HOST_PORT:GUEST_PORT"),
    ("--capture --dump", "write --pcap FILE"),
    ("--silent", "write --quiet"),
):
    _PEERS.update(dict.fromkeys(_names.split(), _hint))


def unknown_command(word: str, rest: Sequence[str]) -> UsageError:
    """The error for a first word that is no command."""
    if word.startswith("-"):
        return _option_first([word, *rest])
    if close := _closest(word.lower(), COMMANDS, cutoff=0.6):
        return UsageError(f"There is no command {word!r}: did you mean `guestnet {close}`?")
    if re.match(r"qemu(-|$)", word):
        return UsageError(f"{word!r} is not a guestnet command: write `guestnet vm -- {word} ...`.")
    if "/" in word or shutil.which(word):
        return UsageError(f"{word!r} is not a guestnet command: write `guestnet run -- {word} ...`.")
    return UsageError(f"There is no command {word!r}: `guestnet --help` lists the commands.")


def _option_first(words: list[str]) -> UsageError:
    """Options stand before the command's name, or there is none."""
    known = _options_of_all()
    name = words[0].partition("=")[0]
    before = words[: words.index("--")] if "--" in words else words
    command = next((word for word in before if word in COMMANDS), None)
    if command is not None:
        return UsageError(f"Options follow the command: write `guestnet {command} {name} ...`.")
    if name in known:
        return UsageError(f"{name} needs a command before it: write `guestnet {known[name][0]} {name} ...`.")
    if close := _closest(name, [*known, "--help", "--version"]):
        return UsageError(f"There is no option {name!r}: did you mean {close}?")
    if name in _PEERS:
        return UsageError(f"guestnet has no option {name!r}: {_PEERS[name]}.")
    return UsageError(f"There is no option {name!r}: `guestnet --help` lists the commands.")


def unknown_option(word: str, command: str, known: Iterable[str]) -> UsageError:
    """The error for an option that `command` does not have. `known` are its option strings."""
    options = list(known)
    name = word.partition("=")[0]
    if name in _PEERS:
        hint = _PEERS[name].removesuffix(f" with `guestnet {command}`")
        return UsageError(f"`guestnet {command}` has no option {name!r}: {hint}.")
    if re.match(r"-\w{2,}$", name) and f"-{name}" in options:
        return UsageError(f"There is no option {name!r}: write -{name}, with two hyphens.")
    elsewhere = _options_of_all().get(name, [])
    if elsewhere:
        return UsageError(
            f"{name} belongs to `guestnet {elsewhere[0]}`: leave it out of `guestnet {command}`."
        )
    if close := _closest(name.replace("_", "-"), options):
        return UsageError(f"There is no option {name!r}: did you mean {close}?")
    return UsageError(f"There is no option {name!r}: `guestnet {command} --help` lists the options.")


def closest(word: str, known: Iterable[str]) -> str:
    """`: did you mean X?` or a sentence's end that lists what there is."""
    names = list(known)
    if close := _closest(word.lower().replace("-", "_"), names):
        return f": did you mean {close}?"
    return f": write {', '.join(names[:-1])} or {names[-1]}."


def publication(text: str) -> str | None:
    """What to write instead of a published port in another tool's grammar; None for an unknown one."""
    if re.fullmatch(r"(ublish|cap|cp|olling|id-file)", text):
        return f"write --p{text}, with two hyphens"
    forms = (
        # QEMU: hostfwd=tcp:HOST_IP:PORT-GUEST_IP:PORT
        r"(?:hostfwd=)?(?:(?P<proto>tcp|udp):)?(?P<ip>[\d.]*):(?P<host>\d+)-[\d.]*:(?P<guest>\d+)",
        # tcp:8080:80, tcp/8080:80, 8080:80:udp, 8080:80/TCP with a blank
        r"(?P<proto>tcp|udp)[:/](?:(?P<ip>[\d.]+):)?(?P<host>\d+):(?P<guest>\d+)",
        r"(?:(?P<ip>[\d.]+):)?(?P<host>\d+):(?P<guest>\d+)[: ](?P<proto>tcp|udp)",
        # 8080->80, 8080=80, 8080,80, 8080 80, 8080/80
        r"(?:(?P<ip>[\d.]+):)?(?P<host>\d+)(?:->|=>|=|,|/|\s+|\s*->\s*)(?P<guest>\d+)(?:/(?P<proto>tcp|udp))?",
        # ssh -L 8080:localhost:80
        r"(?P<host>\d+):(?:localhost|127\.0\.0\.1):(?P<guest>\d+)(?:/(?P<proto>tcp|udp))?",
    )
    if found := re.fullmatch(r"(?P<ip>[\d.]+\.[\d.]+|localhost):(?P<port>\d+)(?P<proto>/\w+)?", text):
        ip, port, proto = found["ip"], found["port"], found["proto"] or ""
        return f"write {ip}:{port}:{port}{proto}, with the guest's port too"
    for form in forms:
        if found := re.fullmatch(form, text.strip(), re.IGNORECASE):
            parts = found.groupdict()
            where = f"{parts['ip']}:" if parts.get("ip") else ""
            proto = "/udp" if (parts.get("proto") or "").lower() == "udp" else ""
            return f"write {where}{parts['host']}:{parts['guest']}{proto}"
    return None


def socket_path(text: str) -> str | None:
    """What to write instead of an address that is no path; None for a path."""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text):
        return None
    kind, _, rest = text.partition(":")
    if kind.lower() in ("unix", "unixgram", "unix-connect", "unix-listen", "file"):
        path = rest[2:] if rest.startswith("//") else rest
        path = path.split(",", maxsplit=1)[0]
        return (
            f"write the path alone: {path}" if path else "write the path of a socket, such as /tmp/net.sock"
        )
    if rest.startswith("//") or re.match(r"(tcp|udp|fd|vsock|inet|ssh|http|https)$", kind.lower()):
        return "guests attach to unix sockets only, write a path such as /tmp/net.sock"
    return f"it looks like an address, write ./{text} if it is a file name"


def _closest(word: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The one that is spelled most like `word`, if any is close."""
    names = list(known)
    stem = word.lstrip("-")
    if word in names:
        return word
    begins = [name for name in names if len(stem) >= 3 and name.lstrip("-").startswith(stem)]
    if len(begins) == 1:
        return begins[0]
    if len(stem) < 3:
        return None
    found = difflib.get_close_matches(word, [name for name in names if len(name) > 2], n=1, cutoff=cutoff)
    return found[0] if found else None


def _options_of_all() -> dict[str, list[str]]:
    """Every option, with the commands that have it."""
    from importlib import import_module

    found: dict[str, list[str]] = {}
    for command in COMMANDS:
        parser = import_module(f"guestnet.cli.commands.{command}").parser()
        for option in parser.option_names():
            if option not in ("-h", "--help"):
                found.setdefault(option, []).append(command)
    return found
