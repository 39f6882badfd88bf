"""The noise and the Langevin step on a GPU: bits against the CPU, CUDA graphs, streams, and no waiting for the GPU."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import bkd_fast as bkd
from bkd_fast.noise import normal
from bkd_fast.ops import backends, use_backend
from bkd_fast.ops.langevin import DTYPES, LangevinStep, langevin_step_
from bkd_fast.ops.reference import noise as reference
from bkd_fast.ops.rounding import TABLE_SIZES, noise_table

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
if backends()["triton"].missing is not None:
    pytest.skip(f"triton: {backends()['triton'].missing}", allow_module_level=True)

import triton
import triton.language as tl

from bkd_fast.kernels.noise import normal_pair


@pytest.fixture(autouse=True)
def triton_backend():
    with use_backend("triton"):
        yield


# ---- bits ----


def _radius_words() -> np.ndarray:
    """One word for each of the distinct float32 values of |int32|: all below 2^24, then 2^23 in each binade."""
    binades = [np.arange(2**23, dtype=np.uint64) * 2 ** (k + 1) + 2 ** (24 + k) for k in range(7)]
    return np.concatenate([np.arange(2**24, dtype=np.uint64), *binades, [2**31]]).astype(np.uint32)


@triton.jit
def _at_angle_zero(words, out, count, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    word = tl.load(words + index, mask=index < count, other=0)
    z, _ = normal_pair(word, word * 0)
    tl.store(out + index, z, mask=index < count)


def test_every_radius_gives_the_bits_of_the_reference():
    """At angle 0 a normal is the radius times 1 - 2^-24, which no two radii share: 75.5 million square roots and logarithms."""
    words = _radius_words()
    assert words.size == 2**24 + 7 * 2**23 + 1
    out = torch.full((words.size,), torch.nan, device="cuda")
    there = torch.from_numpy(words.view(np.int32)).cuda().view(torch.uint32)
    _at_angle_zero[(triton.cdiv(words.size, 1024),)](there, out, words.size, SIZE=1024, enable_fp_fusion=False)
    got = out.cpu().numpy().view(np.uint32)

    def differing(begin: int) -> int:
        part = words[begin : begin + 2**20]
        expected, _ = reference.normal_pair(part, np.zeros_like(part))
        return int((expected.view(np.uint32) != got[begin : begin + part.size]).sum())

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(differing, range(0, words.size, 2**20))) == 0


@pytest.mark.parametrize("first", [0, 3, 4 * 2**32 - 1_000_001, 2**38 - 5_000_000])
def test_millions_of_normals_equal_the_cpu(first):
    coordinates = {"seed": 2**63 + 7, "chain": 3, "step": 2**33 + 1, "parameter": 12, "offset": first}
    assert torch.equal(normal(5_000_000, device="cuda", **coordinates).cpu(), normal(5_000_000, **coordinates))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("moments", [False, True])
def test_a_step_of_many_tensors_equals_the_cpu(dtype, rounding, moments):
    if rounding != "nearest" and dtype not in TABLE_SIZES:
        pytest.skip("for 16-bit parameters")
    sizes = [1, 64, 5, 1_000_003, 4096, 300_000, 0, 77, *range(900, 1100)]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    runs = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(3)

        def draw(kind, device=device, generator=generator):
            return [torch.randn(size, generator=generator).to(kind).to(device) for size in sizes]

        theta, gradient, center, mean, m2, master = (draw(k) for k in (dtype, dtype, dtype, real, real, torch.float32))
        gradient[3][1_000_002] = torch.nan
        gradient[5][0] = torch.inf
        nonfinite = torch.zeros(len(sizes), dtype=torch.bool, device=device)
        for draws in (1, 2):
            langevin_step_(
                LangevinStep(
                    theta, gradient, center, mean if moments else [], m2 if moments else [], nonfinite, lr=0.013, decay=0.1,
                    sigma=0.003, seed=5, chain=1, step=7 + draws, parameters=range(len(sizes)),
                    first_elements=[k % 5 for k in range(len(sizes))], draws=draws,
                    master=master if rounding == "master" else [],
                    noise_table=noise_table(0.003, dtype).to(device) if rounding == "stochastic" else None,
                )
            )  # fmt: skip
        runs.append([t.cpu() for t in theta + mean + m2 + master] + [nonfinite.cpu()])
    assert runs[1][-1].nonzero().flatten().tolist() == [3, 5]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_more_than_two_to_the_31_elements():
    count = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 5 * count:
        pytest.skip(f"needs {5 * count / 2**30:.0f} GiB of free GPU memory")
    theta, gradient = (torch.zeros(count, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    langevin_step_(
        LangevinStep(
            [theta], [gradient], [], [], [], None, lr=0.1, decay=0.0, sigma=1.0, seed=9, chain=0, step=0, parameters=[0],
            first_elements=[0], draws=0,
        )
    )  # fmt: skip
    for first in (0, 2**31 - 2000, count - 2000):
        xi = normal(2000, seed=9, offset=first)
        assert torch.equal(theta[first : first + 2000].cpu(), xi.to(torch.bfloat16))


# ---- the sampler ----

SETTINGS = {"num_data": 37, "temperature": 0.7, "prior_precision": 0.3, "seed": 11}


def _parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sizes = (7, 30_000, 1, 4096)
    return [torch.randn(n, generator=generator).to(dtype).to(device).requires_grad_() for n in sizes]


def _set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        values = torch.randn(p.shape, generator=generator).to(p.dtype).to(p.device)
        p.grad = values if p.grad is None else p.grad.copy_(values)


def _on_the_cpu(steps, dtype=torch.float32, lrs=None, **settings):
    """The chain that everything below has to be equal to."""
    parameters = _parameters("cpu", dtype)
    sampler = bkd.SGLD(parameters, 0.1, nonfinite="record", **{**SETTINGS, **settings})
    for step in range(steps):
        _set_gradients(parameters, step)
        if lrs is not None:
            sampler.param_groups[0]["lr"] = lrs[step]
        sampler.step()
    return [p.detach() for p in parameters]


def _assert_equal(parameters, expected):
    assert all(torch.equal(p.detach().cpu(), e) for p, e in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capturable", [False, True])
def test_a_chain_equals_the_cpu(dtype, capturable):
    parameters = _parameters("cuda", dtype)
    sampler = bkd.SGLD(parameters, 0.1, capturable=capturable, **SETTINGS)
    for step in range(5):
        _set_gradients(parameters, step)
        sampler.step()
    _assert_equal(parameters, _on_the_cpu(5, dtype))


@pytest.mark.parametrize("capturable", [False, True])
def test_moved_gradients_are_noticed(capturable):
    parameters = _parameters("cuda")
    sampler = bkd.SGLD(parameters, 0.1, capturable=capturable, **SETTINGS)
    alive = []
    for step in range(6):
        sampler.zero_grad(set_to_none=True)
        alive.append(torch.empty(1000 * (step + 1), device="cuda"))  # what the allocator hands out next lies elsewhere
        _set_gradients(parameters, step)
        alive.append([p.grad for p in parameters] if step % 2 else None)
        sampler.step()
    _assert_equal(parameters, _on_the_cpu(6))


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_waits_for_nothing(capturable):
    parameters = _parameters("cuda")
    sampler = bkd.SGLD(parameters, 0.1, capturable=capturable, **SETTINGS)
    _set_gradients(parameters, 0)
    sampler.step()  # compiles
    gradients = [torch.zeros_like(p) for p in parameters]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            sampler.step()
        for p, g in zip(parameters, gradients, strict=True):  # a table of its own
            p.grad = g
        sampler.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sampler.state_dict()["param_groups"][0]["step"] == 5


def test_streams_take_turns():
    parameters = _parameters("cuda")
    sampler = bkd.SGLD(parameters, 0.1, **SETTINGS)
    streams = [torch.cuda.Stream() for _ in range(3)]
    last = torch.cuda.current_stream()
    for step in range(9):
        stream = streams[step % 3]
        stream.wait_stream(last)
        with torch.cuda.stream(stream):
            _set_gradients(parameters, step)
            sampler.step()
        last = stream
    torch.cuda.synchronize()
    _assert_equal(parameters, _on_the_cpu(9))


# ---- graphs ----


def _warm_up(sampler, parameters, work):
    """As torch's documentation asks: on a side stream, before the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_are_the_next_steps(dtype):
    parameters = _parameters("cuda", dtype)
    sampler = bkd.SGLD(parameters, 0.1, capturable=True, **SETTINGS)
    _set_gradients(parameters, 0)
    _warm_up(sampler, parameters, sampler.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.step()
    for step in range(1, 6):
        _set_gradients(parameters, step)
        graph.replay()
    _assert_equal(parameters, _on_the_cpu(6, dtype))
    assert sampler.state_dict()["param_groups"][0]["step"] == 6
    _set_gradients(parameters, 6)
    sampler.step()  # and an eager step goes on from there
    _assert_equal(parameters, _on_the_cpu(7, dtype))


def test_a_graph_follows_the_learning_rate():
    lrs = [0.1, 0.1, 0.05, 0.013, 0.0071]
    parameters = _parameters("cuda")
    sampler = bkd.SGLD(parameters, 0.1, capturable=True, **SETTINGS)
    _set_gradients(parameters, 0)
    _warm_up(sampler, parameters, sampler.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.step()
    for step in range(1, 5):
        sampler.param_groups[0]["lr"].fill_(lrs[step])
        _set_gradients(parameters, step)
        graph.replay()
    _assert_equal(parameters, _on_the_cpu(5, lrs=lrs))
    before = [p.detach().clone() for p in parameters]
    sampler.param_groups[0]["lr"].fill_(0.0)
    graph.replay()
    _assert_equal(parameters, [p.cpu() for p in before])
    assert sampler.state_dict()["param_groups"][0]["step"] == 5


def test_a_whole_training_step_in_a_graph():
    """Forward, backward and step, with gradients that the capture allocates: their table is built inside it."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(2)).cuda()

    def work(parameter, sampler):
        (0.5 * (parameter - x) ** 2).sum().backward()  # elementwise: the same bits eagerly and in a graph
        sampler.step()

    runs = []
    for captured in (False, True):
        parameter = torch.zeros(4096, device="cuda", requires_grad=True)
        sampler = bkd.SGLD([parameter], 0.1, capturable=captured, **SETTINGS)
        work(parameter, sampler)
        if captured:
            torch.cuda.synchronize()
            sampler.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work(parameter, sampler)
            for _ in range(4):
                graph.replay()  # the graph's gradients are written anew by each
        else:
            for _ in range(4):
                sampler.zero_grad(set_to_none=True)
                work(parameter, sampler)
        runs.append(parameter.detach().cpu())
    assert torch.equal(*runs)


def test_a_replay_records_what_is_not_finite():
    parameters = _parameters("cuda")
    named = [(f"p{k}", p) for k, p in enumerate(parameters)]
    sampler = bkd.SGLD(named, 0.1, capturable=True, **SETTINGS)
    _set_gradients(parameters, 0)
    _warm_up(sampler, parameters, sampler.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.step()
    graph.replay()
    sampler.check()
    before = parameters[1].detach().clone()
    parameters[1].grad[29_999] = torch.nan
    graph.replay()
    assert (parameters[1] == before).nonzero().flatten().tolist() == [29_999]
    with pytest.raises(bkd.NonFiniteError, match="'p1' had"):
        sampler.check()


@pytest.mark.parametrize(
    ("capturable", "warm", "message"),
    [(False, True, "capturable = False"), (True, False, "take one step with the same parameters before capturing")],
)
def test_captures_that_would_be_wrong_are_refused(capturable, warm, message):
    parameters = _parameters("cuda")
    sampler = bkd.SGLD(parameters, 0.1, capturable=capturable, **SETTINGS)
    _set_gradients(parameters, 0)
    if warm:
        sampler.step()
    before = [p.detach().cpu() for p in parameters]
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sampler.step()
    _assert_equal(parameters, before)
