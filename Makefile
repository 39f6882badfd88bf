# Everything a new machine needs: make demo, make test. Both create .venv, install into it, and run.
# Python >= 3.11, a C++17 compiler and git must be there; nothing else, and no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py CMakeLists.txt

.PHONY: demo test test-all lint bench bench-large bench-peers mutants compat torch-suite gpu format clean help
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

# a virtual environment with the versions of constraints.txt
$(VENV)/.packages: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed: make PYTHON=python3.x"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "venv is missing (Debian: apt install python3-venv)"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 cmake ninja wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" BKD_FAST_SKIP_CMAKE=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation -c constraints.txt -e '.[app,images,export,test,lint,gpu]'
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

bench-large: $(VENV)/.built  ## the posterior predictive with 50 million cells: 9 GB of memory
	$(BIN)/python -m benchmarks.large
	$(BIN)/python -m benchmarks.large --track topk:16 --diagnostics

mutants: $(VENV)/.built  ## break the samplers in known ways and see each noticed by the test that claims it
	$(BIN)/python -m tests.mutants

# what other libraries make of the samplers, in an environment of its own: timm needs torchvision, and that the torch it was built for
COMPAT := .venv-compat
COMPAT_PIP := $(COMPAT)/bin/python -m pip --quiet --disable-pip-version-check
$(COMPAT)/.built: $(VENV)/.built
	@test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	$(COMPAT_PIP) install torch==2.14.1 torchvision==0.29.1 timm==1.0.31 accelerate==1.15.0 lightning==2.6.6 \
		numpy==2.4.6 safetensors==0.8.0 rich==15.0.0 pytest==9.2.0 expecttest==0.3.0 setuptools==84.2.1 wheel pybind11==3.1.0
	BKD_FAST_SKIP_CMAKE=1 $(COMPAT_PIP) install --no-build-isolation --no-deps -e .
	$(COMPAT_PIP) download --no-deps --no-binary timm --dest $(COMPAT) timm==1.0.31
	mkdir -p $(COMPAT)/timm && tar xzf $(COMPAT)/timm-1.0.31.tar.gz -C $(COMPAT)/timm --strip-components=1
	@touch $@

compat: $(COMPAT)/.built  ## timm's own optimizer tests, accelerate and Lightning around the samplers (downloads 5 GB)
	BKD_FAST_TIMM_TESTS=$(COMPAT)/timm/tests $(COMPAT)/bin/python -m pytest -o addopts="" tests/compat/compat_*.py

torch-suite: $(VENV)/.built  ## PyTorch's own test_optim.py with the samplers: make torch-suite TORCH_SRC=a checkout of pytorch
	@test -f "$(TORCH_SRC)/test/test_optim.py" || { echo "TORCH_SRC must name a checkout of pytorch"; exit 1; }
	$(BIN)/python tests/compat/torch_suite.py "$(TORCH_SRC)"

# other libraries' samplers beside ours, in an environment of its own with the torch of constraints.txt
PEERS := .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip --quiet --disable-pip-version-check
$(PEERS)/.built: $(VENV)/.built
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) install -c constraints.txt torch numpy safetensors rich setuptools wheel pybind11
	BKD_FAST_SKIP_CMAKE=1 $(PEERS_PIP) install --no-build-isolation --no-deps -e .
	$(PEERS_PIP) install --no-deps posteriors==0.1.3 torch-sgld==0.1.0 devinterp==2.0.1 torch-uncertainty==0.13.0 blackjax==1.7.1
	$(PEERS_PIP) install -c constraints.txt jax jaxlib jaxopt optax fastprogress tensordict optree torchopt graphviz
	@touch $@

bench-peers: $(PEERS)/.built  ## one problem, every peer's SGLD and ours, in one run; --check for what check_sampler says of each
	$(PEERS)/bin/python -m benchmarks.peers
	$(PEERS)/bin/python -m benchmarks.peers --check

# a GPU machine has its own torch, Triton and CuPy, and often no network: nothing is fetched
GPU_PYTHON ?= python3
gpu:  ## on a machine with a GPU: the kernels against the CPU, then every GPU figure with its baselines
	$(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation --no-deps -e .
	@# most of its time is Triton's compiler's, one kernel and core at a time
	$(GPU_PYTHON) -m pytest tests/gpu $$($(GPU_PYTHON) -c "import xdist; print('-n 8')" 2> /dev/null)
	$(GPU_PYTHON) -m benchmarks.gpu
	@# last: it is refused on some virtual machines
	@if command -v compute-sanitizer > /dev/null; then \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --error-exitcode 1 $(GPU_PYTHON) tests/gpu/sanitize.py; \
	else echo "compute-sanitizer is not installed: memory checks left out"; fi

clean:  ## remove what make made
	rm -rf $(VENV) $(COMPAT) $(PEERS) build dist *.egg-info bkd_fast/_native*.so
