"""SGHMC and its kin as optimizers: SGD with momentum bit for bit at temperature 0, and settings that are refused."""

import pytest
import torch

import bkd_fast as bkd


def _parameter(values, dtype=torch.float32):
    parameter = torch.as_tensor(values, dtype=dtype).clone().requires_grad_()
    parameter.grad = torch.zeros_like(parameter)
    return parameter


SHAPES = [(), (1,), (33,), (17, 33), (5, 1000)]


def _race(ours, theirs, dtype, late=None):
    """The parameters after six steps of each, the one at `late` without a gradient in the first two."""
    start = [torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(7)) for shape in SHAPES]
    results = []
    for make in (ours, theirs):
        params = [_parameter(t, dtype) for t in start]
        optimizer = make(params)
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            for number, parameter in enumerate(params):
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
                parameter.grad = None if number == late and step < 2 else gradient
            optimizer.step()
        results.append(params)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("late", [None, 3])
def test_temperature_zero_is_sgd_with_momentum_bit_for_bit(dtype, dampening, nesterov, maximize, late, isa):
    if nesterov and dampening:
        dampening = 0.0  # torch's rule too
    settings = {
        "momentum": 0.9,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": 0.013,
        "maximize": maximize,
    }
    ours, theirs = _race(
        lambda params: bkd.SGHMC(params, 0.01, num_data=100, temperature=0.0, **settings),
        lambda params: torch.optim.SGD(params, 0.01, foreach=False, **settings),
        dtype,
        late,
    )
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_sgnht_at_temperature_zero_is_sgd_with_momentum_too():
    ours, theirs = _race(
        lambda params: bkd.SGNHT(params, 0.01, num_data=100, temperature=0.0, momentum=0.9, weight_decay=0.013),
        lambda params: torch.optim.SGD(params, 0.01, momentum=0.9, weight_decay=0.013, foreach=False),
        torch.float32,
    )
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("maximize", [False, True])
def test_adam_and_rmsprop_at_temperature_zero(maximize):
    """To rounding: torch adds, multiplies and divides in another order."""
    settings = {"lr": 0.01, "weight_decay": 0.013, "maximize": maximize}
    for ours, theirs in ((bkd.AdamSGHMC, torch.optim.Adam), (bkd.PSGLD, torch.optim.RMSprop)):

        def cold(params, make=ours):
            return make(params, num_data=9, temperature=0.0, **settings)

        def torchs(params, make=theirs):
            return make(params, **settings)

        for x, y in zip(*_race(cold, torchs, torch.float64), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (bkd.SGHMC, {"momentum": 1.0}, r"momentum = 1\.0: must be in \[0, 1\)"),
        (bkd.SGHMC, {"momentum": -0.1}, r"momentum = -0\.1"),
        (bkd.SGHMC, {"dampening": 1.0}, r"dampening = 1\.0: must be in \[0, 1\)"),
        (bkd.SGHMC, {"nesterov": True}, "nesterov = True with temperature = 1"),
        (bkd.SGHMC, {"nesterov": True, "temperature": 0.0, "momentum": 0.0}, "needs a positive momentum"),
        (bkd.SGHMC, {"nesterov": True, "temperature": 0.0, "dampening": 0.1}, "and no dampening"),
        (bkd.SGHMC, {"rounding": "stochastic"}, "rounding = 'stochastic'"),
        (bkd.SGNHT, {"momentum": 1.5}, r"momentum = 1\.5"),
        (bkd.SGNHT, {"rate": 0.0}, r"rate = 0\.0: must be positive"),
        (bkd.SGNHT, {"per_element": False, "capturable": True}, "per_element = False with capturable = True"),
        (bkd.BAOAB, {"friction": 0.0}, r"friction = 0"),
        (bkd.BAOAB, {"friction": float("nan")}, "friction = nan"),
        (bkd.AdamSGHMC, {"betas": (0.9, 1.0)}, r"betas\[1\] = 1\.0"),
        (bkd.AdamSGHMC, {"betas": (-0.1, 0.9)}, r"betas\[0\] = -0\.1"),
        (bkd.AdamSGHMC, {"eps": 0.0}, r"eps = 0\.0"),
    ],
)
def test_bad_settings(make, change, message):
    settings = {"num_data": 10, **({"friction": 1.0} if make is bkd.BAOAB else {}), **change}
    with pytest.raises(ValueError, match=message):
        make([_parameter(torch.zeros(2))], 0.1, **settings)


def test_settings_that_a_sampler_does_not_have():
    with pytest.raises(TypeError, match="SGHMC has no argument betas"):
        bkd.SGHMC([_parameter(torch.zeros(2))], 0.1, num_data=10, betas=(0.9, 0.99))
    with pytest.raises(TypeError, match="SGHMC needs num_data"):
        bkd.SGHMC([_parameter(torch.zeros(2))], 0.1)
    with pytest.raises(ValueError, match="nesterov = True with temperature"):
        sampler = bkd.SGHMC([_parameter(torch.zeros(2))], 0.1, num_data=10, temperature=0.0, nesterov=True)
        sampler.param_groups[0]["temperature"] = 1.0
        sampler.step()


def test_help_shows_the_settings_that_all_have():
    import inspect

    for sampler in (bkd.SGLD, bkd.SGHMC, bkd.PSGLD, bkd.AdamSGHMC, bkd.SGNHT, bkd.BAOAB):
        parameters = inspect.signature(sampler).parameters
        assert list(parameters)[:2] == ["params", "lr"] and {"num_data", "chains", "seed"} <= set(parameters)
        assert parameters["num_data"].default is inspect.Parameter.empty


def test_a_step_at_lr_zero_does_not_make_the_next_one_dampened():
    theta, other = _parameter(torch.zeros(3)), _parameter(torch.zeros(3))
    sampler = bkd.SGHMC([theta], 0.0, num_data=10, temperature=0.0, dampening=0.5)
    sampler.step()
    sampler.param_groups[0]["lr"] = 0.1
    sgd = torch.optim.SGD([other], 0.1, momentum=0.9, dampening=0.5, foreach=False)
    for _ in range(3):
        theta.grad, other.grad = torch.ones(3), torch.ones(3)
        sampler.step()
        sgd.step()
    assert torch.equal(theta, other)
