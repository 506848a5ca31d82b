#!/usr/bin/env bash
# make-venv.sh DIR LOCK: a virtual environment with the locked packages, from any Python >= 3.11.
set -euo pipefail
dir=$1 lock=$2

good() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11; do
    if good "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    echo "guestnet needs Python 3.11 or newer: install it, or name it with PYTHON=/path/to/python3 make build" >&2
    exit 1
fi
if ! command -v cargo >/dev/null; then
    echo "guestnet needs cargo (Rust 1.95 or newer): install it from https://rustup.rs" >&2
    exit 1
fi
if [ ! -x "$dir/bin/python" ] || ! good "$dir/bin/python"; then
    rm -rf "$dir"
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        echo "$python cannot make virtual environments: install it whole (Debian: apt-get install python3-venv)" >&2
        exit 1
    fi
    "$python" -m venv "$dir"
fi
"$dir/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$lock"
