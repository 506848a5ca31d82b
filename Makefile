# guestnet: what can be done with a checkout. `make help` lists the targets.
# `make demo` and `make test` do the whole set-up themselves: system packages (as root on Debian),
# virtual environment, release build.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
RUST_SOURCES := $(shell find crates -name '*.rs' -o -name Cargo.toml)
PYTHON_DIRS := $(wildcard python tests bench scripts)
# Loom and the fuzzer compile everything with flags of their own; a directory each keeps them from
# throwing away the ordinary build.
TARGET := $(or $(CARGO_TARGET_DIR),target)

.PHONY: help build dist docs check test demo bench instructions instructions-renew bench-forwarding conformance bench-engine bench-rules fuzz loom lock format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

build: $(VENV)/.built ## Build the release into .venv, so that .venv/bin/guestnet is ready

$(VENV)/.deps: requirements.lock scripts/make-venv.sh
	scripts/make-venv.sh $(VENV) requirements.lock
	touch $@

# An editable install: Python changes count at once, only Rust changes need a build.
$(VENV)/.built: $(VENV)/.deps $(RUST_SOURCES) Cargo.toml Cargo.lock pyproject.toml
	PIP_QUIET=1 VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/maturin develop --release --locked --quiet
	touch $@

dist: build ## Build a wheel and a source distribution into dist/, and try both in fresh environments
	rm -rf dist
	PIP_QUIET=1 $(BIN)/maturin build --release --locked --sdist --out dist --quiet
	CARGO_TARGET_DIR=$(abspath $(TARGET)) $(BIN)/python scripts/check_dist.py dist

docs: build ## Build the API reference for Python and Rust into target/docs; warnings are errors
	$(BIN)/python scripts/build_docs.py

check: build ## Format, lint, types and unit tests: under two minutes once built
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	$(BIN)/python scripts/unused_dependencies.py
	$(BIN)/ruff check $(PYTHON_DIRS)
	$(BIN)/ruff format --check $(PYTHON_DIRS)
	$(BIN)/mypy
	scripts/stubtest.sh $(BIN)/python
	$(BIN)/python scripts/import_cycles.py
	cargo test --workspace --locked --quiet --lib
	$(BIN)/python -m pytest -q tests/unit

test: ## Everything: packages, build, checks, all Rust and Python tests, loom, real guests, short fuzz runs
	scripts/system-packages.sh test
	@$(MAKE) --no-print-directory build
	@$(BIN)/python scripts/run_tests.py

demo: ## Show what guestnet does, with a guest, in a minute
	scripts/system-packages.sh demo
	@$(MAKE) --no-print-directory build
	$(BIN)/guestnet demo

bench: ## Compare guestnet with kernel NAT, pasta, passt, slirp4netns, QEMU, gvproxy; under 10 minutes (BENCH_ARGS=--full)
	scripts/system-packages.sh bench
	@$(MAKE) --no-print-directory build
	$(BIN)/python bench/race.py $(BENCH_ARGS)

bench-forwarding: ## Compare forwarding through the uplink tun with nftables (root)
	scripts/system-packages.sh bench
	@$(MAKE) --no-print-directory build
	$(BIN)/python bench/forwarding.py $(BENCH_ARGS)

instructions: ## Compare the instruction counts of the hot paths with benches/instructions.json (part of make test)
	python3 scripts/instructions.py

instructions-renew: ## Write new instruction counts
	python3 scripts/instructions.py --renew

conformance: build ## Test the NAT against its RFCs and write docs/conformance.md
	python3 scripts/conformance.py

# The peer is downloaded from the registry for this alone.
bench-engine: build ## Compare the NAT engine with arcbox-conntrack; writes target/bench/engine.json
	mkdir -p target/bench
	cargo build --release --locked --manifest-path benches/engine/Cargo.toml --target-dir $(TARGET)/bench-engine
	$(TARGET)/bench-engine/release/guestnet-engine-bench target/bench/engine.json
	$(BIN)/python bench/translate_batch.py --rust $(TARGET)/bench-engine/release/guestnet-engine-bench --json target/bench/engine.json

bench-rules: ## Print what rules cost: decisions, a change while flows run, compiling, memory of names
	cargo run --release --locked -p guestnet-core --example rules

fuzz: ## Fuzz each target for a short time (FUZZ_SECONDS=20 each)
	scripts/fuzz.py --seconds $(or $(FUZZ_SECONDS),20)

loom: ## Model-check the rings and wakers
	scripts/loom.sh

lock: ## Update requirements.lock from pyproject.toml
	scripts/lock.sh $(BIN)/python

format: ## Format all sources
	cargo fmt --all
	$(BIN)/ruff format $(PYTHON_DIRS)
	$(BIN)/ruff check --fix $(PYTHON_DIRS)

clean: ## Remove everything that was built
	rm -rf $(VENV) .build dist target fuzz/target .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find python -name '*.so' -delete
	find . -name __pycache__ -prune -exec rm -rf {} +
