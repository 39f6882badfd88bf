"""PSGLD and what preconditioned samplers share: RMSprop at temperature 0, the term Gamma, a metric that can be frozen."""

import copy

import pytest
import stats
import torch

import bkd_fast as bkd


def _parameter(values, dtype=torch.float32):
    return torch.as_tensor(values, dtype=dtype).clone().requires_grad_()


def _variance(gamma, steps=500):
    """Of 20,000 coordinates with U = N theta^2 / 2 and a metric 1 / (0.5 + |g|) of the gradient of the same step."""
    theta = _parameter(0.3 * torch.randn(20_000, generator=torch.Generator().manual_seed(1)))
    sampler = bkd.PSGLD([theta], 0.01, num_data=10, alpha=0.0, eps=0.5, gamma=gamma, seed=3)
    squares = []
    for step in range(steps):
        theta.grad = None
        (theta.square().sum() / 2).backward(create_graph=gamma)
        sampler.step()
        if step >= 300 and step % 50 == 49:
            squares.append(theta.detach().double().square())
    squares = torch.stack(squares).mean(0)
    return float(squares.mean()), float(squares.std()) / len(squares) ** 0.5


def test_gamma_makes_a_metric_that_follows_the_gradient_right():
    """Var = 1 / N with it, within the finite step; without it the law is another one."""
    with_gamma, error = _variance(True)
    assert abs(with_gamma - 0.1) < stats.SIGMAS * error + 0.1 * 0.01  # lr G l / 2 <= 1 % at G <= 2
    without, error = _variance(False)
    assert without > 0.1 + 10 * error and without > 1.1 * with_gamma


def test_gamma_asks_for_the_graph_before_anything_moves():
    theta = _parameter(torch.ones(3))
    sampler = bkd.PSGLD([("theta", theta)], 0.1, num_data=10, gamma=True)
    theta.square().sum().backward()
    with pytest.raises(ValueError, match="gradient of parameter 'theta' has no graph"):
        sampler.step()
    assert torch.equal(theta.detach(), torch.ones(3))
    sampler.zero_grad()
    (theta.square().sum() / 2).backward(create_graph=True)
    sampler.step()
    assert not torch.equal(theta.detach(), torch.ones(3))


