"""The dispatch point: what runs where, the explicit choice, and a package without compiled kernels."""

import os
import re
import subprocess
import sys

import pytest
import torch

import bkd_fast as bkd
from bkd_fast.ops import registry
from bkd_fast.ops.registry import find, use_backend


def test_the_compiled_backend_is_preferred_and_the_choice_is_undone():
    pytest.importorskip("bkd_fast._native", reason="the compiled backend is not installed")
    cpu = torch.device("cpu")
    assert find("normal_", cpu).__module__ == "bkd_fast.ops.cpp.noise"
    with use_backend("reference"):
        assert find("normal_", cpu).__module__ == "bkd_fast.ops.reference.noise"
    assert find("normal_", cpu).__module__ == "bkd_fast.ops.cpp.noise"


def test_unknown_backends_and_devices():
    with (
        pytest.raises(ValueError, match=r"backend = 'gpu': must be one of \['cpp', 'cuda', 'reference', 'triton'\]"),
        use_backend("gpu"),
    ):
        pass
    with pytest.raises(bkd.BackendUnavailableError, match="no backend for tensors on meta: must be on one of"):
        find("normal_", torch.device("meta"))


def test_without_compiled_kernels_it_runs_and_says_so_once():
    code = """
import sys, warnings
sys.modules["bkd_fast._native"] = None  # as if it had not been built
import torch, bkd_fast as bkd
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    z = torch.randn(4, 3, requires_grad=True)
    bkd.KDLoss(2.0)(z, torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)).backward()
    bkd.SGLD([z], 0.1, num_data=10).step()
    posterior = bkd.PosteriorPredictive(4, 3)
    posterior.update_logits(z.detach())
    assert posterior.mean.sum().item() > 3.9
ours = [w for w in caught if w.category is bkd.BKDFastWarning]
assert len(ours) == 1 and "reference backend" in str(ours[0].message) and "g++" in str(ours[0].message), ours
assert ours[0].filename == "<string>", ours[0].filename
try:
    with bkd.ops.use_backend("cpp"):
        pass
except bkd.BackendUnavailableError as error:
    assert "cannot run here" in str(error)
else:
    raise AssertionError
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_environment_chooses_for_the_devices_that_the_backend_serves():
    code = """
import torch
from bkd_fast.ops.registry import find
print(find("normal_", torch.device("cpu")).__module__)
"""

    def run(name):
        environment = {**os.environ, "BKD_FAST_BACKEND": name, "TRITON_INTERPRET": "0"}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert run("reference").stdout.strip() == "bkd_fast.ops.reference.noise"
    assert "BKD_FAST_BACKEND = 'gpu': must be one of" in run("gpu").stderr
    if not torch.cuda.is_available():
        assert "BKD_FAST_BACKEND = 'cuda' cannot run here" in run("cuda").stderr


def test_a_gpu_backend_says_what_is_missing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert re.search("CUDA device|not installed", bkd.backends()["cuda"].missing)
    with pytest.raises(bkd.BackendUnavailableError, match="cannot run here"), bkd.use_backend("cuda"):
        pass


def test_an_operation_that_the_chosen_backend_lacks_runs_where_it_would_without_the_choice(monkeypatch):
    pytest.importorskip("bkd_fast._native", reason="the compiled backend is not installed")
    monkeypatch.delitem(registry._IMPLEMENTATIONS, ("normal_", "reference"))
    registry._find.cache_clear()
    try:
        with use_backend("reference"):
            assert find("normal_", torch.device("cpu")).__module__ == "bkd_fast.ops.cpp.noise"
            assert find("kd_energy", torch.device("cpu")).__module__ == "bkd_fast.ops.reference.kd"
    finally:
        registry._find.cache_clear()
