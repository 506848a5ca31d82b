#!/usr/bin/env python3
"""check_dist.py DIR: tries the wheel and the source distribution in DIR, each in an environment of its own.

It checks that the metadata is complete, and that the description has no link that works only in the
repository. The package must install with nothing but pip (and cargo, for the source distribution). The
installed command and library must work without the checkout.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

REQUIRED = ("Name", "Version", "Summary", "Requires-Python", "License-Expression", "Description-Content-Type")
USE = """
from guestnet import NatConfig, NatNetwork, __version__
with NatNetwork(NatConfig(dns_records={"api.example": "192.0.2.7"})) as network:
    vm = network.create_endpoint("vm1")
    print(__version__, vm.ip)
"""


class Wrong(Exception):
    """Something about a distribution is not right."""


def check_metadata(text: str, origin: str) -> Message:
    """The fields that an index shows, and a description that it can show."""
    metadata = Parser().parsestr(text)
    missing = [name for name in REQUIRED if not metadata.get(name)]
    if missing:
        raise Wrong(f"{origin}: no {', '.join(missing)} in the metadata")
    for name in ("License-File", "Classifier", "Keywords", "Requires-Dist"):
        if not metadata.get_all(name):
            raise Wrong(f"{origin}: no {name} in the metadata")
    if metadata["Description-Content-Type"].split(";")[0] != "text/markdown":
        raise Wrong(f"{origin}: the description is not said to be Markdown")
    description = metadata.get_payload() or metadata.get("Description")
    if not isinstance(description, str) or "# guestnet" not in description:
        raise Wrong(f"{origin}: the description is not the README")
    if links := relative_links(description):
        raise Wrong(f"{origin}: the description links to {', '.join(links)}, which only the repository has")
    return metadata


def relative_links(markdown: str) -> list[str]:
    """Targets of links and pictures that are not absolute, outside of code."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    found += re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", text)
    found += re.findall(r"^\s*\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    return [target for target in found if not re.match(r"(https?://|mailto:|#)", target)]


def wheel_metadata(wheel: Path) -> Message:
    """Checks what is in the wheel; gives its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for wanted in ("guestnet/__init__.py", "guestnet/py.typed", "guestnet/_native.pyi"):
            if wanted not in names:
                raise Wrong(f"{wheel.name}: no {wanted}")
        if not any(re.fullmatch(r"guestnet/_native\S*\.so", name) for name in names):
            raise Wrong(f"{wheel.name}: no compiled module")
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        return check_metadata(archive.read(metadata).decode(), wheel.name)


def sdist_metadata(sdist: Path) -> Message:
    """Checks what is in the source distribution; gives its metadata."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        for wanted in (
            "Cargo.lock",
            "LICENSE-MIT",
            "LICENSE-APACHE",
            "README.md",
            "CHANGELOG.md",
            "docs/tutorial.md",
        ):
            if wanted not in names:
                raise Wrong(f"{sdist.name}: no {wanted}")
        built = [
            name for name in names if name.startswith(("target/", ".venv/")) or name.endswith((".so", ".pyc"))
        ]
        if built:
            raise Wrong(f"{sdist.name}: {built[0]} is not a source")
        (metadata,) = (member for member in archive if re.fullmatch(r"[^/]+/PKG-INFO", member.name))
        file = archive.extractfile(metadata)
        assert file is not None
        return check_metadata(file.read().decode(), sdist.name)


def try_it(distribution: Path, version: str) -> None:
    """Installs it into a new environment and uses it from a directory that has nothing of ours."""
    with tempfile.TemporaryDirectory(prefix="guestnet-dist-") as directory:
        venv = Path(directory) / "venv"
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

        def run(*words: str) -> str:
            done = subprocess.run(
                words,
                cwd=directory,
                env=environment,
                text=True,
                check=False,
                capture_output=True,
                timeout=1800,
            )
            if done.returncode:
                raise Wrong(
                    f"{distribution.name}: {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
                )
            return done.stdout

        run(sys.executable, "-m", "venv", str(venv))
        python, guestnet = str(venv / "bin" / "python"), str(venv / "bin" / "guestnet")
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(distribution))
        run(python, "-m", "pip", "check", "--disable-pip-version-check")
        for command in ([guestnet, "--version"], [python, "-m", "guestnet", "--version"]):
            if run(*command).split() != ["guestnet", version]:
                raise Wrong(f"{distribution.name}: {' '.join(command)} does not say {version}")
        if run(python, "-W", "error", "-c", USE).split() != [version, "192.168.64.2"]:
            raise Wrong(f"{distribution.name}: the library does not work")
        report = subprocess.run(
            [guestnet, "doctor", "--json"], cwd=directory, capture_output=True, check=False
        )
        if json.loads(report.stdout)["run_works"]:
            if (
                run(guestnet, "run", "--mode", "host_only", "--", "echo", "from the guest")
                != "from the guest\n"
            ):
                raise Wrong(f"{distribution.name}: guestnet run does not work")
        else:
            print(f"{distribution.name}: guestnet run cannot work on this system and was not tried")


def main() -> int:
    folder = Path(sys.argv[1])
    try:
        (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    except ValueError:
        print(
            f"{folder} does not hold one wheel and one source distribution: run `make dist`", file=sys.stderr
        )
        return 1
    try:
        metadata = wheel_metadata(wheel)
        if sdist_metadata(sdist)["Version"] != metadata["Version"]:
            raise Wrong("the wheel and the source distribution have different versions")
        for distribution in (wheel, sdist):
            try_it(distribution.resolve(), metadata["Version"])
            print(f"{distribution.name}: installs and works")
    except Wrong as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
