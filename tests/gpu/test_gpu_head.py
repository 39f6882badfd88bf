"""The head step on a GPU: against the reference on a CPU, noise bit for bit, nothing that waits, large heads, faults, graphs."""

from dataclasses import replace

import head_cases
import pytest
import torch

import bkd_fast as bkd
from bkd_fast.ops.faults import check_faults
from bkd_fast.ops.head import head_step_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(step):
    tensors = {name: value.cuda() for name, value in vars(step).items() if isinstance(value, torch.Tensor)}
    return replace(step, **tensors)


def gpu_step(step):
    """Take a CPU step on the GPU, and bring the heads back."""
    there = on_gpu(step)
    energy, nonfinite = head_step_(there)
    step.weight.copy_(there.weight)
    if step.bias is not None:
        step.bias.copy_(there.bias)
    return energy.cpu(), nonfinite.cpu()


@pytest.fixture(autouse=True)
def poisoned():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty hands out NaN
    yield
    torch.use_deterministic_algorithms(False)
    check_faults()


@pytest.mark.parametrize("changed", head_cases.TERMS, ids=str)
def test_every_term_equals_the_reference(changed):
    head_cases.assert_step_equals_reference(head_cases.case(**changed), gpu_step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "chains, rows, classes, features",
    [
        (1, 1, 2, 1),
        (3, 33, 10, 64),
        (8, 256, 10, 512),
        (2, 70, 100, 37),
        (2, 511, 1000, 2047),
        (1, 300, 1000, 2048),
        (1, 9, 33_000, 20),
    ],
)
def test_every_size_equals_the_reference(chains, rows, classes, features, dtype):
    head_cases.assert_step_equals_reference(head_cases.case(chains, rows, classes, features, x=dtype), gpu_step)


@pytest.mark.parametrize("features", [1, 36, 37, 38, 39, 129, 2048])
@pytest.mark.parametrize("classes", [7, 100])
def test_noise_is_that_of_the_cpu_bit_for_bit(features, classes):
    head_cases.assert_noise_is_exact(head_cases.case(3, 20, classes, features), gpu_step)


def test_more_chains_than_a_grid_has_rows():
    """70,000 chains: past the limit of a grid's second and third dimension."""
    step = head_cases.case(70_000, 3, 2, 4)
    there = on_gpu(step)
    head_step_(there)
    head_step_(step)
    torch.testing.assert_close(there.weight.cpu(), step.weight, rtol=0, atol=3e-7)


def test_nothing_waits_for_the_device():
    step = on_gpu(head_cases.case())
    head_step_(step)
    sampler = bkd.LinearHeadSampler(36, 10, lr=0.1, num_data=50, chains=4, prior_strength=2.0, device="cuda")
    sampler.step(step.x, step.target, step.teacher)
    torch.cuda.set_sync_debug_mode("error")
    try:
        head_step_(step)
        sampler.step(step.x, step.target, step.teacher)
        sampler.logits(step.x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_faults_are_recorded():
    step = on_gpu(head_cases.case(sigma=0.0))
    before = step.weight.clone()
    step.target[5] = 10
    energy, nonfinite = head_step_(step)
    assert energy.isnan().all() and not nonfinite.any() and step.weight.isfinite().all()
    assert not torch.equal(step.weight, before)
    with pytest.raises(ValueError, match=r"target\[5\] = 10"):
        check_faults()


def test_a_sampler_on_the_gpu_is_the_one_on_the_cpu():
    step = head_cases.case(1, 200, 10, 64)
    samplers = [
        bkd.LinearHeadSampler(64, 10, lr=0.1, num_data=500, chains=4, prior_strength=2.0, device=device)
        for device in ("cpu", "cuda")
    ]
    for _ in range(10):
        for sampler in samplers:
            sampler.step(*(t.to(sampler.weight.device) for t in (step.x, step.target, step.teacher)))
    torch.testing.assert_close(samplers[1].weight.cpu(), samplers[0].weight, rtol=0, atol=1e-5)


def test_a_captured_step_replays():
    """A graph holds the step's numbers, its noise too: it is of use at temperature 0 (a warm start)."""
    step = on_gpu(head_cases.case(sigma=0.0))
    eager = head_cases.copy(step)
    head_step_(
        replace(step, weight=step.weight.clone(), bias=step.bias.clone())
    )  # compiles, and makes the fault register
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        head_step_(step)
    for _ in range(3):
        graph.replay()
        head_step_(eager)
    assert torch.equal(step.weight, eager.weight) and torch.equal(step.bias, eager.bias)
