# Everything a newcomer needs: `make demo`, `make test`, `make check`. Nothing but Python 3.11 or newer, pip and git is assumed.

PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := engine,broker,tfrecord,demo

.PHONY: help demo test check bench packages clean

help:  ## Say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.demo  ## Start a broker, a coordinator and three nodes here, and let them do the main job
	@$(BIN)/potluck demo

test: $(VENV)/.dev packages  ## Run all tests
	@$(BIN)/python -m pytest $(PYTEST)

check: $(VENV)/.dev  ## Lint, types, and the rules of who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## Run the benchmarks in full
	@for file in latency scaling; do $(BIN)/python benchmarks/$$file.py || exit 1; done

clean:  ## Remove what make made
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "potluck needs Python 3.11 or newer: install it (Debian: apt install python3 python3-venv)"; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "python3 cannot make virtual environments: apt install python3-venv"; exit 1; }

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	@echo "installing potluck with TensorFlow (about 1 GB, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),dev]'
	@touch $@

# What the tests use of the system. With root on Debian or Ubuntu it is installed; elsewhere we say what cannot run.
packages:
	@sh tests/support/packages.sh
