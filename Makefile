# Every target sets up what it needs: a fresh machine needs python3 >= 3.11 with pip and venv, and PyPI.
#   make demo           score the sample pictures with the embedded model
#   make test           the test suite (make test-slow adds the slow tests, make test-lowest the lowest versions)
#   make PYTHON=python3.12 test    another interpreter
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-lowest bench lint build clean

help:
	@sed -n 's/^#   //p' Makefile

# $(call create,FOLDER): an empty environment, or a sentence that says what is missing.
define create
	@$(PYTHON) -c 'import sys; sys.exit("Expected Python 3.11 or newer but $(PYTHON) is %d.%d: try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
endef

# Stamps: an environment is brought up to date when the project file or the pins change, else left alone.
$(VENV)/.run-stamp: pyproject.toml constraints.txt
	$(call create,$(VENV))
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.test-stamp: pyproject.toml constraints.txt
	$(call create,$(VENV))
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,train]'
	@touch $@ $(VENV)/.run-stamp

$(VENV)/.dev-stamp: pyproject.toml constraints.txt
	$(call create,$(VENV))
	$(BIN)/python -m pip install --quiet -c constraints.txt 'ruff>=0.14'
	@touch $@

$(LOWEST)/.test-stamp: pyproject.toml constraints-lowest.txt
	$(call create,$(LOWEST))
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[test]'
	@touch $@

demo: $(VENV)/.run-stamp
	$(BIN)/vqr1 score examples/pictures --model nano

test: $(VENV)/.test-stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.test-stamp
	$(BIN)/python -m pytest -m 'not gpu' $(PYTEST_ARGS)

test-lowest: $(LOWEST)/.test-stamp
	$(LOWEST)/bin/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.run-stamp
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.speed.scoring --start-up

lint: $(VENV)/.dev-stamp
	$(BIN)/ruff check .

build: $(VENV)/.dev-stamp
	$(BIN)/python -m pip install --quiet 'build>=1.2'
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info $(VENV) $(LOWEST)
