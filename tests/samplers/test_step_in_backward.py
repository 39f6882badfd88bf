"""step_in_backward: each parameter moves inside the backward pass and loses its gradient; the chain is the same, bit for bit."""

import copy

import pytest
import torch
from test_laws import SAMPLERS
from torch import nn

import bkd_fast as bkd


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))


def _backward(net, step):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    net(x).square().mean().backward()


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_chain_is_the_same(name):
    sampler_class, settings = SAMPLERS[name]
    nets, samplers = [], []
    for inside in (False, True):
        net = _net()
        groups = [{"params": net[0].parameters(), "lr": 0.02}, {"params": net[2].parameters()}]
        sampler = sampler_class(
            groups, 0.01, num_data=40, prior_precision=1.0, step_in_backward=inside, nonfinite="record", **settings
        )  # fmt: skip
        sampler.track_moments(start=1, every=2)
        for step in range(6):
            sampler.zero_grad()
            _backward(net, step)
            assert inside == all(p.grad is None for p in net.parameters())
            sampler.step()
        nets.append(net)
        samplers.append(sampler)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
        x, y = samplers[0].moments(a), samplers[1].moments(b)
        assert x.draws == y.draws == 3 and torch.equal(x.mean, y.mean)
    assert [group["step"] for group in samplers[1].param_groups] == [6, 6]


def test_a_closure_is_a_backward_pass_of_its_own():
    net = _net()
    sampler = bkd.SGLD(net.parameters(), 0.01, num_data=40, step_in_backward=True)

    def closure():
        _backward(net, 0)
        return 7.0

    assert sampler.step(closure) == 7.0 and sampler.param_groups[0]["step"] == 1


def test_a_second_backward_pass_before_step_is_an_error():
    net = _net()
    sampler = bkd.SGLD(net.parameters(), 0.01, num_data=40, step_in_backward=True)
    _backward(net, 0)
    with pytest.raises(RuntimeError, match="second gradient before step"):
        _backward(net, 1)
    sampler.step()
    assert sampler.param_groups[0]["step"] == 1


def test_lr_zero_moves_nothing_and_frees_the_gradients():
    net = _net()
    sampler = bkd.SGHMC(net.parameters(), 0.0, num_data=40, step_in_backward=True)
    before = copy.deepcopy(net.state_dict())
    _backward(net, 0)
    sampler.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and sampler.param_groups[0]["step"] == 0


def test_non_finite_gradients_are_recorded():
    net = _net()
    sampler = bkd.SGLD(net.named_parameters(), 0.01, num_data=40, step_in_backward=True)
    (net(torch.ones(1, 6)).sum() * torch.nan).backward()
    sampler.step()
    with pytest.raises(bkd.NonFiniteError, match="weight"):
        sampler.check()
    with pytest.raises(ValueError, match="step_in_backward = True"):
        bkd.SGLD(_net().parameters(), 0.01, num_data=40, step_in_backward=True, nonfinite="raise")


def test_a_bad_setting_is_seen_before_anything_moves():
    net = _net()
    sampler = bkd.SGLD(net.parameters(), 0.01, num_data=40, step_in_backward=True)
    sampler.param_groups[0]["lr"] = -1.0
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"lr = -1\.0"):
        _backward(net, 0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_hooks_do_not_keep_the_sampler_alive():
    net = _net()
    sampler = bkd.SGLD(net.parameters(), 0.01, num_data=40, step_in_backward=True)
    del sampler
    before = copy.deepcopy(net.state_dict())
    _backward(net, 0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is not None for p in net.parameters())


def test_where_the_step_is_taken_is_the_samplers_own_not_the_chains():
    """A state saved by a plain sampler goes on inside the backward pass, checks included."""
    net = _net()
    plain = bkd.SGLD(net.named_parameters(), 0.01, num_data=40)
    _backward(net, 0)
    plain.step()
    plain.zero_grad()
    inside = bkd.SGLD(net.named_parameters(), 0.01, num_data=40, step_in_backward=True)
    inside.load_state_dict(plain.state_dict())
    assert inside.param_groups[0]["step_in_backward"]
    (net(torch.ones(1, 6)).sum() * torch.nan).backward()
    inside.step()
    with pytest.raises(bkd.NonFiniteError):
        inside.check()
