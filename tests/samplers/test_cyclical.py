"""The cyclical schedule: equation 1 step by step, phases, momenta where they begin, and a chain that goes on after a save."""

import copy
import math
import warnings

import pytest
import torch
from stats import assert_variance
from torch import nn
from torch.optim.lr_scheduler import LinearLR, SequentialLR

import bkd_fast as bkd
from bkd_fast.samplers.cyclical import CyclicalSchedule


def _step(sampler, schedule, gradient=0.5):
    for group in sampler.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, gradient)
    sampler.step()
    schedule.step()


def _sghmc(size=8, **settings):
    theta = nn.Parameter(torch.zeros(size))
    return theta, bkd.SGHMC([theta], **{"lr": 0.1, "num_data": 100, "momentum": 0.9, **settings})


@pytest.mark.filterwarnings("error")  # torch's, of a wrong order
def test_every_step_is_equation_1():
    """The paper counts k from 1: alpha_0 / 2 (cos(pi mod(k - 1, K) / K) + 1), sampling where mod(k - 1, K) / K >= beta."""
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.3, "temperature": 0.5}]
    sampler = bkd.SGLD(groups, 0.1, num_data=50)
    schedule = CyclicalSchedule(sampler, 10, 0.7)
    for k in range(1, 36):
        r = (k - 1) % 10 / 10
        for group, lr, temperature in zip(sampler.param_groups, (0.1, 0.3), (1.0, 0.5), strict=True):
            assert group["lr"] == pytest.approx(lr / 2 * (math.cos(math.pi * r) + 1), rel=1e-12) and group["lr"] > 0
            assert group["temperature"] == (temperature if r >= 0.7 else 0)
        assert schedule.sampling == (r >= 0.7) and schedule.cycle == (k - 1) // 10
        assert schedule.get_last_lr() == [group["lr"] for group in sampler.param_groups]
        _step(sampler, schedule)


def test_without_exploration_every_step_samples():
    _, sampler = _sghmc()
    schedule = CyclicalSchedule(sampler, 4, 0.0)
    for _ in range(9):
        assert schedule.sampling and sampler.param_groups[0]["temperature"] == 1
        _step(sampler, schedule)


def test_momenta_are_drawn_where_a_phase_begins(monkeypatch):
    _, sampler = _sghmc()
    drawn = []
    monkeypatch.setattr(sampler, "draw_momentum", lambda: drawn.append(sampler.param_groups[0]["step"]))
    schedule = CyclicalSchedule(sampler, 10, 0.75)
    for _ in range(30):
        _step(sampler, schedule)
    assert drawn == [8, 10, 18, 20, 28, 30]  # after so many steps; 7.5 steps explore


def test_a_restart_does_not_throw_the_chain():
    """The momentum at the end of a cycle is that of an lr 4000 times smaller; after the restart only the gradient moves."""
    theta, sampler = _sghmc(1000)
    schedule = CyclicalSchedule(sampler, 100, 0.5)
    for _ in range(100):
        _step(sampler, schedule)
    assert not schedule.sampling and float(theta.detach().std()) > 0
    before = theta.detach().clone()
    _step(sampler, schedule)
    torch.testing.assert_close(theta.detach(), before - 0.1 * 0.5, rtol=0, atol=1e-6)


def test_sampling_begins_with_a_warm_momentum():
    theta, sampler = _sghmc(200_000, temperature=0.7, dampening=0.2)
    schedule = CyclicalSchedule(sampler, 10, 0.5)
    for _ in range(5):
        _step(sampler, schedule)
    group = sampler.param_groups[0]
    assert schedule.sampling and group["lr"] == pytest.approx(0.05)
    expected = 2 * 0.8 * 0.7 / (1.9 * 0.05 * 100)
    assert_variance(sampler.state[theta]["momentum_buffer"], expected, "momentum where sampling begins")


def test_a_learning_rate_that_is_a_tensor_is_filled_in_place():
    for settings in ({}, {"capturable": True}):
        lr = torch.tensor(0.2, dtype=torch.float64)
        _, sampler = _sghmc(lr=lr, **settings)
        schedule = CyclicalSchedule(sampler, 8, 0.5)
        for _ in range(3):
            _step(sampler, schedule)
        assert sampler.param_groups[0]["lr"] is lr
        assert float(lr) == pytest.approx(0.1 * (math.cos(math.pi * 3 / 8) + 1))


