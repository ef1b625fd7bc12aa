# One verb per thing to do. Everything runs in .venv, which is made on first use; nothing has to be installed by hand.
#
#   PYTHON=python3.12   the interpreter that makes .venv (3.11 or later)
#   TORCH=1             adds PyTorch: interop tests, and a second oracle
#   RAY=1               adds Ray: the tests of the pool of actors (240 MB)
#   WORKERS=4           test processes (default: one per core)
#   ARGS="..."          handed on to the command behind demo, test, gpu-test, compile-all and bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
WORKERS ?= auto
TORCH ?=
RAY ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
CUDA_SOURCES = $(shell find src -name '*.cuh' -o -name '*.cu')
EXTRAS := $(if $(filter-out 0,$(TORCH)),$(VENV)/.torch) $(if $(filter-out 0,$(RAY)),$(VENV)/.ray)

LOWEST := $(VENV)/lowest
LOWEST_TESTS := tests/test_env.py tests/cli/test_commands.py tests/cli/test_matrix.py tests/cli/test_tune.py \
	tests/host/test_functional.py tests/jit/test_cache.py tests/jit/test_compile.py

.PHONY: help demo test test-lowest lint readme format compile-all gpu-test bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## attention on real activations: compile, run, compare, draw (writes demo-output/)
	$(BIN)/atomr-flashattn demo --out demo-output $(ARGS)

test: $(VENV)/.dev $(EXTRAS) ## every test that needs no GPU (TORCH=1 adds PyTorch, RAY=1 Ray)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(ARGS)

test-lowest: $(LOWEST)/.done ## a short set of tests with the lowest versions that pyproject.toml allows (about a minute)
	$(LOWEST)/bin/python -m pytest -n $(WORKERS) -m "not gpu" -p no:cacheprovider $(LOWEST_TESTS)

lint: $(VENV)/.dev ## ruff, mypy --strict, import layers, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CUDA_SOURCES)

readme: $(VENV)/.dev ## render the support matrix of README.md from the code and the record of the last GPU test run
	$(BIN)/atomr-flashattn matrix --record benchmarks/results --write README.md

format: $(VENV)/.dev ## rewrite Python and CUDA in the house style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CUDA_SOURCES)

compile-all: $(VENV)/.dev ## compile the full product of archs and features (long)
	$(BIN)/atomr-flashattn compile --all $(ARGS)

gpu-test: $(VENV)/.dev $(EXTRAS) ## the tests that need a GPU (and TORCH=1; two GPUs want RAY=1 too); writes benchmarks/results/gpu_tests.json
	ATOMR_FLASHATTN_TEST_RECORD=benchmarks/results/gpu_tests.json $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m gpu --hypothesis-profile=explore $(ARGS)

bench: $(VENV)/.dev ## measure against the peers found on this machine (needs a GPU)
	$(BIN)/atomr-flashattn bench $(ARGS)

clean: ## remove .venv and everything that was written by a verb
	rm -rf $(VENV) build dist demo-output .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment --------------------------------------------------------------------------------------------------------------------

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later found: install one, or name it with PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV): 100 MB, once" >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.demo

# The CPU build serves where one is offered; the tests need no other.
$(VENV)/.torch: | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	@touch $@

$(VENV)/.ray: | $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ray]'
	@touch $@

$(LOWEST)/.done: pyproject.toml tools/lowest_versions.py | $(BIN)/python
	$(BIN)/python -m venv $(LOWEST)
	$(BIN)/python tools/lowest_versions.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/constraints.txt \
		--editable . pytest pytest-timeout pytest-xdist hypothesis
	@touch $@
