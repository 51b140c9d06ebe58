# Every target sets up what it needs: a fresh machine needs python3 >= 3.11 with pip and venv, and PyPI.
#   make demo           score the sample pictures with the embedded model
#   make test           the checks of make lint, then the test suite
#   make test-slow      the suite with the slow tests; make test-lowest and make test-newest: other versions
#   make lint           linter, formatter check and type checker
#   make PYTHON=python3.12 test    another interpreter
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
NEWEST ?= .venv-newest
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Two files of tests at a time, each with one thread.
PYTEST := -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test suite test-slow test-lowest test-newest bench lint build clean

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
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,test,train]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt dashscope  # for Qwen's vocabulary, a file in it
	@touch $@ $(VENV)/.run-stamp

$(LOWEST)/.test-stamp: pyproject.toml constraints-lowest.txt
	$(call create,$(LOWEST))
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[test]'
	@touch $@

$(NEWEST)/.test-stamp: pyproject.toml
	$(call create,$(NEWEST))
	$(NEWEST)/bin/python -m pip install --quiet --upgrade -e '.[test,train]'
	@touch $@

demo: $(VENV)/.run-stamp
	$(BIN)/vqr1 score examples/pictures --model nano

test: lint suite

suite: $(VENV)/.test-stamp
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# DeepSpeed runs ZeRO-3 on two CPU processes; without it those tests skip.
test-slow: $(VENV)/.test-stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt deepspeed
	$(BIN)/python $(PYTEST) -m 'not gpu' $(PYTEST_ARGS)

test-lowest: $(LOWEST)/.test-stamp
	$(LOWEST)/bin/python $(PYTEST) $(PYTEST_ARGS)

# The newest versions that pyproject.toml allows; without pins, so what it finds is news, not a fault of a change.
test-newest: $(NEWEST)/.test-stamp
	$(NEWEST)/bin/python $(PYTEST) $(PYTEST_ARGS)

bench: $(VENV)/.run-stamp
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.speed.scoring --start-up

lint: $(VENV)/.test-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

build: $(VENV)/.test-stamp
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info $(VENV) $(LOWEST) $(NEWEST)
