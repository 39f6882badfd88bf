"""SGLD: its law, its equality with SGD at temperature 0, and what training code does to an optimizer."""

import copy
import math
import pickle

import numpy as np
import pytest
import stats
import torch

import bkd_fast as bkd
from bkd_fast.noise import normal


def _parameter(values, dtype=torch.float32):
    parameter = torch.as_tensor(values, dtype=dtype).clone().requires_grad_()
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def _set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


# ---- the equation ----


def test_one_step_is_the_stated_equation(isa):
    """Drift and noise by hand, from the public noise: theta - lr (g + tau/N (theta - mu)) + sqrt(2 lr T / N) xi."""
    theta, g, mu = (
        torch.randn(1000, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)
    )
    parameter = _parameter(theta, torch.float64)
    parameter.grad = g.clone()
    sampler = bkd.SGLD(
        [parameter], 0.3, num_data=50, temperature=0.7, prior_precision=4.0, prior_mean=[mu], seed=3, chain=1
    )
    sampler.step()
    xi = normal((1000,), seed=3, chain=1, step=0, parameter=0).double()
    expected = theta - 0.3 * (g + 4.0 / 50 * (theta - mu)) + math.sqrt(2 * 0.3 * 0.7 / 50) * xi
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-15)


def test_one_step_law():
    """Ten million coordinates from 0: mean, variance, skewness, kurtosis, tails, correlations. N = 1e7 in samplers.md §4."""
    parameters = [_parameter(torch.zeros(5_000_000)) for _ in range(2)]
    sampler = bkd.SGLD(parameters, 0.02, num_data=10, temperature=0.5, seed=5)
    for parameter in parameters:
        parameter.grad.fill_(2.0)
    sampler.step()
    drift, sigma = -0.02 * 2.0, math.sqrt(2 * 0.02 * 0.5 / 10)
    first = [((p.detach().double() - drift) / sigma).clone() for p in parameters]
    stats.assert_standard_normal(torch.cat(first), "one step")
    stats.assert_uncorrelated(first[0], first[1], "two tensors")
    before = [p.detach().clone() for p in parameters]
    sampler.step()
    for p, z, start in zip(parameters, first, before, strict=True):
        stats.assert_uncorrelated((p.detach() - start).double(), z, "two steps")
    for lag in range(1, 17):
        stats.assert_uncorrelated(first[0][:-lag], first[0][lag:], f"lag {lag}")


def test_the_noise_scales_exactly_with_the_square_root_of_temperature():
    moved = []
    for temperature in (1.0, 0.25):
        parameter = _parameter(torch.zeros(1000, dtype=torch.float64), torch.float64)
        bkd.SGLD([parameter], 0.1, num_data=7, temperature=temperature, seed=1).step()
        moved.append(parameter.detach())
    torch.testing.assert_close(moved[0], 2 * moved[1], rtol=1e-12, atol=0)


def test_exact_finite_time_law():
    """Independent Gaussians from a fixed start, 25 steps: var_t = V (1 - (1 - h lambda)^(2 t)), mean contracted likewise.

    Groups differ in curvature, lr, temperature and centre. A noise standard deviation wrong by 0.5 % is off by 7 standard
    errors of the variance at a million coordinates.
    """
    steps, size, num_data = 25, 1_000_000, 40
    cases = [(1.0, 0.02, 1.0, 0.0, 0.0), (3.0, 0.05, 0.5, 0.0, 0.0), (0.5, 0.01, 2.0, 20.0, 1.5)]
    groups, parameters = [], []
    for _, lr, temperature, precision, center in cases:
        parameters.append(_parameter(torch.full((size,), 2.0)))
        group = {"params": [parameters[-1]], "lr": lr, "temperature": temperature, "prior_precision": precision}
        groups.append({**group, "prior_mean": [torch.full((size,), center)]} if precision else group)
    sampler = bkd.SGLD(groups, 0.1, num_data=num_data, seed=8)
    for _ in range(steps):
        for parameter, (curvature, *_) in zip(parameters, cases, strict=True):
            parameter.grad = curvature * parameter.detach()
        sampler.step()
    for parameter, (curvature, lr, temperature, precision, center) in zip(parameters, cases, strict=True):
        total = curvature + precision / num_data  # curvature of the mean loss, the prior's share included
        contraction = 1 - lr * total
        mode = precision / num_data * center / total
        mean = mode + (2.0 - mode) * contraction**steps
        stationary = 2 * lr * temperature / num_data / (1 - contraction**2)
        variance = stationary * (1 - contraction ** (2 * steps))
        stats.assert_mean(parameter.detach(), mean, math.sqrt(variance), f"lr {lr}")
        stats.assert_variance(parameter.detach(), variance, f"lr {lr}", mean=mean)


