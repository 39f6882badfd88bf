"""The laws of the whole family: each docstring's equation step by step, its exact finite-time and stationary law, its noise.

Every bound is 5 standard errors of a statistic whose law is known (tests/stats.py); `make mutants` breaks the code and sees it.
"""

import math

import numpy as np
import pytest
import stats
import torch
from linear import Target, baoab, sghmc, sgld

import bkd_fast as bkd
from bkd_fast.noise import normal
from bkd_fast.ops.rules import bytes_per_parameter

SAMPLERS = {
    "SGLD": (bkd.SGLD, {}),
    "SGHMC": (bkd.SGHMC, {"momentum": 0.8, "dampening": 0.3}),
    "PSGLD": (bkd.PSGLD, {"alpha": 0.9, "eps": 1e-2}),
    "AdamSGHMC": (bkd.AdamSGHMC, {"betas": (0.8, 0.95), "eps": 1e-2}),
    "SGNHT": (bkd.SGNHT, {"momentum": 0.8, "rate": 0.01}),
    "BAOAB": (bkd.BAOAB, {"friction": 2.0}),
}


def _parameter(values, dtype=torch.float32):
    return torch.as_tensor(values, dtype=dtype).clone().requires_grad_()


# ---- the equations, by hand ----


def _by_hand(name, theta, gradients, xis, *, lr, n, T, tau, mu, settings):
    """Steps of the docstring's equation in float64."""
    b, v = torch.zeros_like(theta), torch.zeros_like(theta)
    thermostat = torch.full_like(theta, settings.get("momentum", 0.0))
    for t, (gradient, xi) in enumerate(zip(gradients, xis, strict=True), start=1):
        g = gradient + tau / n * (theta - mu)
        if name == "SGLD":
            theta = theta - lr * g + math.sqrt(2 * lr * T / n) * xi
        if name == "SGHMC":
            momentum, d = settings["momentum"], settings["dampening"]
            b = momentum * b + (1 - d) * g + math.sqrt(2 * (1 - momentum) * (1 - d) * T / (lr * n)) * xi
            theta = theta - lr * b
        if name == "PSGLD":
            v = settings["alpha"] * v + (1 - settings["alpha"]) * g**2
            metric = 1 / (v.sqrt() + settings["eps"])
            theta = theta - lr * metric * g + (2 * lr * metric * T / n).sqrt() * xi
        if name == "AdamSGHMC":
            beta1, beta2 = settings["betas"]
            a = lr / (1 - beta1**t)
            v = beta2 * v + (1 - beta2) * g**2
            D = (v / (1 - beta2**t)).sqrt() + settings["eps"]
            b = beta1 * b + (1 - beta1) * g + (1 - beta1) * (2 * T * D / (a * n)).sqrt() * xi
            theta = theta - a * b / D
        if name == "SGNHT":
            b = thermostat * b + g + math.sqrt(2 * (1 - settings["momentum"]) * T / (lr * n)) * xi
            theta = theta - lr * b
            thermostat = thermostat - settings["rate"] * (lr * n * (1 + thermostat) * b**2 / (2 * T) - 1)
        if name == "BAOAB":
            h = math.sqrt(lr / n)
            momentum = math.exp(-settings["friction"] * h)
            b = b - math.sqrt(lr * n) * g
            theta = theta + h / 2 * b
            b = momentum * b + math.sqrt((1 - momentum**2) * T) * xi
            theta = theta + h / 2 * b
    return theta


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_are_the_stated_equation(name, maximize, isa):
    """Five steps in float64; maximising a loss is descending its negative, noise included."""
    sampler_class, settings = SAMPLERS[name]
    draws = [torch.randn(1000, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(7)]
    start, center, gradients = draws[0], draws[1], draws[2:]
    theta = _parameter(start, torch.float64)
    sampler = sampler_class(
        [theta], 0.05, num_data=50, temperature=0.7, prior_precision=4.0, prior_mean=[center], seed=3, chain=1,
        maximize=maximize, **settings,
    )  # fmt: skip
    if maximize:  # the prior is of the loss's sign: a mean log posterior to climb
        sampler.param_groups[0]["prior_precision"] = 0.0
    for gradient in gradients:
        theta.grad = -gradient if maximize else gradient.clone()
        sampler.step()
    xis = [normal((1000,), seed=3, chain=1, step=step, parameter=0).double() for step in range(5)]
    tau = 0.0 if maximize else 4.0
    expected = _by_hand(
        name, start, gradients, xis, lr=0.05, n=50, T=0.7, tau=tau, mu=center, settings=settings
    )  # fmt: skip
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-12, atol=1e-13)


