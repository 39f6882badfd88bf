"""Chains of every sampler survive being saved: bit for bit, in every dtype, and states that lack what came later load."""

import copy
import pickle

import pytest
import torch
from test_laws import SAMPLERS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _make(name, dtype, values=None, **change):
    sampler_class, settings = SAMPLERS[name]
    start = [torch.randn(7, 5, generator=torch.Generator().manual_seed(i)) / 4 for i in range(3)]
    params = [v.detach().to(dtype).clone().requires_grad_() for v in values or start]
    means = [torch.full((7, 5), 0.5)] * 3
    settings = {"num_data": 50, "prior_precision": 2.0, "prior_mean": means, "seed": 2**64 - 3, **settings, **change}
    return params, sampler_class([(f"p{i}", p) for i, p in enumerate(params)], 0.01, **settings)


def _train(sampler, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        sampler.step()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_chain_equals_the_uninterrupted_one(name, dtype, tmp_path):
    whole, sampler = _make(name, dtype)
    sampler.track_moments(start=2)
    _train(sampler, whole, range(8))
    part, first = _make(name, dtype)
    first.track_moments(start=2)
    _train(first, part, range(4))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed, second = _make(name, dtype, part)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    _train(second, resumed, range(4, 8))
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)
        for key, value in sampler.state[a].items():
            other = second.state[b][key]
            assert torch.equal(value, other) and value.dtype == other.dtype, key
        assert torch.equal(sampler.moments(a).variance, second.moments(b).variance)


@pytest.mark.parametrize("name", SAMPLERS)
def test_copies_and_pickles_continue_the_chain(name):
    params, sampler = _make(name, torch.float32)
    _train(sampler, params, range(3))
    copies = [copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    _train(sampler, params, range(3, 5))
    for other in copies:
        mine = other.param_groups[0]["params"]
        _train(other, mine, range(3, 5))
        assert all(torch.equal(a, b) for a, b in zip(params, mine, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_state_of_before_chains_loads(name):
    """Groups without the settings that came later get what samplers did before there was a choice."""
    params, sampler = _make(name, torch.float32)
    _train(sampler, params, range(3))
    state = copy.deepcopy(sampler.state_dict())
    for group in state["param_groups"]:
        del group["chains"], group["step_in_backward"], group["rounding"]
    resumed, other = _make(name, torch.float32, params)
    other.load_state_dict(state)
    _train(sampler, params, range(3, 6))
    _train(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_lr_zero_gives_birth_to_the_state_and_moves_nothing(name):
    """What distributed checkpointing does before it loads: step() with lr = 0 and zero gradients."""
    params, sampler = _make(name, torch.bfloat16)
    before = [p.detach().clone() for p in params]
    sampler.param_groups[0]["lr"] = 0.0
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    sampler.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert sampler.param_groups[0]["step"] == 0
    assert all(set(sampler.states) <= set(sampler.state[p]) for p in params)


@pytest.mark.parametrize("name", SAMPLERS)
def test_capturable_steps_equal_plain_ones(name):
    runs = []
    for capturable in (False, True):
        params, sampler = _make(name, torch.float32, capturable=capturable)
        _train(sampler, params, range(5))
        if capturable:
            assert sampler.state_dict()["param_groups"][0]["step"] == 5
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        if name == "AdamSGHMC":  # beta^t by two libraries
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_hold_the_chain_of_float32(name, dtype):
    """Bit for bit that of float32 parameters with the gradients widened."""
    narrow, sampler = _make(name, dtype, rounding="master", prior_precision=0.0, prior_mean=None)
    wide, other = _make(name, torch.float32, narrow, prior_precision=0.0, prior_mean=None)
    for step in range(5):
        _train(sampler, narrow, [step])
        for a, b in zip(narrow, wide, strict=True):
            b.grad = a.grad.float()
        other.step()
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(sampler.state[a]["master"], b) and torch.equal(a, b.to(dtype))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_parameter_that_changes_its_shape_is_refused_before_anything_moves(name):
    """Its state, or its prior's mean, is of the old one."""
    params, sampler = _make(name, torch.float32)
    _train(sampler, params, [0])
    with torch.no_grad():
        params[2].set_(torch.zeros(2, 3))
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=r"parameter 'p2' has shape \(2, 3\).*must keep its shape"):
        sampler.step()
    assert torch.equal(params[0], before) and sampler.param_groups[0]["step"] == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_lr_of_zero_that_only_the_device_knows_leaves_the_chain_where_it_is(name):
    """A warm-up's first steps in a graph: afterwards the chain is that of a sampler that never took them."""
    runs = []
    for idle in (0, 3):
        params, sampler = _make(name, torch.float32, capturable=True)
        _train(sampler, params, [0])
        rate = sampler.param_groups[0]["lr"]
        before = float(rate)
        rate.zero_()
        for _ in range(idle):
            for parameter in params:
                parameter.grad = torch.ones_like(parameter)
            sampler.step()
        rate.fill_(before)
        runs.append((params, sampler))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(a, b)
        for key, value in runs[0][1].state[a].items():
            if not (name == "SGNHT" and key == "momentum_buffer"):
                assert torch.equal(value, runs[1][1].state[b][key]), key


def test_what_is_loaded_replaces_prior_means_and_settings():
    """A scheduler's key that the saved groups lack, a prior mean that the saved chain had not, a rate for each chain."""
    params, saved = _make("SGLD", torch.float32, prior_mean=None)
    _train(saved, params, [0])
    state = copy.deepcopy(saved.state_dict())
    schedule = torch.optim.lr_scheduler.StepLR(saved, 1)
    _train(saved, params, [1])
    saved.load_state_dict(state)
    _train(saved, params, [2])
    assert schedule.optimizer is saved
    resumed, other = _make("SGLD", torch.float32, params)
    other.load_state_dict(copy.deepcopy(saved.state_dict()))
    _train(saved, params, [3])
    _train(other, resumed, [3])
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    rates = torch.tensor([0.01, 0.03], dtype=torch.float64)
    chains = [torch.zeros(2, 3, requires_grad=True) for _ in range(2)]
    samplers = [SAMPLERS["SGHMC"][0]([c], rates.clone(), num_data=9, chains=2, capturable=True) for c in chains]
    for sampler, chain in zip(samplers, chains, strict=True):
        _train(sampler, [chain], [0])
    samplers[1].load_state_dict(samplers[0].state_dict())
    assert torch.equal(samplers[1].param_groups[0]["lr"], rates)
