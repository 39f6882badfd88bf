"""Steps by every rule of csrc/rules.h on awkward tensors, for the tests of each backend."""

import contextlib
import itertools

import torch

from bkd_fast.ops import use_backend
from bkd_fast.ops.langevin import LangevinStep, langevin_step_
from bkd_fast.ops.rules import RULES

# below, at and above the vector kernel's runs and the buffers; a shard's odd start; the block number's low word wrapping
SHAPES = [(), (3,), (0,), (7, 129), (70_001,), (2, 3, 4, 5)]
FIRST = [0, 1, 0, 3, 2**34 - 1000, 0]
OWN = {
    "sgld": [],
    "sghmc": [0.9, 0.8],
    "nesterov": [0.9, 1.0],
    "rmsprop": [0.95, 0.05, 1e-3],
    "adam": [0.9, 0.1, 0.99, 0.01, 1e-3, 1.7],
    "sgnht": [-0.02, 0.01],
    "baoab": [0.9, 0.04],
}


def real_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors_of(shapes, dtype, seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    if made[5].dim() == 4:
        made[5] = made[5].to(memory_format=torch.channels_last)
    return [tensor.to(device) for tensor in made]


def run_rule(rule, dtype, *, decay=0.1, center=True, moments=True, sigma=0.03, check=True, master=False, steps=2, device="cpu",
             shapes=SHAPES, first_elements=FIRST, **settings):  # fmt: skip
    """Everything that two steps change."""
    theta, gradient = tensors_of(shapes, dtype, 1, device), tensors_of(shapes, dtype, 2, device)
    if check:
        gradient[3].view(-1)[5] = torch.nan
        gradient[4].view(-1)[-1] = -torch.inf
    real = real_of(dtype)
    states = [[t.abs_() for t in tensors_of(shapes, real, 3 + k, device)] for k in range(RULES[rule].states)]
    mean, m2 = (tensors_of(shapes, real, 6, device), tensors_of(shapes, real, 7, device)) if moments else ([], [])
    masters = tensors_of(shapes, torch.float32, 8, device) if master else []
    flags = torch.zeros(len(theta), dtype=torch.bool, device=device) if check else None
    for step in range(steps):
        langevin_step_(
            LangevinStep(
                theta, gradient, tensors_of(shapes, dtype, 9, device) if center else [], mean, m2, flags,
                **{"lr": 0.0137, "decay": decay, "sigma": sigma, "seed": 2**63 + 5, "chain": 2, "step": 2**32 - 1 + step,
                   "parameters": range(3, 3 + len(theta)), "first_elements": first_elements, "draws": 3 + step,
                   "master": masters, "rule": rule, "first": (*states, [], [])[0], "second": (*states, [], [])[1],
                   "own": OWN[rule], **settings},
            )
        )  # fmt: skip
    changed = [*theta, *itertools.chain(*states), *mean, *m2, *masters]
    return [t.cpu() for t in changed + ([flags] if check else [])]


def assert_same_bits(got, expected):
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])), (
            number
        )


def compare(rule, dtype, backend=None, device="cpu", **options):
    """A backend (None: the default one) against the reference."""
    with use_backend(backend) if backend else contextlib.nullcontext():
        got = run_rule(rule, dtype, device=device, **options)
    with use_backend("reference"):
        assert_same_bits(got, run_rule(rule, dtype, **options))
