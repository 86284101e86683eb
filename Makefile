# `make` lists the targets. All of them work from any folder: make -s -C path/to/nextscale demo

PYTHON ?= python3
# The last line that `make demo` prints is a path. With -C, GNU make before 4.4 still ends with `Leaving directory`,
# which only the caller can silence: make -s -C ...
MAKEFLAGS += --no-print-directory
BIN := .venv/bin

export PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup setup-web demo web test lint types clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s  %s\n", $$1, $$2}' Makefile

setup: ## make .venv and install everything into it (instant when nothing changed)
	@sh scripts/setup.sh

demo: setup ## draw images with the model that comes along: out/grid.png, out/scales.png
	@$(BIN)/nextscale demo --out out

setup-web: setup
	@$(BIN)/python -c "from nextscale.extras import need; need('web', 'the page')" 2>/dev/null || \
		$(BIN)/python -m pip install -qq -c requirements/constraints.txt -e '.[web]'

web: setup-web ## a page in the browser that draws and edits; ARGS="--prompts" for prompts
	@$(BIN)/nextscale web $(ARGS)

test: export HF_HUB_OFFLINE = 1
test: setup ## the tests, one process a core; ARGS="-n 0 -m slow" for the slow ones
	@$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

lint: setup ## ruff: rules, then format
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check

types: setup ## mypy
	@$(BIN)/python -m mypy nextscale

clean: ## remove caches and builds; .venv, runs and out stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find nextscale tests tools -type d -name __pycache__ -prune -exec rm -rf {} +