def test_stationary_law_with_minibatch_noise():
    """Var = (T + lr N s^2 / 2) / (N l (1 - lr l / 2)): the docstring's formula, s^2 the gradient's own variance."""
    size, num_data, lr, curvature, s = 1_000_000, 10, 0.3, 2.0, 0.4
    parameter = _parameter(torch.zeros(size))
    sampler = bkd.SGLD([parameter], lr, num_data=num_data, seed=2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(25):  # contraction 0.4 per step: stationary to 1e-10
        parameter.grad = curvature * parameter.detach() + s * torch.randn(size, generator=generator)
        sampler.step()
    expected = (1 + lr * num_data * s**2 / 2) / (num_data * curvature * (1 - lr * curvature / 2))
    stats.assert_variance(parameter.detach(), expected, "stationary")


def test_double_well_satisfies_the_exact_identity():
    """For any target and step: E[grad U] = 0, E[theta grad U] = T d + (h / 2) E|grad U|^2 (samplers.md §4)."""
    parameter = _parameter(0.1 * torch.randn(100_000, generator=torch.Generator().manual_seed(4)))
    h = 0.01  # N = 1: lr is the step of U itself
    sampler = bkd.SGLD([parameter], h, num_data=1, seed=12)
    identity, squares = [], []
    for step in range(900):
        theta = parameter.detach()
        parameter.grad = 4 * theta**3 - 4 * theta  # U = theta^4 - 2 theta^2
        if step >= 500 and step % 50 == 0:
            g, x = parameter.grad.double(), theta.double()
            identity.append((x * g - 1 - h / 2 * g * g).numpy())
            squares.append((x * x).numpy())
        sampler.step()
    identity, squares = np.mean(identity, axis=0), np.mean(squares, axis=0)
    stats.assert_mean(identity, 0.0, identity.std(), "identity")
    stats.assert_mean(squares, 0.825814, squares.std(), "E theta^2 of SGLD at h = 0.01 (samplers.md §4)")


# ---- temperature 0 is SGD ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.013])
@pytest.mark.parametrize("maximize", [False, True])
def test_temperature_zero_is_sgd_bit_for_bit(dtype, weight_decay, maximize, isa):
    shapes = [(), (1,), (33,), (17, 33), (5, 1000)]
    start = [torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(7)) for shape in shapes]
    ours, theirs = ([_parameter(t, dtype) for t in start] for _ in range(2))
    a = bkd.SGLD(ours, 0.01, num_data=100, temperature=0.0, weight_decay=weight_decay, maximize=maximize)
    b = torch.optim.SGD(theirs, 0.01, weight_decay=weight_decay, maximize=maximize, foreach=False)
    for step in range(5):
        _set_gradients(ours, step)
        _set_gradients(theirs, step)
        a.step()
        b.step()
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_weight_decay_is_prior_precision_over_num_data():
    results = []
    for settings in ({"weight_decay": 0.5 / 64}, {"prior_precision": 0.5}):
        parameters = [_parameter(torch.ones(100))]
        sampler = bkd.SGLD(parameters, 0.1, num_data=64, seed=1, **settings)
        for step in range(3):
            _set_gradients(parameters, step)
            sampler.step()
        results.append(parameters[0].detach())
    assert torch.equal(*results)


# ---- the drop-in contract ----


