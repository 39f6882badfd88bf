"""What the CUDA backend hands its kernels, held against their C++ signatures: number, order and width, without a GPU."""

import contextlib
import dataclasses
import re
import shutil
import subprocess
import warnings
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("cupy", reason="needs CuPy, which finds NVRTC (pip install 'bkd_fast[gpu]')")

import bkd_fast as bkd
from bkd_fast.kernels import cuda
from bkd_fast.ops import registry
from bkd_fast.ops.langevin import LangevinStep, langevin_step_
from bkd_fast.ops.rounding import noise_table

pytestmark = [
    pytest.mark.usefixtures("nvrtc"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt, which comes with a compiler"),
]

# a parameter of C++ -> what CuPy may be given for it
WIDTHS = {
    "long long": (int, np.int64),
    "unsigned long long": (np.uint64,),
    "int": (np.int32,),
    "unsigned int": (np.uint32,),
    "float": (np.float32,),
    "double": (np.float64, float),
}


@cache
def _parameters(source: str, instance: str) -> list[str]:
    """The types of a kernel's parameters, which its name in the binary has in it."""
    symbol = cuda.build(source, instance, 90).symbol
    name = subprocess.check_output(["c++filt", symbol], text=True).strip()
    inside = name[: name.rindex(")")]
    depth, begin = 0, len(inside)
    while depth >= 0:  # back to the bracket that opens the list
        begin -= 1
        depth += {")": 1, "(": -1}.get(inside[begin], 0)
    parts, depth = [""], 0
    for character in inside[begin + 1 :]:
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    real = "double" if "Format<double>" in name else "float"
    return [re.sub(r"bkd::Format<[^>]*>::Real", real, part.strip()) for part in parts]


@pytest.fixture
def launches(monkeypatch):
    """The CUDA backend on CPU tensors, whose kernels check what they are handed and do nothing. Yields who was launched."""
    seen: dict[str, int] = {}

    def load(source, instance, device, shared):
        def launch(grid, block, arguments, *, shared_mem, stream):
            parameters = _parameters(source, instance)
            given = [*arguments]
            assert len(given) == len(parameters), f"{instance}: {len(given)} arguments for {parameters}"
            for argument, parameter in zip(given, parameters, strict=True):
                if parameter.endswith("*"):
                    assert type(argument) is int and 0 <= argument < 2**63, f"{instance}: {argument!r} for {parameter}"
                else:
                    assert type(argument) in WIDTHS[parameter], f"{instance}: {type(argument)} for {parameter}"
            assert all(type(n) is int and 0 < n < 2**31 for n in grid) and 0 < block[0] <= 1024
            seen[instance.removeprefix("bkd::").split("<")[0]] = stream.ptr

        return launch

    monkeypatch.setattr(cuda, "_load", load)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0x1234))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=4096))
    backend = dataclasses.replace(registry._BACKENDS["cuda"], devices=("cpu",), diagnose=lambda: None)
    monkeypatch.setitem(registry._BACKENDS, "cuda", backend)
    registry._find.cache_clear()
    with bkd.use_backend("cuda"):
        yield seen
    registry._find.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("moments", [False, True])
def test_the_step(launches, dtype, moments):
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def tensors(kind):
        return [torch.zeros(n, dtype=kind) for n in (5, 9000)]

    for scalars in (None, torch.zeros(3, dtype=real)):
        for master in (False, True) if dtype == torch.bfloat16 else (False,):
            stochastic = dtype == torch.bfloat16 and not master
            langevin_step_(
                LangevinStep(
                    tensors(dtype), tensors(dtype), tensors(dtype), tensors(real) if moments else [],
                    tensors(real) if moments else [], torch.zeros(2, dtype=torch.bool), lr=0.1, decay=0.1, sigma=0.1,
                    seed=2**64 - 1, chain=3, step=2**40, parameters=[0, 1], first_elements=[0, 3], draws=1,
                    master=tensors(torch.float32) if master else [],
                    noise_table=noise_table(0.1, dtype) if stochastic else None, scalars=scalars,
                    clock=None if scalars is None else torch.zeros((), dtype=torch.int64),
                )
            )  # fmt: skip
    assert {*launches} == {"langevin_step"}


@pytest.mark.parametrize("sampler", [bkd.SGHMC, bkd.SGNHT, bkd.AdamSGHMC])
def test_other_rules_and_the_look_for_nonfinite_gradients(launches, sampler):
    theta = torch.zeros(2, 700, requires_grad=True)
    theta.grad = torch.zeros(2, 700)
    sampler([theta], 0.1, num_data=10, chains=2, nonfinite="skip").step()
    assert {*launches} == {"langevin_step", "find_nonfinite"}


@pytest.mark.parametrize("classes", [10, 101])
@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize("track", ["all", "topk:2"])
def test_the_predictive(launches, classes, bins, track):
    """On many chunks of rows: the cache is small."""
    posterior, other = (bkd.PosteriorPredictive(37, classes, bins=bins, track=track) for _ in range(2))
    wanted = {"measure_rows", "update_tiles", "finish_rows"}
    if track != "all":
        posterior.choose_classes_by(torch.zeros(37, classes))
        other.choose_classes_by(torch.zeros(37, classes))
        wanted |= {"pick_codes", "update_cells", "count_draws"}
    for draws in (1, 33):
        posterior.update_logits(torch.zeros(draws, 37, classes))
    assert {*launches} == wanted and {*launches.values()} == {0x1234}


def test_the_sketch(launches):
    sketch, other = (bkd.QuantileSketch((37,), 1.0) for _ in range(2))
    for one in (sketch, other):
        one.update(torch.zeros(3, 37))
        one.update(torch.full((37,), torch.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing was counted
        sketch.quantile(0.5)
        sketch.merge_(other)
        sketch.state_dict()
    assert {*launches} == {"update_cells", "count_draws", "quantile_cells", "merge_tiles", "sort_cells"}
