"""Unsafe Rust is only where ARCHITECTURE.md and CONTRIBUTING.md say."""

from __future__ import annotations

import re
from pathlib import Path

CRATES = Path(__file__).resolve().parents[2] / "crates"
UNSAFE = re.compile(r"^[^/\"]*\bunsafe\b *(\{|fn|impl|extern)", re.MULTILINE)


def test_unsafe_code_is_in_two_places() -> None:
    files = [path for path in CRATES.glob("*/src/**/*.rs") if UNSAFE.search(path.read_text())]
    assert any(path.is_relative_to(CRATES / "guestnet-io") for path in files), "the pattern finds nothing"
    elsewhere = [path for path in files if not path.is_relative_to(CRATES / "guestnet-io")]
    assert elsewhere == [CRATES / "guestnet-py" / "src" / "buffers.rs"]
