# Needs python3 >= 3.11 and make. Everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= auto
PYTEST_FLAGS ?=
PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: demo test test-fast check format bench clean lock setup install uninstall

demo: $(STAMP)  ## set everything up and run the main job on two nodes
	$(BIN)/python -m demo

test: $(STAMP)  ## set everything up and run the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_FLAGS)

test-fast: $(STAMP)  ## the tests that take seconds
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_FLAGS)

check: $(STAMP)  ## style, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## measure beside references; results in bench/results/
	$(BIN)/python -m bench

setup: $(STAMP)

install:  ## install below $(DESTDIR)$(PREFIX): programs, their own Python environment, systemd units, completion
	PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PYTHON='$(PYTHON)' sh deploy/install.sh install

uninstall:  ## remove what `make install` put there, and nothing else
	PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' sh deploy/install.sh uninstall

$(STAMP): requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "peerup needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "python3 cannot make virtual environments here (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock:  ## resolve the dependencies anew
	uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 pyproject.toml --group dev -c requirements.lock -o requirements-dev.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
