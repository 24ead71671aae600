# distill-jobs. `make help` lists the targets.
PYTHON ?= python3.11
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
# A file's tests stay in one process: those of a module share a Ray cluster.
PYTEST  = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
WORKERS ?= 2
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-lm test test-all bench lint lock clean

help:            ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install everything from the lock

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "distill-jobs needs Python 3.11: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing from requirements.lock into $(VENV) (about 3 minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup      ## distil a census classifier: fetch, prepare, teach, capture, train, evaluate, audit, report
	@$(BIN)/python -m distill_jobs.examples.fetch adult --into demo
	@$(BIN)/distill run distill_jobs/examples/adult.yaml

demo-lm: setup   ## distil SmolLM2-135M into 6 of its 30 layers (12 to 20 minutes on 2 cores)
	@$(BIN)/python -m distill_jobs.examples.fetch lm --into demo
	@$(BIN)/distill run distill_jobs/examples/lm.yaml

test: setup lint ## lint, type check, and the tests but for the slow ones; WORKERS=4 on a larger machine
	@$(PYTEST)

test-all: setup lint ## the tests, and the slow ones too
	@$(PYTEST) -m "not benchmark"

bench: setup     ## the benchmarks; each prints its figures
	@$(BIN)/python -m pytest -m benchmark -s tests/benchmarks

lint: setup      ## ruff and mypy --strict over both packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lock:            ## resolve pyproject.toml afresh into requirements.lock
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	@build/lock/bin/python -m pip install --quiet --disable-pip-version-check ".[dev]"
	@{ echo "# Every package, pinned. Made by 'make lock' from pyproject.toml; do not edit by hand."; \
	   build/lock/bin/python -m pip freeze --exclude distill-jobs | sed 's/+cpu$$//' ; \
	   echo "setuptools==$$(build/lock/bin/python -m pip show setuptools | awk '/^Version/{print $$2}')"; } > requirements.lock
	@rm -rf build/lock

clean:           ## remove what the demos made (not .venv)
	rm -rf demo runs build
