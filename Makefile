# Everything a newcomer needs: `make demo`, `make test`, `make check`. Nothing but Python 3.11 or newer and pip is assumed.

# The first of these that is new enough; 3.14 and newer come last, because TensorFlow is late with packages for them.
PYTHON := $(shell for try in "python3 14" "python3.13 14" "python3.12 14" "python3.11 14" "python3 99"; do set -- $$try; \
	$$1 -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, $$2))" 2>/dev/null && { command -v $$1; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# Warnings of old packages about newer ones that they use: we cannot change those.
OLD := -W ignore::DeprecationWarning -W ignore::UserWarning
EXTRAS := engine,litert,broker,tfrecord,parquet,demo
INSTALL := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check $(NEWEST) $(LIMITS:%=--constraint=%)

.PHONY: help demo test test-systemd test-lowest test-newest check fuzz bench deb lock audit packages packages-systemd clean

help:  ## Say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo  ## Start a broker, a coordinator and three nodes here, and let them train, deploy and ask a model
	@$(BIN)/potluck demo

test: packages $(VENV)/.dev  ## Run all tests; PYTEST="tests/unit -k rounds" runs a part
	@$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(PYTEST)

test-systemd: packages-systemd $(VENV)/.dev  ## What systemd does with the services, in a container that it boots (as root); PYTEST="-k stop" runs a part
	@$(BIN)/python -m pytest --numprocesses=3 --dist=loadfile tests/systemd $(PYTEST)

test-lowest:  ## Unit and contract tests on the lowest versions that pyproject.toml allows
	@$(MAKE) --no-print-directory VENV=.venv-lowest LIMITS=.venv-lowest/lowest.txt PYTEST="tests/unit tests/contract $(OLD)" test

test-newest:  ## The same on the newest versions that there are
	@rm -f .venv-newest/.demo .venv-newest/.dev
	@$(MAKE) --no-print-directory VENV=.venv-newest NEWEST="--upgrade --upgrade-strategy=eager" PYTEST="tests/unit tests/contract" test

check: $(VENV)/.dev  ## Lint, format, types, and the rules of who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: $(VENV)/.fuzz  ## Fuzz the decoders in turn; SECONDS=3600 in all, ONLY="message csv" chooses targets
	@$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),600) $(if $(ONLY),--only $(ONLY)) $(FUZZ)

bench: $(VENV)/.dev  ## Run the benchmarks in full
	@for file in latency transfer scaling scale training serving litert; do $(BIN)/python benchmarks/$$file.py || exit 1; done

deb: $(VENV)/.dev  ## Build the Debian package in dist/
	@$(BIN)/python packaging/deb/build.py

lock:  ## Write requirements/*.txt anew: the versions and hashes that releases install
	@PATH="$(dir $(PYTHON)):$$PATH" requirements/lock

audit: .venv-tools/.done  ## Look for known vulnerabilities in what releases install, and list it (SBOM) in dist/
	@.venv-tools/bin/python packaging/audit.py

.venv-tools/.done:
	@$(MAKE) --no-print-directory VENV=.venv-tools .venv-tools/bin/python
	@PYTHONWARNINGS=ignore .venv-tools/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom pip-audit
	@touch $@

clean:  ## Remove what make made
	rm -rf $(VENV) .venv-lowest .venv-newest .venv-tools build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .fuzz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's python3-pip comes without python3-venv: then pip itself puts a pip into the environment.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "potluck needs Python 3.11 or newer, and found none: apt install python3 python3-venv" >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --quiet --disable-pip-version-check --python $(VENV)/bin/python install pip; } || { \
		rm -rf $(VENV); \
		echo "$(PYTHON) can neither make virtual environments nor run pip: apt install python3-venv, then try again" >&2; exit 1; }

# A stamp for each set of packages: they are installed again only when pyproject.toml has changed.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@$(if $(LIMITS),$(BIN)/python tests/support/bounds.py >$(LIMITS))
	@echo "installing potluck with TensorFlow (once; about 2 GB on disk)"
	@$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "installing what tests and checks need"
	@$(INSTALL) --editable '.[$(EXTRAS),dev]'
	@touch $@

# There is no wheel for every Python: then the runner says so.
$(VENV)/.fuzz: $(VENV)/.dev
	@$(INSTALL) --editable '.[$(EXTRAS),dev,fuzz]' || echo "atheris cannot be installed here"
	@touch $@

# What the tests use of the system. With root on Debian or Ubuntu we say what is installed, then install it; elsewhere what cannot run.
packages:
	@sh tests/support/packages.sh

packages-systemd:
	@sh tests/support/packages.sh systemd
