"""Streaming quantiles of parameters against the draws, saved chains that go on, and the network at the posterior mean."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bkd_fast as bkd


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def chain(model: nn.Module, **settings) -> bkd.SGLD:
    return bkd.SGLD(
        model.named_parameters(), **{"lr": 0.05, "num_data": 50, "prior_precision": 1.0, "seed": 0, **settings}
    )


def step(model: nn.Module, sampler: bkd.SGLD, index: int) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(index))
    sampler.zero_grad()
    nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
    sampler.step()


def run(model: nn.Module, sampler: bkd.SGLD, steps: range) -> list[dict[str, Tensor]]:
    draws = []
    for index in steps:
        step(model, sampler, index)
        draws.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return draws


def test_quantiles_are_those_of_the_counted_draws() -> None:
    model = network()
    sampler = chain(model)
    sampler.track_quantiles(["0.weight", "2.bias"], start=20, every=3)
    draws = run(model, sampler, range(400))[20::3]
    for name in ("0.weight", "2.bias"):
        values = torch.stack([draw[name] for draw in draws]).double()
        sketch = sampler.quantiles(name)
        assert (sketch.counts == len(draws)).all()
        for q in (0.025, 0.5, 0.9):
            exact = values.sort(0).values[int(-(-q * len(draws) // 1)) - 1]
            lower, upper = sketch.quantile_bounds(q)
            assert ((lower <= exact) & (exact <= upper)).all()
            assert ((sketch.quantile(q) - exact).abs() <= 0.1 * values.std(0)).all()


@pytest.mark.parametrize("cut", [10, 32, 50, 77])
def test_a_saved_chain_goes_on_with_its_quantiles(cut: int) -> None:
    model = network()
    sampler = chain(model)
    sampler.track_quantiles(["2.weight"])
    run(model, sampler, range(cut))
    other = copy.deepcopy(model)
    resumed = chain(other)
    resumed.load_state_dict(copy.deepcopy(sampler.state_dict()))
    for net, its in ((model, sampler), (other, resumed)):
        run(net, its, range(cut, 100))
    a, b = (s.quantiles("2.weight").state_dict() for s in (sampler, resumed))
    assert all(torch.equal(x, b[name]) if isinstance(x, Tensor) else x == b[name] for name, x in a.items())
    assert int(a["counts"].max()) == 100


def test_steps_that_do_not_count_give_no_draw() -> None:
    model = network()
    sampler = chain(model)
    sampler.track_quantiles(["0.bias"], start=1)
    run(model, sampler, range(2))
    sampler.param_groups[0]["lr"] = 0.0
    run(model, sampler, range(3))
    assert sampler.quantiles("0.bias").counts.tolist() == [1] * 4


def test_an_element_that_does_not_move_has_its_value_for_quantile() -> None:
    model = network()
    sampler = chain(model, temperature=0.0, prior_precision=0.0)
    sampler.track_quantiles(["0.weight"])
    for _ in range(70):
        sampler.zero_grad()
        (0 * sum(p.sum() for p in model.parameters())).backward()
        sampler.step()
    torch.testing.assert_close(
        sampler.quantiles("0.weight").quantile(0.5), model[0].weight.detach(), rtol=1e-6, atol=1e-9
    )


def test_bad_tracking() -> None:
    model = network()
    sampler = chain(model)
    for names in ([], ["0.weight", "3.weight"]):
        with pytest.raises(
            ValueError, match=r"names = .*: must be some of the sampler's parameter names, 0\.weight, 0\.bias"
        ):
            sampler.track_quantiles(names)
    with pytest.raises(ValueError, match="start = -1"):
        sampler.track_quantiles(["0.weight"], start=-1)
    with pytest.raises(ValueError, match="every = 0"):
        sampler.track_quantiles(["0.weight"], every=0)
    with pytest.raises(ValueError, match="needs track_quantiles"):
        sampler.quantiles("0.weight")
    sampler.track_quantiles(["0.weight"])
    with pytest.raises(ValueError, match=r"name = '0\.bias': must be one of \['0\.weight'\]"):
        sampler.quantiles("0.bias")
    with pytest.raises(ValueError, match="has no counted draw yet"):
        sampler.quantiles("0.weight")
    with pytest.raises(ValueError, match=r"capturable = True in the group of 0\.weight: must be False"):
        chain(network(), capturable=True).track_quantiles(["0.weight"])
    unnamed = bkd.SGLD(network().parameters(), lr=0.1, num_data=10)
    with pytest.raises(ValueError, match=r"the state has quantiles of 0\.weight"):
        unnamed.load_state_dict(sampler.state_dict())


def test_the_mean_model_has_the_means_and_leaves_the_live_one_alone() -> None:
    model = network()
    sampler = chain(model)
    sampler.track_moments(start=10)
    draws = run(model, sampler, range(60))[10:]
    live = copy.deepcopy(model.state_dict())
    averaged = bkd.mean_model(model, sampler)
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter, torch.stack([draw[name] for draw in draws]).mean(0))
        assert parameter.requires_grad
    assert not averaged.training and model.training
    assert all(torch.equal(x, live[name]) for name, x in model.state_dict().items())


def test_the_mean_model_of_a_head_keeps_the_body() -> None:
    model = network()
    head = bkd.SGLD(model[2].named_parameters(), lr=0.05, num_data=50, seed=0)
    head.track_moments()
    run(model, head, range(5))
    averaged = bkd.mean_model(model, head)
    assert torch.equal(averaged[0].weight, model[0].weight) and not torch.equal(averaged[2].weight, model[2].weight)
    with pytest.raises(ValueError, match="model has none of the sampler's parameters"):
        bkd.mean_model(network(), head)
    with pytest.raises(ValueError, match="needs track_moments"):
        bkd.mean_model(model, chain(model))
