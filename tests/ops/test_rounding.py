"""Steps of 16-bit parameters: the bits of stochastic rounding and of masters, the law of a step, the table of its noise."""

import functools
import itertools
import math
import time

import numpy as np
import pytest
import stats
import torch
from scipy.special import ndtr
from scipy.stats import chi2

from bkd_fast.ops import use_backend
from bkd_fast.ops.langevin import LangevinStep, langevin_step_
from bkd_fast.ops.rounding import TABLE_SIZES, noise_table

DTYPES = list(TABLE_SIZES)
SETTINGS = {
    "center": (), "mean": (), "m2": (), "nonfinite": None, "lr": 1.0, "decay": 0.0, "sigma": 0.0, "seed": 0, "chain": 0,
    "step": 0, "parameters": [0], "first_elements": [0], "draws": 0,
}  # fmt: skip
# V / u^2 of docs/samplers.md §6: from rare jumps between neighbours to noise of many spacings
VARIANCES = [0.02, 0.1, 0.18, 0.3, 1.0, 10.0]


def _step(theta, gradient, **settings):
    langevin_step_(LangevinStep(theta, gradient, **{**SETTINGS, **settings}))


def _every_finite(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return every[every.isfinite()].clone()


def _assert_same_bits(a, b, what=""):
    if a.dtype.itemsize == 2:
        a, b = a.view(torch.int16), b.view(torch.int16)
    assert torch.equal(a, b), what


# ---- bits ----

# empty, scalar, below and above a vector, a noise run and a buffer; channels_last; transposed
SHAPES = [(), (3,), (0,), (7, 129), (1025,), (16, 3, 3, 3), (17, 31), (9_001,)]
FIRST = [0, 1, 0, 3, 4, 0, 2, 2**34 - 1000]  # the last: the block number's low word wraps inside


def _tensors(dtype, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]
    tensors[5] = tensors[5].to(memory_format=torch.channels_last)
    tensors[6] = tensors[6].t().contiguous().t()
    return tensors


def _two_steps(dtype, rounding, decay, with_center, with_moments, check):
    theta, gradient = _tensors(dtype, 1), _tensors(dtype, 2)
    theta[3] *= 1e-5  # float16's subnormals
    if check:
        gradient[3].view(-1)[5] = torch.nan
        gradient[7][9_000] = torch.inf
    center = _tensors(dtype, 3) if with_center else []
    mean, m2 = ([torch.zeros_like(t, dtype=torch.float32) for t in theta] if with_moments else [] for _ in range(2))
    master = [t.float() for t in theta] if rounding == "master" else []
    table = noise_table(0.003, dtype) if rounding == "stochastic" else None
    nonfinite = torch.zeros(len(theta), dtype=torch.bool) if check else None
    for draw in range(2):
        _step(
            theta, gradient, lr=0.0137, decay=decay, sigma=0.003, seed=2**63 + 5, chain=2, step=2**32 - 1 + draw,
            parameters=range(3, 3 + len(theta)), first_elements=FIRST, center=center, mean=mean, m2=m2, draws=draw + 1,
            nonfinite=nonfinite, master=master, noise_table=table,
        )  # fmt: skip
    return theta + mean + m2 + master + ([nonfinite] if check else [])


OPTIONS = [
    (decay, center, moments, check)
    for decay, center, moments, check in itertools.product((0.0, 0.1), (False, True), (False, True), (False, True))
    if decay or not center
]


@functools.cache  # the same for every instruction set
def _expected_of_two_steps(dtype, rounding, *options):
    with use_backend("reference"):
        return _two_steps(dtype, rounding, *options)


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option_equals_the_reference(dtype, rounding, isa, two_threads):
    for options in OPTIONS:
        expected = _expected_of_two_steps(dtype, rounding, *options)
        for a, b in zip(_two_steps(dtype, rounding, *options), expected, strict=True):
            _assert_same_bits(a, b, options)


FACTORS = [1.0, 1.001, math.pi, 1e-4, 2.0**-9]


def _products(dtype, lr, step):
    gradient = torch.cat([_every_finite(dtype), torch.tensor([torch.inf, -torch.inf], dtype=dtype)])
    theta = [torch.zeros_like(gradient), gradient.flip(0)]
    theta[1][:2] = 0  # an infinity less another is no number
    for start in theta:
        _step([start], [gradient], lr=lr, step=step, noise_table=torch.zeros(TABLE_SIZES[dtype]))
    return theta


@functools.cache
def _expected_products(dtype, lr, step):
    with use_backend("reference"):
        return _products(dtype, lr, step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_rounds_as_the_definition_says(dtype, isa):
    """Sums and products of every 16-bit number: subnormals, both ends of every binade, beyond the largest, infinities."""
    for number, lr in enumerate(FACTORS):
        for got, expected in zip(_products(dtype, lr, number), _expected_products(dtype, lr, number), strict=True):
            _assert_same_bits(got, expected, lr)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_values_stay(dtype, isa):
    every = _every_finite(dtype)
    theta = every.clone()
    _step([theta], [torch.zeros_like(every)], noise_table=torch.zeros(TABLE_SIZES[dtype]))
    _assert_same_bits(theta, every)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_finite_number_never_becomes_infinite(dtype, isa):
    """One float32 below and above the largest number, and twice it where float32 has that: 4096 roundings of each."""
    largest = torch.finfo(dtype).max
    for factor in (1 - 2**-20, 1 + 2**-10, 2.0 if dtype == torch.float16 else 1 + 2**-9):
        for sign in (1, -1):
            gradient = torch.full((4096,), -sign * largest, dtype=dtype)
            theta = torch.zeros_like(gradient)
            _step([theta], [gradient], lr=factor, noise_table=torch.zeros(TABLE_SIZES[dtype]))
            assert theta.isfinite().all()
            assert (sign * theta).max() == largest
            if factor > 1:
                assert (sign * theta).min() == largest
    theta = torch.full((64,), largest, dtype=dtype)
    _step([theta], [torch.full_like(theta, -largest)], lr=1e30 if dtype == torch.bfloat16 else 1e36,
          noise_table=torch.zeros(TABLE_SIZES[dtype]))  # fmt: skip
    assert (theta == torch.inf).all()  # infinite in float32 already: not hidden


def test_a_master_is_the_float32_chain(isa):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(5003, generator=generator)
    for dtype in DTYPES:
        theta, master, plain = start.to(dtype), start.clone(), start.clone()
        for step in range(20):
            gradient = torch.randn(start.shape, generator=generator).to(dtype)
            settings = {"lr": 0.01, "decay": 0.1, "sigma": 1e-4, "step": step}
            _step([theta], [gradient], master=[master], **settings)
            _step([plain], [gradient.float()], **settings)
        assert torch.equal(master, plain)
        assert torch.equal(theta, plain.to(dtype))


# ---- the law of a step ----


def _law(offset, s, reach):
    """P(theta' = k u), k = -reach .. reach, of noise s u around offset u and stochastic rounding.

    Rounding to k has the probability hat(y / u - k), hat the triangle of width 2: the second difference of E max(x + s xi, 0).
    """
    x = offset - np.arange(-reach - 1, reach + 2)
    ramp = x * ndtr(x / s) + s * np.exp(-((x / s) ** 2) / 2) / math.sqrt(2 * math.pi)
    return ramp[:-2] - 2 * ramp[1:-1] + ramp[2:]


def _assert_law(counts, probabilities, what):
    """Pearson's chi-square over the outcomes that are expected 25 times or more, the rest as one; false alarms 1e-6."""
    expected = counts.sum() * probabilities
    often = expected >= 25
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], max(counts.sum() - expected[often].sum(), 1.0))
    statistic = float(((observed - expected) ** 2 / expected).sum())
    bound = float(chi2.isf(1e-6, len(expected) - 1))
    assert statistic < bound, f"{what}: chi-square {statistic:.1f}, the bound is {bound:.1f}"


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_has_the_law_of_noise_rounded_at_random(dtype, variance):
    """Two million parameters at 1.5, in the middle of a binade: every outcome as often as noise and rounding make it."""
    size, spacing = 2_000_000, torch.finfo(dtype).eps
    table = noise_table(math.sqrt(variance) * spacing, dtype)
    s = float(table[TABLE_SIZES[dtype] // 2 - 1]) / spacing  # numbers in [1, 2)
    reach = math.ceil(7 * s) + 2
    for offset in (0.0, 0.3):
        theta = torch.full((size,), 1.5, dtype=dtype)
        _step([theta], [torch.ones_like(theta)], lr=-offset * spacing, noise_table=table, seed=17)
        moved = ((theta.double() - 1.5) / spacing).to(torch.int64)
        assert moved.abs().max() <= reach
        counts = torch.bincount(moved + reach, minlength=2 * reach + 1).numpy()
        _assert_law(counts, _law(offset, s, reach), f"V = {variance} u^2, offset {offset} u")
        if offset == 0:
            squares = moved.double().square().numpy()
            stats.assert_mean(squares, variance, float(squares.std()), f"V = {variance} u^2: square")


def test_rounding_uses_words_of_its_own():
    """Rounding up is independent of the noise, of the neighbour, of the step and of the parameter; half the time at half."""
    size, ups = 1_000_000, []
    table = torch.zeros(TABLE_SIZES[torch.bfloat16])
    for step, parameter in ((0, 0), (1, 0), (0, 1)):
        theta = torch.ones(size, dtype=torch.bfloat16)
        _step([theta], [theta.clone()], lr=-(2.0**-8), noise_table=table, step=step, parameters=[parameter])
        ups.append((theta > 1).numpy())
    stats.assert_mean(ups[0], 0.5, 0.5, "half way")
    for name, other in (("step", ups[1]), ("parameter", ups[2]), ("neighbour", np.roll(ups[0], 1))):
        stats.assert_uncorrelated(ups[0], other, name)
    noise = torch.zeros(size)
    _step([noise], [noise.clone()], sigma=1.0)
    stats.assert_uncorrelated(ups[0], noise.numpy(), "noise")
    stats.assert_uncorrelated(ups[0], np.abs(noise.numpy()), "size of the noise")


# ---- the table ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_table_solves_the_equation(dtype):
    """Noise and rounding have the variance asked for, to 1e-6, by the law above: another way than the table's own series."""
    middle = TABLE_SIZES[dtype] // 2 - 1
    spacing = torch.finfo(dtype).eps
    for variance in [*np.geomspace(1e-4, 100, 181), *VARIANCES, 0.08, 2.0]:
        s = float(noise_table(math.sqrt(variance) * spacing, dtype)[middle]) / spacing
        reach = math.ceil(12 * s) + 2
        total = float(np.sum(np.arange(-reach, reach + 1) ** 2 * _law(0.0, s, reach)))
        assert abs(total / variance - 1) < 1e-6, variance


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_exponent_has_its_own_spacing(dtype):
    """The entry of field e is that of the numbers in [1, 2), scaled by the spacing of the numbers of field e."""
    every = _every_finite(dtype).double()
    by_field = every[: len(every) // 2].view(TABLE_SIZES[dtype] - 1, -1)  # the numbers from 0 on, in order
    eps = torch.finfo(dtype).eps
    for field, spacing in enumerate((by_field[:, 1] - by_field[:, 0]).tolist()):
        got = float(noise_table(0.4 * spacing, dtype)[field])
        expected = float(noise_table(0.4 * eps, dtype)[TABLE_SIZES[dtype] // 2 - 1]) * (spacing / eps)
        assert math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-45), field


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_table_of_a_tensor_is_that_of_its_number(dtype):
    for sigma in (0.0, 1e-7, 1e-3, 2.5, 1e30):
        assert torch.equal(noise_table(torch.tensor(sigma, dtype=torch.float64), dtype), noise_table(sigma, dtype))
    assert not noise_table(0.0, dtype).any()


def test_a_table_for_a_new_step_size_is_quick():
    """Under a millisecond (0.15 ms on a busy core of 2.5 GHz): it is made again wherever a schedule changes lr."""
    noise_table(0.5, torch.bfloat16)
    took = []
    for k in range(50):
        began = time.perf_counter()
        noise_table(1e-3 + 1e-6 * k, torch.bfloat16)
        took.append(time.perf_counter() - began)
    assert min(took) < 1e-3


# ---- bad input ----

WIDE = {"theta": [torch.ones(4)], "gradient": [torch.ones(4)]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({**WIDE, "master": [torch.ones(4)]}, TypeError, r"master is given for theta of torch\.float32"),
        ({**WIDE, "noise_table": torch.ones(256)}, TypeError, "noise_table is given for theta"),
        ({"master": [torch.ones(4, dtype=torch.bfloat16)]}, TypeError, r"master\[0\] has dtype torch\.bfloat16"),
        ({"master": [torch.ones(5)]}, ValueError, r"master\[0\] has shape \(5,\)"),
        ({"master": [torch.ones(4), torch.ones(4)]}, ValueError, "master has 2 tensors"),
        ({"master": [torch.ones(4)], "noise_table": torch.ones(256)}, ValueError, "both given"),
        ({"noise_table": torch.ones(32)}, ValueError, r"noise_table has shape \(32,\)"),
        ({"noise_table": torch.ones(512)[::2]}, ValueError, "noise_table has shape"),
        ({"noise_table": torch.ones(256, dtype=torch.float64)}, TypeError, r"noise_table is torch\.float64"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message):
    theta, gradient = ([torch.ones(4, dtype=torch.bfloat16)] for _ in range(2))
    arguments = {"theta": theta, "gradient": gradient, **change}
    theta = arguments.pop("theta")
    before = theta[0].clone()
    with pytest.raises(error, match=message):
        _step(theta, arguments.pop("gradient"), **arguments)
    assert torch.equal(theta[0], before)


@pytest.mark.parametrize(
    ("sigma", "dtype", "error", "message"),
    [
        (-0.1, torch.bfloat16, ValueError, r"sigma = -0\.1"),
        (math.nan, torch.float16, ValueError, "sigma = nan"),
        (math.inf, torch.float16, ValueError, "sigma = inf"),
        (0.1, torch.float32, TypeError, r"dtype = torch\.float32"),
    ],
)
def test_bad_tables(sigma, dtype, error, message):
    with pytest.raises(error, match=message):
        noise_table(sigma, dtype)
