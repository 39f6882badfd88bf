"""Fixtures that every test may use."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports triton: its kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(Path(__file__).parent))  # the shared harness: `import stats`

try:
    from bkd_fast import _native as native
except ImportError:
    native = None


def pytest_configure(config: pytest.Config) -> None:
    """Only our own warnings are errors. (In pyproject.toml these would import bkd_fast before the lines above.)"""
    config.addinivalue_line("filterwarnings", "error::bkd_fast.BKDFastWarning")
    # tests compare runs of one seed on purpose
    config.addinivalue_line("filterwarnings", "ignore:another live sampler:bkd_fast.BKDFastWarning")


@pytest.fixture(params=["reference"] if native is None else native.isas())
def isa(request: pytest.FixtureRequest):
    """Each instruction set of the compiled backend in turn (the reference alone where there is none)."""
    if native is None:
        yield request.param
        return
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.fixture
def two_threads():
    """Two threads whatever the machine's default."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