@pytest.mark.parametrize("by", ["state_dict", "last_epoch"])
def test_a_resumed_chain_equals_the_uninterrupted_one(by):
    theta, sampler = _sghmc(temperature=0.5, seed=3)
    schedule = CyclicalSchedule(sampler, 10, 0.6)
    for _ in range(17):  # in the second sampling phase
        _step(sampler, schedule)
    saved = copy.deepcopy((theta.detach(), sampler.state_dict(), schedule.state_dict()))
    for _ in range(20):
        _step(sampler, schedule)

    other, resumed = _sghmc(temperature=0.5, seed=3)
    other.data.copy_(saved[0])
    if by == "state_dict":
        going_on = CyclicalSchedule(resumed, 10, 0.6)
        resumed.load_state_dict(saved[1])
        going_on.load_state_dict(saved[2])
    else:
        resumed.load_state_dict(saved[1])
        going_on = CyclicalSchedule(resumed, 10, 0.6, last_epoch=saved[2]["last_epoch"] - 1)
    assert going_on.sampling and resumed.param_groups[0]["temperature"] == 0.5
    for _ in range(20):
        _step(resumed, going_on)
    assert torch.equal(other, theta) and going_on.cycle == schedule.cycle == 3


def test_a_later_schedule_has_the_settings_of_the_first():
    """The first one leaves the sampler exploring, at temperature 0 and another lr."""
    _, sampler = _sghmc(temperature=0.5)
    schedule = CyclicalSchedule(sampler, 10)
    for _ in range(3):
        _step(sampler, schedule)
    CyclicalSchedule(sampler, 2, 0.0)
    assert sampler.param_groups[0]["temperature"] == 0.5 and sampler.param_groups[0]["lr"] == 0.1


def test_after_another_schedule():
    _, sampler = _sghmc()
    parts = [LinearLR(sampler, 0.5, 1.0, 4), CyclicalSchedule(sampler, 4, 0.5)]
    schedule = SequentialLR(sampler, parts, [4])
    seen = []
    for _ in range(12):
        seen.append((sampler.param_groups[0]["lr"], sampler.param_groups[0]["temperature"]))
        _step(sampler, schedule)
    cycle = [(0.05 * (math.cos(math.pi * k / 4) + 1), float(k >= 2)) for k in range(4)]
    expected = [(0.1 * (0.5 + 0.125 * k), 0.0) for k in range(4)] + 2 * cycle
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "cycle_length = 0: must be at least 1"),
        ((10.0,), TypeError, r"cycle_length = 10\.0: must be an int"),
        ((10, 1.0), ValueError, r"exploration = 1\.0: must be in \[0, 1\)"),
        ((10, -0.1), ValueError, r"exploration = -0\.1"),
        ((10, math.nan), ValueError, "exploration = nan"),
        ((4, 0.8), ValueError, r"exploration = 0\.8 with cycle_length = 4: must be at most 0\.75"),
        ((10, 0.8, 5), ValueError, "last_epoch = 5: must be -1"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    _, sampler = _sghmc()
    before = {key: value for key, value in sampler.param_groups[0].items() if key != "params"}
    with pytest.raises(error, match=message):
        CyclicalSchedule(sampler, *arguments)
    assert {key: value for key, value in sampler.param_groups[0].items() if key != "params"} == before


def test_other_optimizers_and_learning_rates_of_chains_are_refused():
    theta = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(TypeError, match="sampler is a SGD: must be a sampler of bkd_fast"):
        CyclicalSchedule(torch.optim.SGD([theta], 0.1), 10)
    sampler = bkd.SGLD([theta], torch.tensor([0.1, 0.2, 0.3]), num_data=10, chains=3)
    with pytest.raises(ValueError, match=r"lr of parameter group 0 has shape \(3,\)"):
        CyclicalSchedule(sampler, 10)


def test_each_chain_has_its_temperature_again():
    theta, temperature = nn.Parameter(torch.zeros(2, 3)), torch.tensor([0.5, 1.0])
    sampler = bkd.SGLD([theta], 0.1, num_data=10, chains=2, temperature=temperature)
    schedule = CyclicalSchedule(sampler, 4, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(6):
            found = sampler.param_groups[0]["temperature"]
            assert found is temperature if k % 4 >= 2 else found == 0
            _step(sampler, schedule)