def test_parameters_move_in_place_and_gradients_do_not_change():
    parameters = [_parameter(torch.ones(9)), _parameter(torch.ones(3, 4, 5, 6).to(memory_format=torch.channels_last))]
    _set_gradients(parameters, 0)
    addresses, gradients = [p.data_ptr() for p in parameters], [p.grad.clone() for p in parameters]
    bkd.SGLD(parameters, 0.1, num_data=10, weight_decay=0.1).step()
    assert [p.data_ptr() for p in parameters] == addresses
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))
    assert all((p != 1).all() for p in parameters)


def test_autograd_notices_the_change():
    parameter = _parameter(torch.ones(3))
    loss = (parameter * parameter).sum()
    parameter.grad = torch.ones(3)
    bkd.SGLD([parameter], 0.1, num_data=10).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_lr_zero_moves_nothing_and_draws_nothing():
    parameter = _parameter(torch.ones(5))
    sampler = bkd.SGLD([parameter], 0.0, num_data=10, weight_decay=0.5)
    parameter.grad = torch.ones(5)
    sampler.step()
    assert torch.equal(parameter.detach(), torch.ones(5))
    sampler.param_groups[0]["lr"] = 0.1
    sampler.step()
    other = _parameter(torch.ones(5))
    other.grad = torch.ones(5)
    bkd.SGLD([other], 0.1, num_data=10, weight_decay=0.5).step()
    assert torch.equal(parameter, other)


def test_closure_runs_once_with_gradients_and_its_value_comes_back():
    parameter = _parameter(torch.ones(2))
    sampler = bkd.SGLD([parameter], 0.1, num_data=10)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        sampler.zero_grad()
        loss = (parameter**2).mean()
        loss.backward()
        return loss

    assert sampler.step(closure).item() == 1.0
    assert calls == [1]


def test_parameters_without_gradient_stay_and_keep_their_number():
    """The noise of a parameter does not depend on which others had a gradient."""
    runs = []
    for skip in (False, True):
        parameters = [_parameter(torch.zeros(6)) for _ in range(3)]
        if skip:
            parameters[1].grad = None
        bkd.SGLD(parameters, 0.1, num_data=10, seed=4).step()
        runs.append([p.detach() for p in parameters])
    assert torch.equal(runs[1][1], torch.zeros(6))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][2], runs[1][2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_groups_keep_numbering_across_add_param_group():
    parameters = [_parameter(torch.zeros(6)) for _ in range(3)]
    sampler = bkd.SGLD([{"params": parameters[:2]}], 0.1, num_data=10, seed=4)
    sampler.add_param_group({"params": parameters[2:], "temperature": 0.25})
    sampler.step()
    sigma = math.sqrt(2 * 0.1 / 10)
    for number, (parameter, scale) in enumerate(zip(parameters, (1, 1, 0.5), strict=True)):
        torch.testing.assert_close(
            parameter.detach(), scale * sigma * normal(6, seed=4, parameter=number), rtol=1e-6, atol=0
        )


def test_noise_follows_the_memory_order_of_channels_last_and_the_logical_order_of_sparse_views():
    sigma = math.sqrt(2 * 0.1 / 10)
    xi = normal(2 * 3 * 4 * 5, seed=4)
    last = _parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    bkd.SGLD([last], 0.1, num_data=10, seed=4).step()
    torch.testing.assert_close(last.detach().permute(0, 2, 3, 1).reshape(-1), sigma * xi, rtol=1e-6, atol=0)
    base = torch.zeros(120, 2)
    view = base[:, 0].requires_grad_()  # every second number: not dense
    view.grad = torch.zeros(120)
    bkd.SGLD([view], 0.1, num_data=10, seed=4).step()
    torch.testing.assert_close(base[:, 0].detach(), sigma * xi, rtol=1e-6, atol=0)
    assert torch.equal(base[:, 1], torch.zeros(120))


def test_a_gradient_in_another_memory_order_is_understood():
    parameter = _parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    gradient = torch.randn(2, 3, 4, 5)
    parameter.grad = gradient
    bkd.SGLD([parameter], 0.5, num_data=10, temperature=0.0).step()
    torch.testing.assert_close(parameter.detach(), -0.5 * gradient)


def test_tensor_lr_schedulers_and_hooks():
    parameter = _parameter(torch.zeros(2))
    sampler = bkd.SGLD([parameter], torch.tensor(0.5), num_data=10, temperature=0.0)
    parameter.grad = torch.ones(2)
    seen = []
    sampler.register_step_post_hook(lambda *_: seen.append(1))
    sampler.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), -0.5))
    assert seen == [1]
    number = bkd.SGLD([parameter], 0.5, num_data=10, temperature=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(number, 1, gamma=0.1)
    number.step()
    schedule.step()
    number.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), -1.05))


