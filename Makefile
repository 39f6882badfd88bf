# Everything a new machine needs: make demo, make test. Both create .venv, install into it, and run.
# Python >= 3.11, a C++17 compiler and git must be there; nothing else, and no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py CMakeLists.txt

.PHONY: demo test test-all lint bench mutants gpu format clean help
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

# a virtual environment with the versions of constraints.txt
$(VENV)/.packages: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make PYTHON=python3.x"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "venv is missing (Debian: apt install python3-venv)"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 cmake ninja wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" BKD_FAST_SKIP_CMAKE=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation -c constraints.txt -e '.[app,test,lint,gpu]'
	@touch $@

# the compiled kernels, again whenever a source changed
$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps -e .
	@touch $@

demo: $(VENV)/.built  ## the main job on scikit-learn's digits, from teacher to runs/demo/report.html
	$(BIN)/bkd-fast demo

test: $(VENV)/.built  ## the tests
	$(BIN)/python -m pytest

test-all: $(VENV)/.built  ## the tests, and those that take minutes
	$(BIN)/python -m pytest -m ""

lint: $(VENV)/.built  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.built  ## let ruff lay out the Python code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.built  ## every published CPU figure, with its baseline in the same run
	$(BIN)/python -m pytest benchmarks -o python_files="bench_*.py" --benchmark-enable --benchmark-columns=median,iqr,rounds

mutants: $(VENV)/.built  ## break the samplers in known ways and see each noticed by the test that claims it
	$(BIN)/python -m tests.mutants

# a GPU machine has its own torch, Triton and CuPy, and often no network: nothing is fetched
GPU_PYTHON ?= python3
gpu:  ## on a machine with a GPU: the kernels against the CPU, then every GPU figure with its baselines
	$(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation --no-deps -e .
	$(GPU_PYTHON) -m pytest tests/gpu
	@if command -v compute-sanitizer > /dev/null; then compute-sanitizer --error-exitcode 1 $(GPU_PYTHON) tests/gpu/sanitize.py; \
	else echo "compute-sanitizer is not installed: memory checks left out"; fi
	$(GPU_PYTHON) -m benchmarks.gpu

clean:  ## remove what make made
	rm -rf $(VENV) build dist *.egg-info bkd_fast/_native*.so
