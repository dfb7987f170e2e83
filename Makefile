# `make demo` and `make test` are all there is to setting up: they need python3 (3.11 to 3.14), pip and make.
# The first run installs into .venv; later ones start at once, until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-versions lint bench

help:
	@echo "make demo    set up if needed, then run the demonstration"
	@echo "make test    set up if needed, then lint, type check and test"
	@echo "make test-versions  smoke tests with the oldest and newest dependencies, and without extras"
	@echo "make lint    lint and type check only"
	@echo "make bench   run the benchmark"

demo: $(INSTALLED)
	@$(BIN)/pumer demo

test: lint
	@$(BIN)/python -m pytest

test-versions: $(INSTALLED)
	@$(BIN)/nox

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary

bench: $(INSTALLED)
	@$(BIN)/pumer bench

# The stamp is written last, so an install that was cut off is taken up again where it stopped.
# torch goes first, alone and by exact version: whichever build of that version the index offers is kept by what follows.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	  echo "pumer needs Python 3.11 to 3.14; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	  echo "Name another one, for example: make PYTHON=python3.13 $(or $(MAKECMDGOALS),demo)" >&2; exit 1; }
	@$(BIN)/python -c '$(SUPPORTED)' 2>/dev/null && $(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): a few minutes, this once."
	@$(PIP_INSTALL) -c constraints.txt torch==2.13.0
	@$(PIP_INSTALL) -c constraints.txt -e ".[dev,train]"
	@touch $@
