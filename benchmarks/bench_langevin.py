"""The Langevin step against a copy, every torch.optim.SGD, and eager SGLD.

Bytes: 12 per float32 parameter (read theta and its gradient, write theta), as SGD without momentum. What the step adds to
SGD is arithmetic: about 100 vector instructions per 32 normals with AVX-512 (docs/performance.md).
"""

import math

import pytest
import torch
from interleaved import Contender, Table
from shapes import resnet50

import bkd_fast as bkd
from bkd_fast import _native as native

NUM_DATA = 50_000
LR = 1e-3
SIGMA = math.sqrt(2 * LR / NUM_DATA)


def _parameters(shapes):
    parameters = [torch.randn(shape).requires_grad_() for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _sgld(parameters, chain=0, **settings):
    optimizer = bkd.SGLD(parameters, LR, num_data=NUM_DATA, chain=chain, **settings)
    return lambda _: optimizer.step()


def _sgd(parameters, **settings):
    optimizer = torch.optim.SGD(parameters, LR, **settings)
    return lambda _: optimizer.step()


@torch.no_grad()
def _eager(parameters):
    for parameter in parameters:
        parameter.add_(parameter.grad, alpha=-LR)
        parameter.add_(torch.randn_like(parameter), alpha=SIGMA)


@torch.no_grad()
def _copy(parameters):
    for parameter in parameters:
        parameter.copy_(parameter.grad)


@pytest.mark.filterwarnings("ignore:another live sampler")
@pytest.mark.parametrize("elements", [10**4, 10**5, 10**6, 2**25, 10**8])
def test_step(benchmark, threads, show, elements):
    parameters = _parameters([(elements,)])
    contenders = {
        "SGLD": _sgld(parameters, nonfinite="propagate"),
        "SGLD, pre-pass (default)": _sgld(parameters),
        "SGLD, record": _sgld(parameters, nonfinite="record"),
        "copy_ (8 B)": lambda _: _copy(parameters),
        "SGD foreach": _sgd(parameters, foreach=True),
        "SGD fused": _sgd(parameters, fused=True),
        "SGD loop": _sgd(parameters, foreach=False),
        "eager SGLD": lambda _: _eager(parameters),
    }
    table = Table(f"Langevin step, {threads} thread{'s' * (threads > 1)}", "element")
    times = table.time(f"{elements:,} fp32", contenders, elements)
    show(table)
    sgd = min(times[name] for name in times if name.startswith("SGD "))
    benchmark.extra_info["SGLD / fastest SGD"] = times["SGLD"] / sgd
    benchmark.extra_info["eager SGLD / SGLD"] = times["eager SGLD"] / times["SGLD"]
    show(
        f"  SGLD takes {times['SGLD'] / sgd:.2f} x the fastest SGD; eager SGLD {times['eager SGLD'] / times['SGLD']:.1f} x SGLD"
    )
    benchmark.pedantic(contenders["SGLD"], args=(0,), rounds=5)


@pytest.mark.filterwarnings("ignore:another live sampler")
def test_many_tensors(benchmark, threads, show):
    """ResNet-50's 161 tensors against one tensor of the same total: what launching costs."""
    many = _parameters(resnet50())
    total = sum(p.numel() for p in many)
    assert (len(many), total) == (161, 25_557_032)
    one, small = _parameters([(total,)]), _parameters([(64,)] * 161)
    contenders = {
        "161 tensors": _sgld(many, nonfinite="propagate"),
        "one tensor": _sgld(one, chain=1, nonfinite="propagate"),
        "161 tensors, SGD foreach": _sgd(many, foreach=True),
        "161 x 64 elements": _sgld(small, chain=2, nonfinite="propagate"),
        "161 x 64 elements, SGD foreach": _sgd(small, foreach=True),
    }
    table = Table(f"Langevin step of many tensors, {threads} thread{'s' * (threads > 1)}", "element")
    times = table.time("ResNet-50", contenders, total)
    show(table)
    benchmark.extra_info["161 tensors / one"] = times["161 tensors"] / times["one tensor"]
    benchmark.pedantic(contenders["161 tensors"], args=(0,), rounds=5)


@pytest.mark.filterwarnings("ignore:another live sampler")
@pytest.mark.parametrize("isa", native.isas())
def test_instruction_sets(benchmark, threads, show, isa):
    parameters = _parameters([(2**25,)])
    native.use_isa(isa)
    try:
        contenders = {
            "SGLD": Contender(_sgld(parameters, nonfinite="propagate")),
            "SGD foreach": _sgd(parameters, foreach=True),
        }
        table = Table(f"Langevin step, {isa}, {threads} thread{'s' * (threads > 1)}", "element")
        times = table.time("33,554,432 fp32", contenders, 2**25)
        show(table)
        benchmark.extra_info["SGLD / SGD foreach"] = times["SGLD"] / times["SGD foreach"]
        benchmark.pedantic(_sgld(parameters, nonfinite="propagate"), args=(0,), rounds=3)
    finally:
        native.use_isa(native.isas()[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moments", [False, True], ids=["plain", "moments"])
@pytest.mark.filterwarnings("ignore:sampling 16-bit")
def test_dtypes(benchmark, show, dtype, moments):
    elements = 2**24
    parameter = torch.randn(elements).to(dtype).requires_grad_()
    parameter.grad = torch.randn_like(parameter)
    sampler = bkd.SGLD([parameter], LR, num_data=NUM_DATA, nonfinite="propagate")
    if moments:
        sampler.track_moments()
    table = Table(f"Langevin step, {dtype}{', running moments' * moments}", "element")
    table.time(f"{elements:,}", {"SGLD": lambda _: sampler.step()}, elements)
    show(table)
    benchmark.pedantic(sampler.step, rounds=3)
