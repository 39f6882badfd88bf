"""Every sampler's step per byte that it moves, against SGLD's; and many chains in one launch against as many optimizers."""

import itertools

import pytest
import torch
from interleaved import Table
from torch import nn

import bkd_fast as bkd
from bkd_fast.ops.rules import bytes_per_parameter

SETTINGS = {"lr": 1e-3, "num_data": 50_000, "nonfinite": "propagate"}
SAMPLERS = {
    "SGLD": (bkd.SGLD, {}),
    "SGHMC": (bkd.SGHMC, {}),
    "BAOAB": (bkd.BAOAB, {"friction": 200.0}),
    "PSGLD": (bkd.PSGLD, {}),
    "SGNHT": (bkd.SGNHT, {}),
    "AdamSGHMC": (bkd.AdamSGHMC, {}),
}


def _parameter(*shape):
    parameter = torch.randn(*shape).requires_grad_()
    parameter.grad = torch.randn_like(parameter)
    return parameter


@pytest.mark.filterwarnings("ignore:another live sampler")
@pytest.mark.parametrize("elements", [2**18, 2**24])
def test_bytes(benchmark, threads, show, elements):
    """From memory (16 M elements) and from the cache (256 k)."""
    samplers = {
        name: sampler_class([_parameter(elements)], **SETTINGS, **settings)
        for name, (sampler_class, settings) in SAMPLERS.items()
    }
    contenders = {name: lambda _, s=sampler: s.step() for name, sampler in samplers.items()}
    for kind in ("foreach", "fused"):
        sgd = torch.optim.SGD([_parameter(elements)], 1e-3, momentum=0.9, **{kind: True})
        adam = torch.optim.Adam([_parameter(elements)], 1e-3, **{kind: True})
        contenders[f"SGD momentum {kind}"] = lambda _, o=sgd: o.step()
        contenders[f"Adam {kind}"] = lambda _, o=adam: o.step()
    table = Table(f"samplers, {threads} thread{'s' * (threads > 1)}", "element")
    times = table.time(f"{elements:,} fp32", contenders, elements, repeats=15, seconds=20.0)
    show(table)
    per_byte = {name: times[name] / bytes_per_parameter(SAMPLERS[name][0].rule) for name in SAMPLERS}
    for name, cost in per_byte.items():
        ratio = cost / per_byte["SGLD"]
        benchmark.extra_info[f"{name} per byte / SGLD per byte"] = ratio
        show(f"  {name}: {bytes_per_parameter(SAMPLERS[name][0].rule)} bytes, {ratio:.2f} x SGLD's time per byte")
    benchmark.pedantic(samplers["SGHMC"].step, rounds=3)


@pytest.mark.filterwarnings("ignore:another live sampler")
@pytest.mark.parametrize(("tensors", "elements"), [(161, 64), (6, 1000)])
def test_host_time(benchmark, threads, show, tensors, elements):
    """Small tensors, where what the host does for each is what takes time."""
    contenders = {}
    for name, (sampler_class, settings) in SAMPLERS.items():
        sampler = sampler_class([_parameter(elements) for _ in range(tensors)], **SETTINGS, **settings)
        contenders[name] = lambda _, s=sampler: s.step()
    for name, make, own in (
        ("SGD fused", torch.optim.SGD, {}),
        ("SGD momentum fused", torch.optim.SGD, {"momentum": 0.9}),
        ("Adam fused", torch.optim.Adam, {}),
    ):
        optimizer = make([_parameter(elements) for _ in range(tensors)], 1e-3, fused=True, **own)
        contenders[name] = lambda _, o=optimizer: o.step()
    table = Table(f"a step's host time, {threads} thread{'s' * (threads > 1)}", "step")
    table.time(f"{tensors} tensors of {elements}", contenders, 1, seconds=5.0)
    show(table)
    benchmark.pedantic(contenders["SGLD"], args=(0,), rounds=5)


@pytest.mark.filterwarnings("ignore:another live sampler")
def test_chains(benchmark, threads, show):
    """64 chains of a small network: the samplers' steps alone, and with forward and backward passes."""
    chains, layers = 64, (20, 32, 32, 5)

    def network(seed):
        torch.manual_seed(seed)
        pairs = itertools.pairwise(layers)
        return nn.Sequential(*(part for i, o in pairs for part in (nn.Linear(i, o), nn.Tanh())))

    networks = [network(k) for k in range(chains)]
    stacked = bkd.StackedModule(networks)
    together = bkd.SGLD(stacked.parameters(), chains=chains, **SETTINGS)
    alone = [bkd.SGLD(n.parameters(), chain=k, **SETTINGS) for k, n in enumerate(networks)]
    x = torch.randn(100, layers[0])

    def backward_of(model):
        model.zero_grad()
        model(x).square().mean().backward()

    def step_together(_):
        backward_of(stacked)
        together.step()

    def step_alone(_):
        for model, sampler in zip(networks, alone, strict=True):
            backward_of(model)
            sampler.step()

    step_together(0)
    step_alone(0)
    contenders = {
        "one sampler's step": lambda _: together.step(),
        "64 samplers' steps": lambda _: [sampler.step() for sampler in alone],
        "one, with passes": step_together,
        "64, with passes": step_alone,
    }
    table = Table(f"64 chains of a network of {sum(p.numel() for p in networks[0].parameters())} parameters", "chain")
    times = table.time(f"{threads} thread{'s' * (threads > 1)}", contenders, chains)
    show(table)
    for ours, theirs in (("one sampler's step", "64 samplers' steps"), ("one, with passes", "64, with passes")):
        benchmark.extra_info[f"{theirs} / {ours}"] = times[theirs] / times[ours]
        show(f"  {theirs} take {times[theirs] / times[ours]:.1f} x {ours}")
    benchmark.pedantic(together.step, rounds=5)