# ---- exact laws on Gaussians ----

CASES = [
    Target(1.0, 40, 0.02),
    Target(3.0, 40, 0.05, temperature=0.5),
    Target(0.5, 40, 0.01, temperature=2.0, prior_precision=20.0, center=1.5),
    Target(2.0, 40, 0.04, gradient_noise=0.3),
]


def _run(sampler, parameters, cases, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter, case in zip(parameters, cases, strict=True):
            parameter.grad = case.curvature * parameter.detach()
            if case.gradient_noise:
                parameter.grad += case.gradient_noise * torch.randn(parameter.shape, generator=generator)
        sampler.step()


def _groups(cases, size, start=2.0):
    groups = []
    for case in cases:
        group = {"params": [_parameter(torch.full((size,), start))], "lr": case.lr, "temperature": case.temperature}
        if case.prior_precision:
            group |= {
                "prior_precision": case.prior_precision, "prior_mean": [torch.full((size,), case.center)]
            }  # fmt: skip
        groups.append(group)
    return groups, [group["params"][0] for group in groups]


def _assert_law(x, mean, covariance, what):
    """Mean, variances and covariance of (n, d) draws of a normal law, each at 5 standard errors."""
    x = np.asarray(x, np.float64)
    for i in range(x.shape[1]):
        stats.assert_mean(x[:, i], mean[i], math.sqrt(covariance[i, i]), f"{what}, component {i}")
        stats.assert_variance(x[:, i], covariance[i, i], f"{what}, component {i}", mean=mean[i])
    if x.shape[1] == 2:
        product = (x[:, 0] - mean[0]) * (x[:, 1] - mean[1])
        error = math.sqrt((covariance[0, 0] * covariance[1, 1] + covariance[0, 1] ** 2) / len(x))
        stats.assert_close_in_standard_errors(product.mean(), covariance[0, 1], error, f"{what}: covariance")


@pytest.mark.parametrize("steps", [25, pytest.param(400, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("sampler_class", "settings", "linear"),
    [
        (bkd.SGHMC, {"momentum": 0.9}, lambda case: sghmc(case, 0.9)),
        (bkd.SGHMC, {"momentum": 0.6, "dampening": 0.5}, lambda case: sghmc(case, 0.6, 0.5)),
        (bkd.BAOAB, {"friction": 5.0}, lambda case: baoab(case, 5.0)),
    ],
)
def test_exact_finite_time_law_with_momentum(sampler_class, settings, linear, steps):
    """A noise standard deviation wrong by 0.5 % is 7 standard errors of the momentum's variance off."""
    size = 1_000_000
    groups, parameters = _groups(CASES, size)
    sampler = sampler_class(groups, 0.1, num_data=40, seed=8, **settings)
    _run(sampler, parameters, CASES, steps)
    for parameter, case in zip(parameters, CASES, strict=True):
        mean, covariance = linear(case).law([2.0, 0.0], steps)
        momentum = sampler.state[parameter][sampler.states[0]]
        _assert_law(torch.stack([parameter.detach(), momentum], 1), mean, covariance, f"{case}")


@pytest.mark.parametrize(
    ("sampler_class", "settings", "state", "second_moment", "linear"),
    [
        (bkd.PSGLD, {"eps": 0.1}, "square_avg", 0.16, lambda case: sgld(case, metric=2.0)),
        (
            bkd.AdamSGHMC,
            {"eps": 0.1, "betas": (0.8, 0.9)},
            "exp_avg_sq",
            0.16,
            lambda case: sghmc(case, 0.8, 0.8, metric=2.0),
        ),
    ],
)
def test_exact_finite_time_law_of_a_frozen_metric(sampler_class, settings, state, second_moment, linear):
    """G = 1 / (sqrt(v) + eps) = 2 everywhere: SGLD, or SGHMC with dampening = momentum, at twice the lr."""
    size, steps = 1_000_000, 25
    groups, parameters = _groups(CASES, size, start=0.0)
    sampler = sampler_class(groups, 0.1, num_data=40, seed=8, **settings)
    for parameter in parameters:
        parameter.grad = torch.zeros(size)
    for group in sampler.param_groups:
        group["temperature"], group["step"] = 0.0, 400  # Adam's corrections are over
    sampler.step()  # brings the state into being
    sampler.freeze_metric()
    for group, parameter, case in zip(sampler.param_groups, parameters, CASES, strict=True):
        group["temperature"] = case.temperature
        correction = 1 - group["betas"][1] ** group["frozen_at"] if "betas" in group else 1.0
        sampler.state[parameter][state].fill_(second_moment * correction)
        for other in {"exp_avg"} & set(sampler.states):
            sampler.state[parameter][other].zero_()
        parameter.detach().fill_(2.0)
        torch.testing.assert_close(sampler.metric(parameter)[:2], torch.full((2,), 2.0))
    _run(sampler, parameters, CASES, steps)
    for parameter, case in zip(parameters, CASES, strict=True):
        step = linear(case)
        mean, covariance = step.law([2.0, 0.0][: len(step.c)], steps)
        columns = [parameter.detach()]
        if len(step.c) == 2:
            columns.append(sampler.state[parameter]["exp_avg"])
        _assert_law(torch.stack(columns, 1), mean, covariance, f"{case}")


@pytest.mark.parametrize("case", CASES)
def test_docstrings_stationary_laws(case):
    """The formulas, against the fixed point of the exact recursion that the tests above hold the samplers to."""
    n, total, lr, T, s = case.num_data, case.total, case.lr, case.temperature, case.gradient_noise
    assert sgld(case).stationary()[0, 0] == pytest.approx((T + lr * n * s**2 / 2) / (n * total * (1 - lr * total / 2)))
    mu, d = 0.9, 0.3
    hot = T * (1 + lr * (1 - d) * n * s**2 / (2 * (1 - mu) * T))
    covariance = sghmc(case, mu, d).stationary()
    below = 1 + mu - lr * (1 - d) * total / 2
    assert covariance[0, 0] == pytest.approx(hot / (n * total) * (1 + mu) / below)
    assert covariance[1, 1] == pytest.approx(2 * (1 - d) * hot / (lr * n * below))
    if s == 0:
        covariance = baoab(case, 5.0).stationary()
        h = math.sqrt(lr / n)
        assert covariance == pytest.approx(np.array([[T / (n * total), h * T / 2], [h * T / 2, T]]))


def test_the_thermostat_takes_the_minibatch_noise_out():
    """E[lr N (1 + mu) b^2 / 2] = T and Var theta = T / (N l), where SGHMC samples 2.1 times as hot.

    Stationary to 0.1 % from step 3000 on: the thermostats relax in (1 - mu) / rate steps, about 420.
    """
    size, case = 20_000, Target(0.5, 10, 0.02, temperature=0.7, gradient_noise=math.sqrt(0.77))
    parameter = _parameter(torch.zeros(size))
    sampler = bkd.SGNHT([parameter], case.lr, num_data=10, temperature=case.temperature, rate=5e-4, seed=4)
    _run(sampler, [parameter], [case], 3000)
    variances, kinetic = [], []
    for _ in range(12):
        before = sampler.state[parameter]["thermostat"].clone()
        _run(sampler, [parameter], [case], 1)
        b = sampler.state[parameter]["momentum_buffer"]
        kinetic.append((case.lr * 10 * (1 + before) * b**2 / 2).double())
        variances.append(parameter.detach().double().square())
        _run(sampler, [parameter], [case], 199)
    kinetic, variances = torch.stack(kinetic).mean(0), torch.stack(variances).mean(0)  # coordinates are independent
    stats.assert_mean(kinetic, case.temperature, float(kinetic.std()), "kinetic temperature")
    wanted, hot = case.temperature / (10 * case.total), sghmc(case).stationary()[0, 0]
    error = float(variances.std()) / math.sqrt(size)
    # the thermostats' fluctuation, of variance rate, moves the law by about rate / friction^2 = 1 %
    assert abs(float(variances.mean()) - wanted) < stats.SIGMAS * error + 0.01 * wanted
    assert hot > 2 * wanted


# ---- non-Gaussian targets ----


@pytest.mark.parametrize("name", ["SGHMC", "SGNHT", "BAOAB"])
def test_double_well(name):
    """exp(2 x^2 - x^4): E x^2 = .832745 in the limit of small steps; the momentum samplers are there to 0.4 %."""
    settings = {"SGHMC": {"momentum": 0.9}, "SGNHT": {"momentum": 0.9, "rate": 2e-4}, "BAOAB": {"friction": 2.0}}[name]
    parameter = _parameter(0.8 * torch.randn(100_000, generator=torch.Generator().manual_seed(4)))
    sampler = getattr(bkd, name)([parameter], 5e-4 if name != "BAOAB" else 4e-3, num_data=1, seed=12, **settings)
    squares = []
    for step in range(1500):
        theta = parameter.detach()
        parameter.grad = 4 * theta**3 - 4 * theta
        sampler.step()
        if step >= 900 and step % 100 == 99:
            squares.append(parameter.detach().double().square())
    squares = torch.stack(squares).mean(0)
    error = float(squares.std()) / math.sqrt(len(squares))
    assert abs(float(squares.mean()) - 0.832745) < stats.SIGMAS * error + 0.004 * 0.832745


# ---- the noise ----


@pytest.mark.parametrize("size", [500_000, pytest.param(5_000_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_law(name, size):
    """The noise of one step from rest, standardised: a million coordinates in two tensors (ten, in the long version)."""
    sampler_class, settings = SAMPLERS[name]
    lr, n, T = 0.02, 10, 0.5
    runs = {}
    for temperature in (T, 0.0):
        parameters = [_parameter(torch.zeros(size)) for _ in range(2)]
        sampler = sampler_class(parameters, lr, num_data=n, seed=5, **settings)
        for group in sampler.param_groups:
            group["temperature"] = temperature
        moved = []
        for _ in range(2):
            before = [p.detach().clone() for p in parameters]
            for parameter in parameters:
                parameter.grad = torch.full((size,), 2.0)
            sampler.step()
            moved.append([(p.detach() - start).double() for p, start in zip(parameters, before, strict=True)])
        runs[temperature] = moved
    noise = [hot - cold for hot, cold in zip(runs[T][0], runs[0.0][0], strict=True)]
    if name == "SGHMC":  # at temperature 0 the first step has no dampening
        noise = [hot + lr * (1 - settings["dampening"]) * 2.0 for hot in runs[T][0]]
    scale = {
        "SGLD": math.sqrt(2 * lr * T / n),
        "SGHMC": math.sqrt(2 * lr * 0.2 * 0.7 * T / n),
        "PSGLD": math.sqrt(2 * lr * T / n / (math.sqrt(0.1 * 4) + 1e-2)),
        "AdamSGHMC": 0.2 * math.sqrt(2 * lr / 0.2 * T / n / (2 + 1e-2)),
        "SGNHT": math.sqrt(2 * lr * 0.2 * T / n),
        "BAOAB": math.sqrt(lr / n) / 2 * math.sqrt((1 - math.exp(-2 * 2.0 * math.sqrt(lr / n))) * T),
    }[name]
    stats.assert_standard_normal(torch.cat(noise) / scale, name)
    stats.assert_uncorrelated(noise[0], noise[1], "two tensors")
    for lag in range(1, 17):
        stats.assert_uncorrelated(noise[0][:-lag], noise[0][lag:], f"lag {lag}")


@pytest.mark.parametrize("name", ["SGHMC", "SGNHT", "BAOAB", "AdamSGHMC"])
def test_drawn_momenta_have_their_stationary_law(name):
    """On flat directions, where it is exact; independent of the step's own noise."""
    sampler_class, settings = SAMPLERS[name]
    parameter = _parameter(torch.zeros(500_000))
    sampler = sampler_class([parameter], 0.03, num_data=20, temperature=0.6, seed=9, **settings)
    parameter.grad = torch.full((500_000,), 0.5)
    sampler.step()
    before = parameter.detach().clone()
    sampler.draw_momentum()
    momentum = sampler.state[parameter][sampler.states[0]].double()
    variance = {
        "SGHMC": 2 * 0.7 * 0.6 / (1.8 * 0.03 * 20),
        "SGNHT": 2 * 0.6 / (1.8 * 0.03 * 20),
        "BAOAB": 0.6,
        "AdamSGHMC": 2 * 0.2 * 0.6 * (0.5 + 1e-2) / (1.8 * 0.03 / (1 - 0.8**2) * 20),
    }[name]
    stats.assert_standard_normal(momentum / math.sqrt(variance), name)
    step = normal((500_000,), seed=9, step=1, parameter=0).double()
    stats.assert_uncorrelated(momentum, step, "the step's noise")
    assert torch.equal(parameter.detach(), before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_docstrings_state_the_bytes_that_the_kernel_moves(name):
    sampler_class, _ = SAMPLERS[name]
    assert f"{bytes_per_parameter(sampler_class.rule)} bytes per float32 parameter" in sampler_class.__doc__


def test_one_thermostat_for_a_group_takes_the_minibatch_noise_out_too():
    """Its mean kinetic temperature, and the variance of theta, over coordinates that are alike."""
    size, case = 200_000, Target(0.5, 10, 0.02, temperature=0.7, gradient_noise=math.sqrt(0.77))
    parameter = _parameter(torch.zeros(size))
    settings = {"num_data": 10, "temperature": case.temperature, "rate": 1e-3, "per_element": False, "seed": 4}
    sampler = bkd.SGNHT([parameter], case.lr, **settings)
    _run(sampler, [parameter], [case], 1200)
    assert set(sampler.state[parameter]) == {"momentum_buffer"}
    before = sampler.param_groups[0]["thermostat"].item()
    _run(sampler, [parameter], [case], 1)
    b = sampler.state[parameter]["momentum_buffer"].double()
    kinetic = case.lr * 10 * (1 + before) * b**2 / 2
    stats.assert_mean(kinetic, case.temperature, float(kinetic.std()), "kinetic temperature")
    # what minibatch noise adds to the temperature, the friction takes: (1 - mu) = (1 - mu0) (1 + noise_share)
    share = case.lr * 10 * case.gradient_noise**2 / (2 * 0.1 * case.temperature)
    assert 1 - before == pytest.approx(0.1 * (1 + share), rel=0.02)
    stats.assert_variance(parameter.detach(), case.temperature / (10 * case.total), "theta")


def test_a_thermostat_of_a_group_does_not_depend_on_threads_and_survives_saving():
    """Bit for bit: chains, another number of threads, and a state that was saved half-way."""
    results = []
    for threads, saved in ((1, False), (2, False), (1, True)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        params = [_parameter(torch.randn(2, 70_001, generator=torch.Generator().manual_seed(i))) for i in range(2)]
        settings = {"num_data": 10, "per_element": False, "chains": 2, "seed": 3}
        sampler = bkd.SGNHT(params, 0.02, **settings)
        for step in range(6):
            if saved and step == 3:
                state = sampler.state_dict()
                sampler = bkd.SGNHT(params, 0.02, **settings)
                sampler.load_state_dict(state)
            for parameter in params:
                parameter.grad = parameter.detach().clone()
            sampler.step()
        torch.set_num_threads(before)
        results.append([*params, sampler.param_groups[0]["thermostat"]])
    assert results[0][-1][0] != results[0][-1][1]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["SGLD", "SGHMC", "SGNHT", "BAOAB"])
def test_a_softmax_with_pseudo_counts(name):
    """Two classes, a = 3.5 and b = 1.25: E softmax = a / (a + b) exactly, at any step; the logit's mean and variance nearly."""
    settings = {"SGHMC": {"momentum": 0.8}, "SGNHT": {"momentum": 0.8, "rate": 1e-3}, "BAOAB": {"friction": 2.0}}
    a, b = 3.5, 1.25
    parameter = _parameter(1.3 + 1.2 * torch.randn(60_000, generator=torch.Generator().manual_seed(4)))
    lr = {"SGLD": 0.02, "BAOAB": 0.04}.get(name, 0.005)
    sampler = getattr(bkd, name)([parameter], lr, num_data=1, seed=21, **settings.get(name, {}))
    probabilities, draws = [], []
    for step in range(1200):
        probability = torch.sigmoid(parameter.detach())
        parameter.grad = (a + b) * probability - a
        if step >= 600 and step % 100 == 0:
            probabilities.append(probability.double())
            draws.append(parameter.detach().double().clone())
        sampler.step()
    mean = torch.stack(probabilities).mean(0)
    stats.assert_mean(mean, a / (a + b), float(mean.std()), "E softmax")
    theta = torch.stack(draws)
    error = float(theta.mean(0).std()) / math.sqrt(theta.shape[1])
    assert abs(float(theta.mean()) - 1.330610) < stats.SIGMAS * error + 0.005
    variance = (theta - 1.330610).square().mean(0)
    error = float(variance.std()) / math.sqrt(len(variance))
    assert abs(float(variance.mean()) - 1.527687) < stats.SIGMAS * error + 0.02 * 1.527687
