"""The CUDA Langevin step on a GPU: bits equal to the CPU's and to Triton's, in graphs, on other streams, at odd addresses."""

from dataclasses import replace

import pytest
import torch

from bkd_fast.errors import KernelError
from bkd_fast.ops import use_backend
from bkd_fast.ops.langevin import DTYPES, LangevinStep, find_nonfinite, langevin_step_
from bkd_fast.ops.rounding import noise_table

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# empty, scalar, around a tile and a chunk; a shard's odd offset; the block number's low word wrapping inside
SIZES = [1, 3, 0, 511, 1024, 1025, 4096, 70_001, 262_147]
FIRST = [0, 0, 1, 3, 0, 2, 4, 2**34 - 1000, 1]

ROUNDINGS = {dtype: ["nearest"] for dtype in DTYPES} | {
    dtype: ["nearest", "stochastic", "master"] for dtype in (torch.bfloat16, torch.float16)
}
CASES = [(dtype, rounding) for dtype in DTYPES for rounding in ROUNDINGS[dtype]]
# decay, center, moments, sigma: each costs a compilation by both compilers, and tests/kernels runs the rest in an emulator
OPTIONS = [(0.0, False, False, 0.03), (0.1, True, True, 0.03), (0.1, False, False, 0.0)]


def a_step(dtype, rounding, device, decay=0.1, center=True, moments=True, sigma=0.03, seed=0, step=2**32 - 1):
    generator = torch.Generator().manual_seed(seed)

    def tensors(kind=dtype):
        return [torch.randn(size, generator=generator).to(kind).to(device) for size in SIZES]

    real = torch.float64 if dtype == torch.float64 else torch.float32
    theta, gradient = tensors(), tensors()
    gradient[3][7], gradient[7][-1] = torch.nan, -torch.inf
    return LangevinStep(
        theta,
        gradient,
        tensors() if center else [],
        tensors(real) if moments else [],
        tensors(real) if moments else [],
        nonfinite=torch.zeros(len(SIZES), dtype=torch.bool, device=device),
        lr=0.0137,
        decay=decay,
        sigma=sigma,
        seed=2**63 + 5,
        chain=3,
        step=step,
        parameters=range(3, 3 + len(SIZES)),
        first_elements=FIRST,
        draws=3,
        master=tensors(torch.float32) if rounding == "master" else [],
        noise_table=noise_table(sigma, dtype, torch.device(device)) if rounding == "stochastic" else None,
    )


def written(s):
    return [tensor.cpu() for group in (s.theta, s.mean, s.m2, s.master) for tensor in group] + [s.nonfinite.cpu()]


def assert_equal(one, other, why=None):
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), (i, why)


@pytest.mark.parametrize(("dtype", "rounding"), CASES)
def test_the_bits_are_the_cpus_and_tritons(dtype, rounding):
    for seed, options in enumerate(OPTIONS):
        if rounding == "stochastic" and options[3] == 0:
            continue
        results = []
        for backend, device in (("cuda", "cuda"), ("triton", "cuda"), ("cpp", "cpu")):
            s = a_step(dtype, rounding, device, *options, seed=seed)
            with use_backend(backend):
                langevin_step_(s)
            results.append(written(s))
        assert_equal(results[0], results[2], options)
        assert_equal(results[0], results[1], options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_into_a_bucket(dtype):
    """Gradients at addresses that are no multiples of 16 bytes, as data-parallel training lays them."""
    s = a_step(dtype, "nearest", "cuda", seed=1)
    expected = a_step(dtype, "nearest", "cuda", seed=1)
    bucket = torch.full((sum(SIZES) + 2,), torch.nan, dtype=dtype, device="cuda")
    at = 1
    for i, gradient in enumerate(s.gradient):
        view = bucket[at : at + gradient.numel()]
        view.copy_(gradient)
        s.gradient[i] = view
        at += gradient.numel()
    with use_backend("cuda"):
        langevin_step_(s)
        langevin_step_(expected)
    assert_equal(written(s), written(expected))


def test_a_graph_replays_with_fresh_noise_and_a_schedule():
    eager, captured = (a_step(torch.float32, "nearest", "cuda", moments=False, seed=2) for _ in range(2))
    numbers = [(0.01, 0.1, 0.02), (0.005, 0.1, 0.01), (0.02, 0.1, 0.04)]
    with use_backend("cuda"):
        for k, (lr, decay, sigma) in enumerate(numbers):
            langevin_step_(replace(eager, lr=lr, decay=decay, sigma=sigma, step=7 + k))
        scalars, clock = torch.tensor(numbers[0], device="cuda"), torch.tensor(7, device="cuda")
        step = replace(captured, scalars=scalars, clock=clock)
        warm = a_step(torch.float32, "nearest", "cuda", moments=False, seed=2)
        langevin_step_(replace(warm, scalars=scalars, clock=clock))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            langevin_step_(step)
        for k, row in enumerate(numbers):
            scalars.copy_(torch.tensor(row))
            clock.fill_(7 + k)
            graph.replay()
    assert_equal(written(eager), written(captured))


def test_nothing_waits_for_the_gpu():
    s = a_step(torch.float32, "nearest", "cuda", seed=3)
    with use_backend("cuda"):
        langevin_step_(s)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            langevin_step_(s)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def test_it_runs_on_the_current_stream():
    """A step on a side stream is ordered after slow work there and nowhere else."""
    s, expected = (a_step(torch.float32, "nearest", "cuda", seed=4) for _ in range(2))
    with use_backend("cuda"):
        langevin_step_(expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        saved = [gradient.clone() for gradient in s.gradient]
        for gradient in s.gradient:
            gradient.zero_()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            for gradient, value in zip(s.gradient, saved, strict=True):
                gradient.copy_(value)
            langevin_step_(s)
        torch.cuda.current_stream().wait_stream(stream)
    assert_equal(written(s), written(expected))


def test_a_first_launch_inside_a_capture_is_refused():
    from bkd_fast.kernels import cuda

    cuda._load.cache_clear()
    s = a_step(torch.float64, "nearest", "cuda", seed=5)
    before = written(s)
    with use_backend("cuda"):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises((KernelError, RuntimeError), match="captur"), torch.cuda.graph(graph):
            langevin_step_(s)
    torch.cuda.synchronize()
    assert_equal(written(s), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_find_nonfinite(dtype, bad):
    tensors = [torch.randn(size, device="cuda").to(dtype) for size in SIZES]
    with use_backend("cuda"):
        assert not find_nonfinite(tensors).any()
        tensors[0][0], tensors[7][-1], tensors[8][131_072] = bad, bad, bad
        assert find_nonfinite(tensors).nonzero().flatten().tolist() == [0, 7, 8]
        views = [tensor[1:] for tensor in tensors if tensor.numel() > 1]
        assert find_nonfinite(views).nonzero().flatten().tolist() == [5, 6]
