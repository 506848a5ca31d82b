#!/usr/bin/env bash
# Model-checks the rings and wakers of guestnet-io: every interleaving, within loom's bounds.
set -euo pipefail
cd "$(dirname "$0")/.."
export RUSTFLAGS="${RUSTFLAGS:-} --cfg loom"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom"
export LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-3}"
exec cargo test --locked --release -p guestnet-io --test loom
