# From nothing but Python 3.11+ and make: every target sets up .venv first, once per change of
# pyproject.toml or constraints.txt. `make PYTHON=python3.12 test` picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-e2e check bench settings clean

help:
	@echo 'make demo      serve the built-in model on http://127.0.0.1:8000'
	@echo 'make check     lint, types, layers, sizes, docs'
	@echo 'make test      check, then the tests'
	@echo 'make test-e2e  a server as a process: load, kills, drain'
	@echo 'make bench     the measurements under benchmarks/'

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Naiad needs Python 3.11+; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo 'no venv module: install the Debian package python3-venv' >&2; exit 1; }
	@echo 'installing into $(VENV) (a few minutes the first time)'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[llm,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/naiad serve builtin --http-address 127.0.0.1

check: $(INSTALLED)
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_sizes.py
	$(BIN)/python tools/check_map.py
	$(BIN)/python tools/check_help_imports.py

test: check
	$(BIN)/pytest -q -n 2 --dist worksteal -m 'not slow and not bench' --ignore tests/e2e $(PYTEST_ARGS)

# One at a time: they measure. -rP shows what they measured.
test-e2e: $(INSTALLED)
	$(BIN)/pytest -q -rP tests/e2e $(PYTEST_ARGS)

bench: $(INSTALLED)
	@test -n "$(wildcard benchmarks/*.py)" || { echo 'benchmarks/ has no script yet' >&2; exit 1; }
	@for script in $(filter-out benchmarks/load_client.py,$(wildcard benchmarks/*.py)); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

settings: $(INSTALLED)
	$(BIN)/python tools/write_settings_page.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