def test_grad_scaler_skips_the_step_on_infinity():
    parameter = _parameter(torch.zeros(4))
    sampler = bkd.SGLD([parameter], 0.1, num_data=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum() * torch.inf).backward()
    scaler.step(sampler)
    scaler.update()
    assert torch.equal(parameter.detach(), torch.zeros(4)) and sampler.param_groups[0]["step"] == 0


# ---- non-finite gradients ----


def _poisoned(rule):
    parameters = [_parameter(torch.zeros(40)), _parameter(torch.zeros(3, 3))]
    parameters[1].grad[2, 1] = torch.nan
    named = [("first", parameters[0]), ("second", parameters[1])]
    return parameters, bkd.SGLD(named, 0.1, num_data=10, nonfinite=rule, seed=6)


@pytest.mark.parametrize("rule", [None, "raise"])
def test_raise_names_the_parameter_and_moves_nothing(rule):
    parameters, sampler = _poisoned(rule)
    with pytest.raises(bkd.NonFiniteError, match="'second'"):
        sampler.step()
    assert all(not p.any() for p in parameters) and sampler.param_groups[0]["step"] == 0


def test_skip_moves_nothing_and_does_not_use_up_noise():
    parameters, sampler = _poisoned("skip")
    sampler.step()
    assert all(not p.any() for p in parameters) and sampler.skipped_steps == 1
    parameters[1].grad.zero_()
    sampler.step()
    torch.testing.assert_close(parameters[0].detach(), math.sqrt(0.02) * normal(40, seed=6), rtol=1e-6, atol=0)


def test_record_keeps_the_element_and_tells_once():
    parameters, sampler = _poisoned("record")
    sampler.step()
    assert parameters[1][2, 1] == 0 and int((parameters[1] != 0).sum()) == 8 and (parameters[0] != 0).all()
    with pytest.raises(bkd.NonFiniteError, match="'second'"):
        sampler.state_dict()
    sampler.check()
    sampler.state_dict()


def test_record_tells_by_itself_within_a_thousand_steps():
    _, sampler = _poisoned("record")
    with pytest.raises(bkd.NonFiniteError, match="'second'"):
        for _ in range(1000):
            sampler.step()


def test_propagate_lets_it_through():
    parameters, sampler = _poisoned("propagate")
    sampler.step()
    assert parameters[1].isnan().sum() == 1


