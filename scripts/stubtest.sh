#!/usr/bin/env bash
# stubtest.sh PYTHON: python/guestnet/_native.pyi says what the native module really has.
set -euo pipefail
cd "$(dirname "$0")/.."
args=(guestnet._native --mypy-config-file pyproject.toml)
[ -f scripts/stubtest-allowlist.txt ] && args+=(--allowlist scripts/stubtest-allowlist.txt)
MYPYPATH=python exec "$1" -m mypy.stubtest "${args[@]}"
