"""SGLD on bfloat16 and float16 parameters: the posterior's variance, masters as float32 chains, warnings of coarse ones."""

import math
import warnings

import pytest
import stats
import torch

import bkd_fast as bkd
from bkd_fast.ops.rounding import spacing

DTYPES = [torch.bfloat16, torch.float16]


def _parameter(values, dtype):
    parameter = torch.as_tensor(values).to(dtype).clone().requires_grad_()
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def _train(sampler, parameters, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        sampler.step()


# ---- the posterior ----

POSTERIOR = 8  # its standard deviation in spacings
# (variance of a step in squared spacings, number of chains): as many element-steps each, about
QUADRATICS = [(0.02, 2**15), (0.1, 2**17), (0.18, 2**17), (0.3, 2**18), (1.0, 2**20), (10.0, 2**20)]


def _quadratic(dtype, variance, size, rounding="stochastic"):
    """Chains on N L = (theta - 1.5)^2 / (2 sd^2), from its mode for half a relaxation time; the law is that of an AR(1) process.

    Returns the deviations from the mode in spacings, and the variance that they should have.
    """
    eps = torch.finfo(dtype).eps
    lr = variance / (2 * POSTERIOR**2)
    steps = math.ceil(0.5 / lr)
    parameter = _parameter(torch.full((size,), 1.5), dtype)
    sampler = bkd.SGLD([parameter], lr, num_data=1, temperature=(POSTERIOR * eps) ** 2, rounding=rounding, seed=21)
    for _ in range(steps):
        parameter.grad = parameter.detach() - 1.5  # a small multiple of the spacing: exact
        sampler.step()
    contraction = 1 - lr
    return (parameter.detach().double() - 1.5) / eps, variance * (1 - contraction ** (2 * steps)) / (1 - contraction**2)


@pytest.mark.parametrize(("variance", "size"), QUADRATICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_posterior_of_a_quadratic(dtype, variance, size):
    """Mean and variance within 5 standard errors, for noise from far below the spacing to far above it.

    Without the correction for the rounding's own variance the smallest is 9 times too wide, the largest 1.7 % (12 standard
    errors). The drift's rounding adds 0.12 % (rounding.py).
    """
    deviation, expected = _quadratic(dtype, variance, size)
    stats.assert_mean(deviation, 0.0, math.sqrt(expected), f"V = {variance} u^2")
    stats.assert_variance(deviation, expected, f"V = {variance} u^2")


def test_rounding_to_nearest_does_not_sample_the_posterior():
    """What the test above would see: at V = 0.02 u^2 hardly a chain has left its start."""
    with pytest.warns(bkd.BKDFastWarning, match="nearest"):
        deviation, expected = _quadratic(torch.bfloat16, 0.02, 2**12, rounding="nearest")
    assert deviation.square().mean() < 0.3 * expected
    with pytest.raises(AssertionError, match="standard errors"):
        stats.assert_variance(deviation, expected, "nearest")


def test_moments_of_sixteen_bit_chains_are_those_of_the_visited_parameters():
    parameter = _parameter(torch.full((500,), 1.5), torch.bfloat16)
    sampler = bkd.SGLD([parameter], 0.1, num_data=1, temperature=1e-3, seed=3)
    sampler.track_moments()
    visited = []
    for _ in range(20):
        sampler.step()
        visited.append(parameter.detach().double())
    moments = sampler.moments(parameter)
    assert moments.mean.dtype == torch.float32
    torch.testing.assert_close(moments.mean.double(), torch.stack(visited).mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.variance.double(), torch.stack(visited).var(0), rtol=1e-4, atol=1e-9)


# ---- nothing random where there is no noise ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_zero_is_sgd_rounded_to_nearest(dtype, isa):
    start = torch.randn(1003, generator=torch.Generator().manual_seed(0)).to(dtype)
    parameter, expected = _parameter(start, dtype), start.clone()
    sampler = bkd.SGLD([parameter], 0.01, num_data=10, temperature=0.0)
    for step in range(5):
        _train(sampler, [parameter], [step])
        expected = (expected.double() - 0.01 * parameter.grad.double()).float().to(dtype)
    # float64 and one rounding more instead of an fma: a number in ten thousand or so falls on the other side
    assert (parameter != expected).float().mean() < 0.01
    assert (parameter.float() - expected.float()).abs().max() <= 2 * torch.finfo(dtype).eps * 4


def test_lr_zero_rounds_nothing_and_draws_nothing():
    start = torch.randn(100).bfloat16()
    parameter = _parameter(start, torch.bfloat16)
    sampler = bkd.SGLD([parameter], 0.0, num_data=10, weight_decay=0.5)
    _train(sampler, [parameter], range(3))
    assert torch.equal(parameter.detach(), start) and sampler.param_groups[0]["step"] == 0


def test_wider_parameters_do_not_mind_the_rounding():
    results = []
    for rounding in ("stochastic", "nearest", "master"):
        parameters = [_parameter(torch.ones(50), torch.float32), _parameter(torch.ones(7), torch.float64)]
        sampler = bkd.SGLD(parameters, 0.1, num_data=10, seed=1, rounding=rounding)
        _train(sampler, parameters, range(3))
        assert all("master" not in sampler.state[p] for p in parameters)
        results.append([p.detach() for p in parameters])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- masters ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_are_the_float32_chain(dtype):
    """Bit for bit: parameters of every memory order, the prior, moments; theta is the chain rounded to nearest."""
    shapes = [(), (1001,), (2, 3, 4, 5), (31, 17)]
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype) for shape in shapes]
    start[2] = start[2].to(memory_format=torch.channels_last)
    sixteen = [_parameter(t, dtype) for t in start]
    base = torch.zeros(31, 34, dtype=dtype)
    sixteen[3] = base[:, ::2].copy_(start[3]).requires_grad_()  # not dense
    wide = [_parameter(t, torch.float32) for t in start]
    settings = {"num_data": 100, "prior_precision": 2.0, "prior_mean": [torch.ones(shape) for shape in shapes]}
    ours = bkd.SGLD(sixteen, 0.05, rounding="master", seed=5, **settings)
    plain = bkd.SGLD(wide, 0.05, seed=5, **settings)
    ours.track_moments(start=1)
    plain.track_moments(start=1)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(sixteen, wide, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(dtype)
            b.grad = a.grad.float()
        ours.step()
        plain.step()
    for a, b in zip(sixteen, wide, strict=True):
        assert torch.equal(ours.state[a]["master"], b)
        assert torch.equal(a.detach(), b.detach().to(dtype))
        x, y = ours.moments(a), plain.moments(b)
        assert torch.equal(x.mean, y.mean) and torch.equal(x.variance, y.variance)


def test_the_master_is_the_truth():
    """What something else writes to the parameter is overwritten: as documented, and as a half-updated chain would not."""
    parameter = _parameter(torch.ones(5), torch.bfloat16)
    sampler = bkd.SGLD([parameter], 0.1, num_data=10, temperature=0.0, rounding="master")
    sampler.step()
    with torch.no_grad():
        parameter.fill_(7.0)
    sampler.step()
    assert torch.equal(parameter.detach(), torch.ones(5, dtype=torch.bfloat16))


# ---- state ----


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_chain_equals_the_uninterrupted_one(dtype, rounding, tmp_path):
    def make(values):
        parameters = [_parameter(v, dtype) for v in values]
        return parameters, bkd.SGLD(parameters, 0.05, num_data=100, prior_precision=2.0, seed=9, rounding=rounding)

    start = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    whole, sampler = make(start)
    sampler.track_moments(start=2)
    _train(sampler, whole, range(10))

    part, first = make(start)
    first.track_moments(start=2)
    _train(first, part, range(5))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    values = [p.detach().clone() for p in part]
    del first
    resumed, second = make(values)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    _train(second, resumed, range(5, 10))
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(sampler.moments(a).variance, second.moments(b).variance)
        if rounding == "master":
            assert second.state[b]["master"].dtype == torch.float32
            assert torch.equal(sampler.state[a]["master"], second.state[b]["master"])


def test_states_from_before_there_was_a_choice_go_on_as_they_were():
    parameter = _parameter(torch.ones(3), torch.bfloat16)
    sampler = bkd.SGLD([parameter], 0.1, num_data=10)
    state = sampler.state_dict()
    del state["param_groups"][0]["rounding"]
    sampler.load_state_dict(state)
    assert sampler.param_groups[0]["rounding"] == "nearest"


# ---- warnings ----


def _run_with_moments(spacings, steps):
    """A quadratic posterior of a standard deviation of so many spacings, at lr times curvature 1/2."""
    parameter = _parameter(torch.full((400,), 1.5), torch.bfloat16)
    temperature = 0.75 * (spacings * 2.0**-7) ** 2  # variance T / (1 - lr / 2) at curvature 1, lr 1/2
    sampler = bkd.SGLD([parameter], 0.5, num_data=1, temperature=temperature, seed=1)
    sampler.track_moments()
    for _ in range(steps):
        parameter.grad = parameter.detach() - 1.5
        sampler.step()
    return sampler


def test_a_posterior_too_narrow_for_its_parameters_warns_once():
    sampler = _run_with_moments(2.0, 150)
    with pytest.warns(bkd.BKDFastWarning, match=r"100% of the 16-bit parameters are spaced by more than a quarter"):
        sampler.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.check()


def test_a_wide_posterior_and_a_short_run_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run_with_moments(12.0, 150).check()
        _run_with_moments(2.0, 50).check()


def test_it_warns_by_itself_within_a_thousand_steps():
    with pytest.warns(bkd.BKDFastWarning, match="quarter"):
        _run_with_moments(2.0, 1000)


def test_nearest_warns_where_it_samples():
    with pytest.warns(bkd.BKDFastWarning, match='rounding="nearest"'):
        bkd.SGLD([_parameter(torch.zeros(2), torch.bfloat16)], 0.1, num_data=10, rounding="nearest")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bkd.SGLD([_parameter(torch.zeros(2), torch.bfloat16)], 0.1, num_data=10, rounding="nearest", temperature=0.0)
        bkd.SGLD([_parameter(torch.zeros(2), torch.float32)], 0.1, num_data=10, rounding="nearest", chain=1)
        bkd.SGLD([_parameter(torch.zeros(2), torch.bfloat16)], 0.1, num_data=10, chain=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_spacing_is_the_distance_to_the_next_number(dtype):
    every = torch.arange(2**15 - 1, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()].double()
    assert torch.equal(spacing(every[:-1], dtype), every.diff())
    assert torch.equal(spacing(-every[:-1].float(), dtype).double(), every.diff())
