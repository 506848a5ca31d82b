#!/usr/bin/env python3
"""build_docs.py [DIR] [python|rust]: builds the API reference for Python and Rust into DIR (target/docs).

In both a warning is an error: a link without a target, an annotation that cannot be read, a module that
cannot be imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("guestnet", "guestnet.testing")
"""The public modules. What they export is documented, wherever it is defined."""
PRIVATE = r"Error parsing type annotation .* for [\w.]*\._\w+[:.]? "
"""Annotations of private attributes are for the type checker and are not shown."""


def build_python(target: Path) -> None:
    """The reference of the Python package. Raises UserWarning for what pdoc warns of."""
    import pdoc

    shutil.rmtree(target, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", PRIVATE, UserWarning)
        pdoc.render.configure(docformat="google", show_source=False, search=True)
        pdoc.pdoc(*MODULES, output_directory=target)


def build_rust(target: Path) -> int:
    """The reference of the crates, private items included. Returns the exit status of cargo."""
    flags = " ".join(filter(None, (os.environ.get("RUSTDOCFLAGS"), "-D warnings")))
    command = ["cargo", "doc", "--workspace", "--no-deps", "--document-private-items", "--locked", "--quiet"]
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "RUSTDOCFLAGS": flags}, check=False)
    if status.returncode == 0:
        built = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "doc"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(built, target)
    return status.returncode


def main() -> int:
    words = sys.argv[1:]
    kinds = [word for word in words if word in ("python", "rust")] or ["python", "rust"]
    rest = [word for word in words if word not in kinds]
    target = Path(rest[0]) if rest else ROOT / "target" / "docs"
    if "python" in kinds:
        try:
            build_python(target / "python")
        except UserWarning as warning:
            print(f"pdoc: {warning}", file=sys.stderr)
            return 1
        print(f"Python: {target}/python/index.html")
    if "rust" in kinds:
        if status := build_rust(target / "rust"):
            return status
        print(f"Rust: {target}/rust/guestnet_core/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
