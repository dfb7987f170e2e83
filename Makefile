# `make demo` and `make test` are all there is to setting up: they need python3 (3.11 to 3.14), pip and make.
# The first run installs into .venv; later ones start at once, until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_VENV := .venv-docs
DOCS_INSTALLED := $(DOCS_VENV)/.installed
PIP_INSTALL := -m pip install -qq --disable-pip-version-check -c constraints.txt
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-versions lint bench docs

help:
	@echo "make demo    set up if needed, then run the demonstration"
	@echo "make test    set up if needed, then lint, type check and test"
	@echo "make test-versions  smoke tests with the oldest and newest dependencies, and without extras"
	@echo "make lint    lint and type check only"
	@echo "make bench   run the benchmark"
	@echo "make docs    build the documentation into site/"

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

docs: $(DOCS_INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "The documentation is in site/: open site/index.html."

# Both environments are made in the same way. Their stamps are written last, so an install that was cut off is taken up
# again where it stopped.
define MAKE_VENV
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	  echo "pumer needs Python 3.11 to 3.14; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
	  echo "Name another one, for example: make PYTHON=python3.13 $(or $(MAKECMDGOALS),demo)" >&2; exit 1; }
	@$(@D)/bin/python -c '$(SUPPORTED)' 2>/dev/null && $(@D)/bin/python -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv --clear $(@D)
	@echo "Installing into $(@D): a few minutes, this once."
endef

# torch goes first, alone and by exact version: whichever build of that version the index offers is kept by what follows.
$(INSTALLED): pyproject.toml constraints.txt
	$(MAKE_VENV)
	@$(BIN)/python $(PIP_INSTALL) torch==2.13.0
	@$(BIN)/python $(PIP_INSTALL) -e ".[dev,train]"
	@touch $@

# The sources are read, not imported: the extra's packages do without pumer's own dependencies.
$(DOCS_INSTALLED): pyproject.toml constraints.txt
	$(MAKE_VENV)
	@$(@D)/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["docs"], sep="\n")' > $(@D)/requirements.txt
	@$(@D)/bin/python $(PIP_INSTALL) -r $(@D)/requirements.txt
	@touch $@
