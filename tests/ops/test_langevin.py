"""The Langevin step against its exact reference, bit for bit: dtypes, options, odd sizes, memory orders, threads."""

import itertools

import pytest
import torch

from bkd_fast.ops import use_backend
from bkd_fast.ops.langevin import DTYPES, LangevinStep, find_nonfinite, langevin_step_

NOTHING = {"center": (), "mean": (), "m2": (), "nonfinite": None, "draws": 0}


def _step(theta, gradient, **settings):
    langevin_step_(LangevinStep(theta, gradient, **{**NOTHING, **settings}))


# empty, scalar, below and above one vector, one noise run, one buffer, one thread's chunk; channels_last; transposed
SHAPES = [(), (1,), (3,), (0,), (7, 129), (1000,), (64, 3, 3, 3), (17, 31), (70_001,)]
# a shard's offset: whole blocks, odd, and the block number's low word wrapping inside the last tensor
FIRST = [0, 0, 1, 0, 3, 4, 0, 2, 2**34 - 1000]


def _tensors(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    tensors[6] = tensors[6].to(memory_format=torch.channels_last)
    tensors[7] = tensors[7].t().contiguous().t()
    return tensors


def _run(dtype, decay, with_center, with_moments, sigma, lr=0.0137, steps=2, check=True):
    theta, gradient = _tensors(dtype, 1), _tensors(dtype, 2)
    gradient[4].view(-1)[5] = torch.nan if check else 1.0
    gradient[8][70_000] = torch.inf if check else 1.0
    center = _tensors(dtype, 3) if with_center else []
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    mean, m2 = ([torch.zeros_like(t, dtype=accumulator) for t in theta] if with_moments else [] for _ in range(2))
    nonfinite = torch.zeros(len(theta), dtype=torch.bool) if check else None
    before = [t.data_ptr() for t in theta]
    for draw in range(steps):
        _step(
            theta, gradient, lr=lr, decay=decay, sigma=sigma, seed=2**63 + 5, chain=2, step=2**32 - 1 + draw,
            parameters=range(3, 3 + len(theta)), first_elements=FIRST, center=center, mean=mean, m2=m2, draws=draw + 1,
            nonfinite=nonfinite,
        )  # fmt: skip
    assert [t.data_ptr() for t in theta] == before
    return theta + mean + m2 + ([nonfinite] if check else [])


OPTIONS = [
    (decay, center, moments, sigma)
    for decay, center, moments, sigma in itertools.product((0.0, 0.1), (False, True), (False, True), (0.0, 0.03))
    if decay or not center
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option_equals_the_reference(dtype, isa, two_threads):
    for options in OPTIONS:
        got = _run(dtype, *options)
        with use_backend("reference"):
            expected = _run(dtype, *options)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b), options


def test_without_the_check_values_propagate(isa):
    theta, gradient = [torch.zeros(300)], [torch.zeros(300)]
    gradient[0][7] = torch.nan
    _step(theta, gradient, lr=0.1, decay=0.0, sigma=0.1, seed=0, chain=0, step=0, parameters=[0], first_elements=[0])
    assert theta[0].isnan().nonzero().flatten().tolist() == [7]


def test_negated_lr_and_decay_equal_a_negated_gradient(isa):
    generator = torch.Generator().manual_seed(0)
    theta, gradient = torch.randn(999, generator=generator), torch.randn(999, generator=generator)
    up, down = theta.clone(), theta.clone()
    settings = {"sigma": 0.1, "seed": 0, "chain": 0, "step": 0, "parameters": [0], "first_elements": [0]}
    _step([up], [gradient], lr=-0.1, decay=-0.3, **settings)
    _step([down], [-gradient], lr=0.1, decay=0.3, **settings)
    assert torch.equal(up, down)


def test_the_number_of_threads_changes_nothing():
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(_run(torch.float32, 0.1, True, True, 0.03))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_rounds_to_nearest_even(dtype, isa):
    """Every value of a 16-bit format survives a step that does nothing, and a known step rounds as torch rounds."""
    if dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()].clone()
    else:
        every = torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=dtype)
    gradient = torch.randn(every.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    settings = {"decay": 0.0, "sigma": 0.0, "seed": 0, "chain": 0, "step": 0, "parameters": [0], "first_elements": [0]}
    still = every.clone()
    _step([still], [torch.zeros_like(every)], lr=1.0, **settings)
    assert torch.equal(
        still.view(torch.int16) if dtype.itemsize == 2 else still,
        every.view(torch.int16) if dtype.itemsize == 2 else every,
    )
    moved = every.clone()
    _step([moved], [gradient], lr=0.5, **settings)  # a power of two: the product is exact, one rounding is left
    real = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(moved, (every.to(real) - 0.5 * gradient.to(real)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_find_nonfinite(dtype, bad, isa, two_threads):
    tensors = _tensors(dtype, 4)
    assert not find_nonfinite(tensors).any()
    tensors[5][999] = bad
    tensors[8][69_999] = bad
    assert find_nonfinite(tensors).nonzero().flatten().tolist() == [5, 8]


SETTINGS = {
    "lr": 0.1,
    "decay": 0.0,
    "sigma": 0.1,
    "seed": 0,
    "chain": 0,
    "step": 0,
    "parameters": [0],
    "first_elements": [0],
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"theta": [torch.zeros(4, dtype=torch.int32)]}, TypeError, r"theta has dtype torch\.int32"),
        ({"theta": [torch.zeros(4, 4)[:, ::2]], "gradient": [torch.zeros(4, 2)]}, ValueError, r"strides"),
        ({"gradient": [torch.zeros(5)]}, ValueError, r"gradient\[0\] has shape \(5,\)"),
        ({"gradient": [torch.zeros(4, dtype=torch.float64)]}, TypeError, r"gradient\[0\] has dtype torch\.float64"),
        ({"gradient": []}, ValueError, "gradient has 0 tensors"),
        ({"center": [torch.zeros(3)]}, ValueError, r"center\[0\]"),
        ({"mean": [torch.zeros(4)]}, ValueError, "m2 has 0 tensors"),
        ({"mean": [torch.zeros(4)], "m2": [torch.zeros(4)], "draws": 0}, ValueError, "draws = 0"),
        ({"parameters": []}, ValueError, "parameters and first_elements"),
        ({"first_elements": [2**38 - 3]}, ValueError, "ends at element"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message):
    arguments = {"theta": [torch.ones(4)], "gradient": [torch.ones(4)], **SETTINGS, **change}
    before = [t.clone() for t in arguments["theta"]]
    with pytest.raises(error, match=message):
        _step(arguments.pop("theta"), arguments.pop("gradient"), **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, change.get("theta", [torch.ones(4)]), strict=True))


def test_opcheck():
    def tensors():
        return [torch.randn(5), torch.randn(3, 2)]

    arguments = (tensors(), tensors(), [], tensors(), tensors(), torch.zeros(2, dtype=torch.bool))
    arguments += (0.1, 0.01, 0.2, 3, 0, 7, [0, 1], [0, 0], 2, [], None, None, None, "sgld", [], [], [], 1)
    torch.library.opcheck(torch.ops.bkd_fast.langevin_step_, arguments)
    torch.library.opcheck(torch.ops.bkd_fast.find_nonfinite, (tensors(),))


def test_a_compiled_function_holds_the_step_without_a_break():
    """And draws the noise of the step that it is given, whatever the step at which it was compiled."""

    def step(theta, gradient, number):
        scaled = [2 * g for g in gradient]
        torch.ops.bkd_fast.langevin_step_(
            theta,
            scaled,
            [],
            [],
            [],
            None,
            0.1,
            0.01,
            0.2,
            3,
            0,
            number,
            [0, 1],
            [0, 0],
            0,
            [],
            None,
            None,
            None,
            "sgld",
            [],
            [],
            [],
            1,
        )
        return find_nonfinite(scaled)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        theta = [torch.ones(5), torch.ones(3, 2)]
        for number in (7, 8):
            assert not function(theta, [torch.ones(5), torch.ones(3, 2)], number).any()
        results.append(theta)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_devices_that_differ_are_named():
    theta, there = torch.ones(4), torch.ones(4, device="meta")
    with pytest.raises(ValueError, match=r"gradient\[0\] is on meta: must be on cpu, as theta\[0\]"):
        _step([theta], [there], **SETTINGS)


@pytest.mark.parametrize(
    ("name", "tensor", "error"),
    [
        ("scalars", torch.zeros(3, dtype=torch.float64), TypeError),
        ("scalars", torch.zeros(2), ValueError),
        ("clock", torch.zeros((), dtype=torch.int32), TypeError),
        ("clock", torch.zeros(1, dtype=torch.int64), ValueError),
        ("nonfinite", torch.zeros(2, dtype=torch.bool), ValueError),
    ],
)
def test_bad_device_numbers_change_nothing(name, tensor, error):
    theta = torch.ones(4)
    with pytest.raises(error, match=name):
        _step([theta], [torch.ones(4)], **{**SETTINGS, name: tensor})
    assert torch.equal(theta, torch.ones(4))
