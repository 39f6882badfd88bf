"""Launches as Triton sees them, and what CuPy is handed, without a GPU."""

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install 'bkd_fast[gpu]')")

KERNELS = {
    "finish_rows", "head_step_kernel", "langevin_kernel", "measure_rows", "mixture", "nonfinite_kernel", "normal_kernel",
    "on_chip", "pick_codes", "row_statistics_kernel", "settle_rows", "tiled", "update_sketch", "update_tiles",
}  # fmt: skip


def test_every_kernel_can_be_launched_after_every_other():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("launched.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert {*done.stdout.split()} == KERNELS


def test_a_launch_through_cupy_goes_as_far_as_the_driver(monkeypatch):
    """CuPy's own function takes the stream and the arguments, with nothing deprecated, and then misses a GPU."""
    pytest.importorskip("cupy", reason="needs CuPy (pip install 'bkd_fast[gpu]')")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu launches")
    from cupy.cuda import Function, runtime

    from bkd_fast.kernels import cuda

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0x1234))
    monkeypatch.setattr(cuda, "_load", lambda *_: Function.__new__(Function))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(runtime.CUDARuntimeError):
            cuda.launch("x.cu", "x", (1,), (32,), (7, np.float32(1.5)), torch.device("cuda"))