@pytest.mark.parametrize("sampler_class", [bkd.PSGLD, bkd.AdamSGHMC])
def test_a_frozen_metric_stays_through_steps_and_saving(sampler_class):
    theta = _parameter(torch.linspace(0.1, 2, 50))
    sampler = sampler_class([theta], 0.01, num_data=100, seed=2)

    def train(sampler, theta, steps):
        for _ in range(steps):
            theta.grad = 3 * theta.detach()
            sampler.step()

    assert sampler.metric(theta) is None
    with pytest.raises(ValueError, match="before the first step"):
        sampler.freeze_metric()
    train(sampler, theta, 5)
    moving = sampler.metric(theta)
    train(sampler, theta, 1)
    assert not torch.equal(moving, sampler.metric(theta))
    sampler.freeze_metric()
    frozen = sampler.metric(theta)
    train(sampler, theta, 5)
    assert torch.equal(frozen, sampler.metric(theta))
    resumed = _parameter(theta.detach())
    other = sampler_class([resumed], 0.01, num_data=100, seed=2)
    other.load_state_dict(copy.deepcopy(sampler.state_dict()))
    train(sampler, theta, 3)
    train(other, resumed, 3)
    assert torch.equal(theta, resumed) and torch.equal(frozen, other.metric(resumed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.0}, r"alpha = 1\.0: must be in \[0, 1\)"),
        ({"eps": 0.0}, r"eps = 0\.0: must be positive"),
        ({"gamma": True, "capturable": True}, "gamma = True with capturable = True"),
        ({"gamma": True, "step_in_backward": True}, "gamma = True with step_in_backward = True"),
        ({"rounding": "stochastic"}, r"rounding = 'stochastic': must be one of \('master', 'nearest'\)"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        bkd.PSGLD([_parameter(torch.zeros(2))], 0.1, num_data=10, **change)


def test_gamma_of_sixteen_bits_is_refused():
    with pytest.raises(ValueError, match="gamma = True for a parameter of"):
        bkd.PSGLD([_parameter(torch.zeros(2), torch.bfloat16)], 0.1, num_data=10, gamma=True)


def test_gamma_of_one_group_leaves_the_other_alone():
    """And copies have what they need, inside the backward pass too."""
    params = [_parameter(torch.linspace(0.1, 2, 5)) for _ in range(3)]
    groups = [{"params": params[:1], "gamma": True}, {"params": params[1:2]}]
    sampler = bkd.PSGLD(groups, 0.01, num_data=10, alpha=0.5, eps=0.1, temperature=1.0)
    alone = bkd.PSGLD([params[2]], 0.01, num_data=10, alpha=0.5, eps=0.1)
    alone.param_groups[0]["parameter_ids"] = [1]
    for optimizer, mine in ((sampler, params[:2]), (alone, params[2:])):
        (sum(p.square().sum() for p in mine) / 2).backward(create_graph=True)
        optimizer.step()
    assert torch.equal(params[1], params[2]) and not torch.equal(params[0], params[1])
    copied = copy.deepcopy(bkd.PSGLD([_parameter(torch.ones(3))], 0.01, num_data=10, step_in_backward=True))
    (theta,) = copied.param_groups[0]["params"]
    theta.grad = torch.ones(3)
    copied.step()
    assert not torch.equal(theta.detach(), torch.ones(3))


def test_a_group_given_as_an_iterator_keeps_its_parameters():
    module = torch.nn.Linear(3, 2)
    sampler = bkd.PSGLD([{"params": module.parameters()}], 0.1, num_data=10, gamma=True)
    assert len(sampler.param_groups[0]["params"]) == 2
    with pytest.raises(ValueError, match="gamma = True for a parameter of"):
        bkd.PSGLD([{"params": module.bfloat16().named_parameters()}], 0.1, num_data=10, gamma=True)


def test_gamma_of_a_loss_to_be_maximised_is_that_of_its_negative():
    moved = []
    for sign in (1, -1):
        theta = _parameter(torch.linspace(0.1, 2, 50), torch.float64)
        settings = {"num_data": 10, "alpha": 0.5, "eps": 0.1, "gamma": True, "maximize": sign < 0}
        sampler = bkd.PSGLD([theta], 0.01, **settings)
        for _ in range(3):
            theta.grad = None
            (sign * theta.square().sum() / 2).backward(create_graph=True)
            sampler.step()
        moved.append(theta.detach())
    torch.testing.assert_close(*moved, rtol=1e-12, atol=1e-14)


def test_gamma_and_moments_are_refused():
    sampler = bkd.PSGLD([_parameter(torch.ones(3))], 0.1, num_data=10, gamma=True)
    with pytest.raises(ValueError, match="track_moments with gamma = True"):
        sampler.track_moments()


@pytest.mark.parametrize("sampler_class", [bkd.PSGLD, bkd.AdamSGHMC])
def test_a_first_gradient_after_freezing_is_refused_and_metrics_of_capturable_samplers_know_the_step(sampler_class):
    params = [_parameter(torch.ones(3)), _parameter(torch.ones(3))]
    sampler = sampler_class([("a", params[0]), ("b", params[1])], 0.01, num_data=10)
    params[0].grad = torch.ones(3)
    sampler.step()
    sampler.freeze_metric()
    params[1].grad = torch.ones(3)
    with pytest.raises(ValueError, match="'b' has its first gradient after freeze_metric"):
        sampler.step()
    metrics = []
    for capturable in (False, True):
        theta = _parameter(torch.ones(3))
        other = sampler_class([theta], 0.01, num_data=10, temperature=0.0, capturable=capturable)
        for _ in range(20):
            theta.grad = torch.ones(3)
            other.step()
        metrics.append(other.metric(theta))
    torch.testing.assert_close(*metrics)