# ---- moments of the parameters ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_the_visited_parameters(dtype):
    parameter = _parameter(torch.zeros(50, dtype=dtype), dtype)
    sampler = bkd.SGLD([parameter], 0.1, num_data=10, seed=3)
    sampler.track_moments(start=4, every=3)
    visited = []
    for step in range(20):
        parameter.grad = parameter.detach().clone()
        sampler.step()
        if step >= 4 and (step - 4) % 3 == 0:
            visited.append(parameter.detach().double().clone())
    draws = torch.stack(visited)
    moments = sampler.moments(parameter)
    assert moments.draws == len(visited) and moments.mean.dtype == dtype
    torch.testing.assert_close(moments.mean.double(), draws.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(moments.variance.double(), draws.var(0), rtol=1e-4, atol=1e-9)


# ---- state ----


def _train(sampler, parameters, steps):
    for step in steps:
        _set_gradients(parameters, step)
        sampler.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_resumed_chain_equals_the_uninterrupted_one(dtype, tmp_path):
    def make(values):
        parameters = [_parameter(v, dtype) for v in values]
        settings = {"num_data": 100, "prior_precision": 2.0, "prior_mean": [torch.ones(v.shape) for v in values]}
        return parameters, bkd.SGLD(parameters, 0.05, seed=2**64 - 3, **settings)

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
        x, y = sampler.moments(a), second.moments(b)
        assert x.draws == y.draws and torch.equal(x.mean, y.mean) and torch.equal(x.variance, y.variance)
        assert x.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_saved_state_does_not_change_when_the_chain_goes_on():
    parameters = [_parameter(torch.zeros(5))]
    sampler = bkd.SGLD(parameters, 0.1, num_data=10)
    sampler.track_moments()
    _train(sampler, parameters, range(3))
    saved = copy.deepcopy(sampler.state_dict())
    live = sampler.state_dict()
    _train(sampler, parameters, range(3))
    assert (
        live["param_groups"][0]["moments"]
        == saved["param_groups"][0]["moments"]
        == {"start": 0, "every": 1, "draws": 3}
    )


def test_parameters_are_matched_by_name_on_load():
    a, b = _parameter(torch.zeros(4)), _parameter(torch.zeros(4))
    saved = bkd.SGLD([("a", a), ("b", b)], 0.1, num_data=10, seed=9)
    saved.step()
    state = saved.state_dict()
    saved.step()
    a2, b2 = _parameter(torch.zeros(4)), _parameter(torch.zeros(4))
    other = bkd.SGLD([("b", b2), ("a", a2)], 0.1, num_data=10, seed=9)
    other.step()  # numbers the other way round: other noise
    with torch.no_grad():
        one = math.sqrt(0.02)
        a2.copy_(one * normal(4, seed=9, parameter=0))
        b2.copy_(one * normal(4, seed=9, parameter=1))
    other.load_state_dict(state)
    other.step()
    torch.testing.assert_close(a2, a, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(b2, b, rtol=1e-6, atol=1e-8)
    third = bkd.SGLD([("a", _parameter(torch.zeros(4))), ("c", _parameter(torch.zeros(4)))], 0.1, num_data=10, chain=7)
    with pytest.raises(ValueError, match="differs in the names b, c"):
        third.load_state_dict(state)


def test_a_changed_memory_format_warns_on_resume():
    parameter = _parameter(torch.zeros(2, 3, 4, 5))
    sampler = bkd.SGLD([parameter], 0.1, num_data=10)
    sampler.step()
    state = sampler.state_dict()
    del sampler
    moved = _parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    resumed = bkd.SGLD([moved], 0.1, num_data=10)
    resumed.load_state_dict(state)
    with pytest.warns(bkd.BKDFastWarning, match="strides"):
        resumed.step()


def test_deepcopy_and_pickle_continue_the_chain():
    parameter = _parameter(torch.zeros(5))
    sampler = bkd.SGLD([parameter], 0.1, num_data=10)
    sampler.step()
    copies = [copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    sampler.step()
    for other in copies:
        mine = other.param_groups[0]["params"][0]
        mine.grad = torch.zeros(5)
        other.step()
        assert torch.equal(mine, parameter)


# ---- warnings ----


def test_two_samplers_with_the_same_noise_warn():
    first = bkd.SGLD([_parameter(torch.zeros(2))], 0.1, num_data=10)
    with pytest.warns(bkd.BKDFastWarning, match="chain="):
        bkd.SGLD([_parameter(torch.zeros(2))], 0.1, num_data=10)
    bkd.SGLD([_parameter(torch.zeros(2))], 0.1, num_data=10, chain=1)
    bkd.SGLD(first.param_groups[0]["params"], 0.1, num_data=10)  # the same parameters: a replacement


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, r"lr = -0\.1: must be finite and at least 0"),
        ({"lr": math.nan}, ValueError, "lr = nan"),
        ({"num_data": 0}, ValueError, "num_data = 0: must be positive"),
        ({"num_data": -5}, ValueError, "num_data = -5"),
        ({"num_data": None}, TypeError, "num_data = None"),
        ({"temperature": -1.0}, ValueError, r"temperature = -1\.0"),
        ({"prior_precision": -1.0}, ValueError, r"prior_precision = -1\.0"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay = inf"),
        ({"weight_decay": 0.1, "prior_precision": 0.1}, ValueError, "give one of them"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite = 'ignore'"),
        ({"rounding": "up"}, ValueError, "rounding = 'up'"),
        ({"seed": -1}, ValueError, "seed = -1"),
        ({"seed": 0.5}, TypeError, r"seed = 0\.5"),
        ({"chain": 2**20}, ValueError, "chain = 1048576"),
        ({"prior_mean": [torch.zeros(2)]}, ValueError, "prior_mean is given with prior_precision = 0"),
        ({"prior_mean": [torch.zeros(3)], "prior_precision": 1.0}, ValueError, r"prior_mean\[0\] has shape \(3,\)"),
        ({"prior_mean": [], "prior_precision": 1.0}, ValueError, "prior_mean has 0 tensors"),
        ({"prior_mean": {"a": torch.zeros(2)}, "prior_precision": 1.0}, ValueError, "named parameters"),
    ],
)
def test_bad_settings(change, error, message):
    settings = {"lr": 0.1, "num_data": 10, **change}
    with pytest.raises(error, match=message):
        bkd.SGLD([_parameter(torch.zeros(2))], **settings)


def test_num_data_is_required():
    with pytest.raises(TypeError, match="num_data"):
        bkd.SGLD([_parameter(torch.zeros(2))], 0.1)


def test_a_bad_group_is_not_added():
    sampler = bkd.SGLD([_parameter(torch.zeros(2))], 0.1, num_data=10)
    for bad in ({"lr": -1.0}, {"prior_precision": 1.0, "prior_mean": []}):
        with pytest.raises(ValueError, match=r"lr|prior_mean"):
            sampler.add_param_group({"params": [_parameter(torch.zeros(2))], **bad})
    with pytest.raises(TypeError, match=r"torch\.complex64"):
        sampler.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64, requires_grad=True)]})
    with pytest.raises(TypeError, match=r"torch\.int64"):
        sampler.add_param_group({"params": [torch.zeros(2, dtype=torch.int64)]})
    assert len(sampler.param_groups) == 1


