"""Many chains in one sampler: bit for bit what each is alone, whatever its lr and temperature, through saving and loading."""

import pytest
import torch
from test_laws import SAMPLERS

import bkd_fast as bkd

SHAPES = [(7, 5), (5,), (), (3, 2, 4, 4), (2000,)]
K = 3


def _gradients(step, dtype):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn((K, *shape), generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def _run(sampler, params, steps, dtype, chain=None):
    for step in steps:
        for parameter, gradient in zip(params, _gradients(step, dtype), strict=True):
            parameter.grad = gradient.clone() if chain is None else gradient[chain].clone()
        sampler.step()


def _parameters(values):
    return [value.clone().requires_grad_() for value in values]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("own_numbers", [False, True])
def test_chains_are_the_chains_alone(name, dtype, own_numbers):
    sampler_class, settings = SAMPLERS[name]
    lrs, temperatures = ([0.01, 0.03, 0.02], [1.0, 0.3, 2.0]) if own_numbers else ([0.02] * K, [0.7] * K)
    common = {"num_data": 40, "prior_precision": 3.0, "seed": 11, **settings}
    start = _gradients(100, dtype)
    means = [torch.full(shape, 0.5) for shape in SHAPES]
    together = _parameters(start)
    lr = torch.tensor(lrs, dtype=torch.float64) if own_numbers else lrs[0]
    temperature = torch.tensor(temperatures, dtype=torch.float64) if own_numbers else temperatures[0]
    sampler = sampler_class(
        together, lr, temperature=temperature, chains=K, chain=5, prior_mean=means, **common
    )  # fmt: skip
    sampler.track_moments(start=2)
    _run(sampler, together, range(6), dtype)
    for k in range(K):
        alone = _parameters([value[k] for value in start])
        single = sampler_class(
            alone, lrs[k], temperature=temperatures[k], chain=5 + k, prior_mean=means, **common
        )  # fmt: skip
        single.track_moments(start=2)
        _run(single, alone, range(6), dtype, chain=k)
        for whole, one in zip(together, alone, strict=True):
            assert torch.equal(whole[k], one)
            assert torch.equal(sampler.moments(whole).mean[k], single.moments(one).mean)


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawn_momenta_are_those_of_the_chains_alone(name):
    sampler_class, settings = SAMPLERS[name]
    start = _gradients(100, torch.float32)
    together = _parameters(start)
    lr, temperature = torch.tensor([0.01, 0.03, 0.02]), torch.tensor([1.0, 0.3, 2.0])
    sampler = sampler_class(together, lr, temperature=temperature, chains=K, num_data=40, seed=11, **settings)
    _run(sampler, together, range(2), torch.float32)
    sampler.draw_momentum()
    _run(sampler, together, range(2, 4), torch.float32)
    for k in range(K):
        alone = _parameters([value[k] for value in start])
        single = sampler_class(
            alone, float(lr[k]), temperature=float(temperature[k]), chain=k, num_data=40, seed=11, **settings
        )
        _run(single, alone, range(2), torch.float32, chain=k)
        single.draw_momentum()
        _run(single, alone, range(2, 4), torch.float32, chain=k)
        for whole, one in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[k], one, rtol=1e-6, atol=1e-6)


def test_stochastically_rounded_chains_have_a_noise_table_each():
    theta = torch.ones(2, 500, dtype=torch.bfloat16, requires_grad=True)
    sampler = bkd.SGLD([theta], torch.tensor([1e-4, 1e-2]), num_data=10, chains=2)
    theta.grad = torch.zeros_like(theta)
    sampler.step()
    for k, lr in enumerate([1e-4, 1e-2]):
        alone = torch.ones(500, dtype=torch.bfloat16, requires_grad=True)
        alone.grad = torch.zeros_like(alone)
        bkd.SGLD([alone], float(torch.tensor(lr)), num_data=10, chain=k).step()
        assert torch.equal(theta[k], alone)


def test_capturable_chains_equal_plain_ones():
    runs = []
    for capturable in (False, True):
        params = _parameters(_gradients(100, torch.float32))
        lr = torch.tensor([0.01, 0.03, 0.02], dtype=torch.float64)
        sampler = bkd.SGHMC(params, lr, num_data=40, chains=K, capturable=capturable)
        _run(sampler, params, range(4), torch.float32)
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_lr_of_zero_in_every_chain_moves_nothing():
    params = _parameters(_gradients(100, torch.float32))
    sampler = bkd.SGHMC(params, torch.zeros(K), num_data=40, chains=K, prior_precision=1.0)
    before = [p.detach().clone() for p in params]
    _run(sampler, params, range(2), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert sampler.param_groups[0]["step"] == 0


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((2, 5), {}, r"shape \(2, 5\): must have a leading axis of 3 chains"),
        ((), {}, r"shape \(\): must have a leading axis"),
        ((3, 5), {"lr": torch.ones(2)}, r"lr has shape \(2,\): must be a number or, one for each chain, \(3,\)"),
        ((3, 5), {"lr": torch.tensor([0.1, 0.0, 0.1])}, "lr = .*: must be positive in every chain, or 0 in all"),
        ((3, 5), {"temperature": torch.tensor([0.1, -1.0, 0.1])}, r"temperature = -1\.0"),
        ((3, 5), {"chains": 0}, "chains = 0"),
        ((3, 5), {"chain": 2**20 - 2}, "the last chain = 1048576"),
        ((3, 5), {"prior_precision": 1.0, "prior_mean": [torch.zeros(4)]}, r"must be \(3, 5\) or \(5,\)"),
    ],
)
def test_bad_chains(shape, change, message):
    with pytest.raises(ValueError, match=message):
        bkd.SGLD([torch.zeros(shape, requires_grad=True)], **{"lr": 0.1, "num_data": 10, "chains": 3, **change})


def test_a_parameter_that_lost_its_chains_is_named_before_anything_moves():
    params = _parameters(_gradients(100, torch.float32))
    sampler = bkd.SGLD([(f"p{i}", p) for i, p in enumerate(params)], 0.1, num_data=10, chains=K)
    with torch.no_grad():
        params[1].set_(torch.zeros(2, 5))
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="parameter 'p1' has shape"):
        sampler.step()
    assert torch.equal(params[0], before)


def test_samplers_whose_chains_overlap_warn():
    first = bkd.SGLD([torch.zeros(4, 2, requires_grad=True)], 0.1, num_data=10, chains=4)
    with pytest.warns(bkd.BKDFastWarning, match="another live sampler"):
        bkd.SGLD([torch.zeros(2, requires_grad=True)], 0.1, num_data=10, chain=3)
    bkd.SGLD([torch.zeros(2, requires_grad=True)], 0.1, num_data=10, chain=4)
    assert first.param_groups[0]["chains"] == 4


def test_a_state_of_another_number_of_chains_is_refused():
    saved = bkd.SGLD([torch.zeros(3, 2, requires_grad=True)], 0.1, num_data=10, chains=3).state_dict()
    other = bkd.SGLD([torch.zeros(2, 2, requires_grad=True)], 0.1, num_data=10, chains=2, chain=7)
    with pytest.raises(ValueError, match="has chains = 3: this sampler has 2"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["chain"] == 7
