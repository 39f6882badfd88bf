"""The Langevin step in Triton, bit for bit the reference's: every dtype and option. Interpreted where there is no GPU."""

import pytest
import torch

from bkd_fast.ops import backends, use_backend
from bkd_fast.ops.langevin import DTYPES, LangevinStep, find_nonfinite, langevin_step_
from bkd_fast.ops.rounding import TABLE_SIZES, noise_table

missing = backends()["triton"].missing
if missing is not None:
    pytest.skip(f"triton: {missing}", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# empty, scalar, odd, one tile and a bit; channels_last; transposed; a shard whose block number's low word wraps; unaligned views
SHAPES = [(0,), (), (3,), (1030,), (2, 3, 5, 7), (17, 31), (300,), (1100,)]
FIRST = [0, 0, 1, 3, 4, 2, 4 * 2**32 - 100, 0]


def _tensors(seed, dtype, device):
    """Each lies between poison in a buffer of its own, the last two elements from where its buffer begins."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for number, shape in enumerate(SHAPES):
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if number == 4:
            values = values.to(memory_format=torch.channels_last)
        if number == 5:
            values = values.t().contiguous().t()
        before = 3 if number == 7 else 16 // dtype.itemsize  # the last is aligned to its elements only
        buffer = torch.full((before + values.numel() + 5,), 77.0, dtype=dtype, device=device)
        tensors.append(buffer.as_strided(values.shape, values.stride(), before).copy_(values))
    return tensors


def _run(backend, dtype, device, *, decay, center, moments, sigma, check, rounding="nearest", on_device=False):
    theta, gradient = _tensors(1, dtype, device), _tensors(2, dtype, device)
    if check:
        gradient[3][1029] = torch.nan
        gradient[7][700] = -torch.inf
    real = torch.float64 if dtype == torch.float64 else torch.float32
    mean, m2 = (_tensors(4, real, device), [t.abs_() for t in _tensors(5, real, device)]) if moments else ([], [])
    master = _tensors(6, torch.float32, device) if rounding == "master" else []
    nonfinite = torch.zeros(len(theta), dtype=torch.bool, device=device) if check else None
    lr, step = 0.0137, 2**32 + 5
    numbers = {"lr": lr, "decay": decay, "sigma": sigma, "step": step}
    if on_device:  # the numbers say no more than which terms there are
        numbers = {"lr": 9.0, "decay": float(decay != 0), "sigma": float(sigma != 0), "step": 0}
        numbers["scalars"] = torch.tensor([lr, decay, sigma], dtype=real, device=device)
        numbers["clock"] = torch.tensor(step, device=device)
    with use_backend(backend):
        langevin_step_(
            LangevinStep(
                theta=theta,
                gradient=gradient,
                center=_tensors(3, dtype, device) if center else [],
                mean=mean,
                m2=m2,
                nonfinite=nonfinite,
                seed=2**64 - 3,
                chain=2**20 - 1,
                parameters=range(2**24 - len(theta), 2**24),
                first_elements=FIRST,
                draws=3,
                master=master,
                noise_table=noise_table(sigma, dtype).to(device) if rounding == "stochastic" else None,
                **numbers,
            )
        )
    buffers = [
        torch.tensor([], dtype=t.dtype, device=t.device).set_(t.untyped_storage()).cpu()
        for t in theta + mean + m2 + master
    ]
    return buffers + ([nonfinite.cpu()] if check else [])


def _assert_equal_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        assert torch.equal(a.view(kind), b.view(kind))


def _compare(dtype, **options):
    _assert_equal_bits(_run("triton", dtype, DEVICE, **options), _run("reference", dtype, "cpu", **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("decay", "center", "moments", "sigma", "check"),
    [
        (0.0, False, False, 0.03, False),
        (0.1, False, False, 0.0, True),
        (0.1, True, True, 0.03, True),
    ],
)
def test_equals_the_reference(dtype, decay, center, moments, sigma, check):
    _compare(dtype, decay=decay, center=center, moments=moments, sigma=sigma, check=check)


@pytest.mark.parametrize("dtype", TABLE_SIZES)
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@pytest.mark.parametrize("moments", [False, True])
def test_sixteen_bits_equal_the_reference(dtype, rounding, moments):
    _compare(dtype, decay=0.1, center=moments, moments=moments, sigma=0.003, check=True, rounding=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_on_the_device(dtype):
    rounding = "stochastic" if dtype == torch.bfloat16 else "nearest"
    _compare(dtype, decay=0.1, center=False, moments=False, sigma=0.03, check=True, rounding=rounding, on_device=True)


def test_equals_the_compiled_cpu_backend():
    if backends()["cpp"].missing is not None:
        pytest.skip(backends()["cpp"].missing)
    options = {"decay": 0.1, "center": True, "moments": True, "sigma": 0.03, "check": True}
    _assert_equal_bits(_run("triton", torch.float32, DEVICE, **options), _run("cpp", torch.float32, "cpu", **options))


@pytest.mark.parametrize("dtype", TABLE_SIZES)
def test_every_value_of_a_sixteen_bit_format_survives_a_step_that_does_nothing(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].to(DEVICE)
    theta = every.clone()
    settings = {"decay": 0.0, "seed": 0, "chain": 0, "step": 0, "parameters": [0], "first_elements": [0], "draws": 0}
    nothing = {"center": (), "mean": (), "m2": (), "nonfinite": None}
    with use_backend("triton"):
        langevin_step_(LangevinStep([theta], [torch.zeros_like(theta)], lr=1.0, sigma=0.0, **nothing, **settings))
    assert torch.equal(theta.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_find_nonfinite(dtype, bad):
    tensors = _tensors(4, dtype, DEVICE)
    with use_backend("triton"):
        assert not find_nonfinite(tensors).any()
        tensors[3][1029] = bad
        tensors[7][0] = bad
        assert find_nonfinite(tensors).nonzero().flatten().tolist() == [3, 7]


def test_a_chunk_ends_where_the_next_begins():
    """A tensor of many chunks: every element is stepped once, and draws its own noise."""
    count = 4096 * 2 + 5
    theta = [torch.zeros(count, device=DEVICE)]
    settings = {"decay": 0.0, "seed": 5, "chain": 0, "step": 0, "parameters": [0], "first_elements": [1], "draws": 0}
    nothing = {"center": (), "mean": (), "m2": (), "nonfinite": None}
    with use_backend("triton"):
        langevin_step_(
            LangevinStep(theta, [torch.ones(count, device=DEVICE)], lr=0.5, sigma=1.0, **nothing, **settings)
        )
    expected = [torch.zeros(count)]
    with use_backend("reference"):
        langevin_step_(LangevinStep(expected, [torch.ones(count)], lr=0.5, sigma=1.0, **nothing, **settings))
    assert torch.equal(theta[0].cpu(), expected[0])