def test_a_setting_broken_later_is_seen_before_anything_moves():
    parameters = [_parameter(torch.zeros(2)), _parameter(torch.zeros(2))]
    sampler = bkd.SGLD([{"params": parameters[:1]}, {"params": parameters[1:]}], 0.1, num_data=10)
    sampler.param_groups[1]["lr"] = -0.1
    with pytest.raises(ValueError, match=r"lr = -0\.1"):
        sampler.step()
    assert not parameters[0].any()


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(TypeError, match="sparse"):
        bkd.SGLD(embedding.named_parameters(), 0.1, num_data=10).step()
    assert torch.equal(before, embedding.weight)


def test_unknown_parameter_has_no_moments():
    sampler = bkd.SGLD([_parameter(torch.zeros(2))], 0.1, num_data=10)
    with pytest.raises(ValueError, match="not one of this sampler's"):
        sampler.moments(_parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="track_moments"):
        sampler.moments(sampler.param_groups[0]["params"][0])
    with pytest.raises(ValueError, match="every = 0"):
        sampler.track_moments(every=0)


def test_a_step_beyond_the_counter_is_an_error_before_anything_moves():
    theta = torch.nn.Parameter(torch.ones(3))
    theta.grad = torch.ones(3)
    sampler = bkd.SGLD([theta], 0.1, num_data=10)
    sampler.step()
    sampler.param_groups[0]["step"] = 2**44
    before = theta.detach().clone()
    with pytest.raises(ValueError, match="step = 17592186044416"):
        sampler.step()
    assert torch.equal(theta, before)
