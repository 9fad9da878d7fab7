# kelp: `make` lists the targets. Everything lives in .venv and ~/.cache/kelp.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?=
TORCH_INDEX ?=
VENV_FLAGS ?=
MODEL ?=
ARGS ?=
SUITE ?= serve
LONG ?=
export PYTHON TORCH_INDEX VENV_FLAGS MODEL

BIN := .venv/bin
CHECKED_TESTS := tests/unit tests/property tests/fuzz tests/contract tests/graph tests/shells

.PHONY: help setup tools serve test lint check bench bench-peers chaos fuzz soak perf-analyzer clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=python3.11 TORCH_INDEX=<url> MODEL=<folder or .gguf> ARGS='<options>' SUITE=serve LONG=1"

setup: ## environment, Triton and the default model (or MODEL)
	@scripts/setup.sh

serve: setup ## set up, then serve MODEL; options in ARGS (see .venv/bin/kelp serve --help)
	@exec $(BIN)/kelp serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

tools:
	@scripts/setup.sh test

test: setup tools ## the whole test suite (ARGS='-k name' narrows it)
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: tools ## static checks: ruff, mypy, import-linter, hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

check: lint ## static checks and the tests that need no Triton; about a minute
	$(BIN)/python -m pytest -q -n auto -m "not slow and not triton and not gpu" $(wildcard $(CHECKED_TESTS)) $(ARGS)

bench: setup tools ## one benchmark suite (SUITE=serve, LONG=1)
	$(BIN)/python -m perf.run $(SUITE) $(if $(LONG),--long) $(ARGS)

chaos: setup tools ## three minutes of every kind of fault, each token checked (ARGS='--seconds 600 --seed 7')
	$(BIN)/python -m perf.resilience.gate $(ARGS)

bench-peers: ## install the engines that suites compare against, each into perf/peers/<name>
	@scripts/install_peers.sh

fuzz: setup tools ## parsers of what clients and peers say, FUZZ_MINUTES (default 10) for each family
	@scripts/fuzz.sh $(ARGS)

soak: setup tools ## fuzz, then the tests that run servers, over and over for SOAK_MINUTES (default 60)
	@scripts/soak.sh

perf-analyzer: setup ## NVIDIA's load generator as .venv/bin/perf_analyzer
	@scripts/install_perf_analyzer.sh

clean: ## remove the environment and what tools left (the model cache stays in ~/.cache/kelp)
	rm -rf .venv build dist python/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f backends/python
