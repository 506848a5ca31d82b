#!/usr/bin/env bash
# lock.sh PYTHON: resolves pyproject.toml anew in a scratch environment and writes requirements.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$1" -m venv "$scratch/venv"
"$1" - > "$scratch/wanted" <<'PY'
import tomllib
with open("pyproject.toml", "rb") as f:
    p = tomllib.load(f)
extras = [d for group in p["project"].get("optional-dependencies", {}).values() for d in group]
print(*p["project"]["dependencies"], *extras, *p["dependency-groups"]["tools"], *p["build-system"]["requires"], sep="\n")
PY
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check --requirement "$scratch/wanted"
{
    echo '# The exact versions that the project is built, checked and tested with. Made by `make lock`.'
    "$scratch/venv/bin/pip" freeze
} > requirements.lock
