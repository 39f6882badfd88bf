"""K networks as one module: what each is alone, in every mode; and `sample` on it: every chain what a sampler of its own does."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd


def _net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


X = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def test_every_chain_is_the_network_alone():
    networks = [_net(seed) for seed in range(3)]
    stacked = bkd.StackedModule(networks)
    for mode in (True, False, False):
        stacked.train(mode)
        together = stacked(X)
        for k, network in enumerate(networks):
            network.train(mode)
            torch.testing.assert_close(together[k], network(X))
    for k, network in enumerate(networks):  # running statistics too
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(stacked.get_buffer(f"stacked.{name}")[k], buffer)


def test_gradients_of_the_sum_are_those_of_each():
    networks = [_net(seed).eval() for seed in range(3)]
    stacked = bkd.StackedModule(networks).eval()
    (3 * stacked(X).square().mean()).backward()
    for k, network in enumerate(networks):
        network(X).square().mean().backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(stacked.get_parameter(f"stacked.{name}").grad[k], parameter.grad)


def test_a_chain_is_of_views_and_can_be_turned():
    stacked = bkd.StackedModule([_net(0), _net(1)]).eval()
    one = stacked.chain(1)
    torch.testing.assert_close(one(X), stacked(X)[1])
    with torch.no_grad():
        stacked.get_parameter("stacked.3.bias")[1] += 1
    torch.testing.assert_close(one(X), stacked(X)[1])
    assert stacked.chain(0, into=one) is one
    torch.testing.assert_close(one(X), stacked(X)[0])


def test_shared_parameters_stay_shared():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    stacked = bkd.StackedModule(net, chains=2)
    assert len(list(stacked.parameters())) == 1
    torch.testing.assert_close(stacked(torch.ones(1, 3))[1], net(torch.ones(1, 3)))


def _data():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, torch.arange(40) % 3), batch_size=40), x


def _mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def test_sample_yields_the_draws_of_every_chain():
    """Equal to one run for each chain, up to the rounding of batched products; the posterior holds all of them."""
    loader, x = _data()
    teacher, loss = _mlp(9), bkd.KDLoss(2.0)
    settings = {"num_data": 40, "prior_precision": 1.0, "seed": 4}
    stacked = bkd.StackedModule([_mlp(0), _mlp(1)])
    sampler = bkd.SGHMC(stacked.named_parameters(), 0.02, chains=2, chain=3, **settings)
    posterior = bkd.PosteriorPredictive(num_rows=40, num_classes=3)
    counts = {"warm_start": 2, "burn_in": 3, "thin": 2, "num_draws": 4}
    draws = []
    for draw in bkd.sample(stacked, sampler, loss, loader, teacher=teacher, **counts):
        posterior.update(draw, loader)
        draws.append((draw.chain, draw.index, draw.snapshot()))
    assert [(chain, index) for chain, index, _ in draws] == [(3 + k, i) for i in range(4) for k in range(2)]
    logits = []
    for k in range(2):
        student = _mlp(k)
        alone = bkd.SGHMC(student.named_parameters(), 0.02, chain=3 + k, **settings)
        for draw in bkd.sample(student, alone, loss, loader, teacher=teacher, **counts):
            snapshot = next(s for chain, index, s in draws if (chain, index) == (draw.chain, draw.index))
            assert set(snapshot) == set(draw.snapshot())
            for name, value in draw.snapshot().items():
                torch.testing.assert_close(snapshot[name], value, rtol=1e-3, atol=1e-4)
            logits.append(student(x).detach())
    assert (posterior.counts == 8).all()
    torch.testing.assert_close(posterior.mean, torch.stack(logits).softmax(-1).mean(0), rtol=1e-3, atol=1e-4)


def test_sample_refuses_chains_that_disagree():
    loader, _ = _data()
    stacked = bkd.StackedModule(_mlp(0), chains=2)
    plain = _mlp(0)
    for student, sampler in (
        (stacked, bkd.SGLD(stacked.parameters(), 0.1, num_data=40)),
        (plain, bkd.SGLD([nn.Parameter(torch.zeros(2, 3))], 0.1, num_data=40, chains=2)),
    ):
        with pytest.raises(ValueError, match=r"must agree|must hold only its own"):
            bkd.sample(student, sampler, bkd.KDLoss(1.0), loader, num_draws=1)


@pytest.mark.parametrize(
    ("module", "chains", "message"),
    [
        (_mlp(0), None, "chains = None"),
        (_mlp(0), 0, "chains = 0"),
        ([_mlp(0)], 2, "chains = 2 with 1 networks"),
        ([], None, "0 networks"),
        ([nn.Linear(2, 3), nn.Linear(2, 4)], None, "network 1 differs from network 0 in bias, weight"),
    ],
)
def test_bad_input(module, chains, message):
    with pytest.raises(ValueError, match=message):
        bkd.StackedModule(module, chains)
