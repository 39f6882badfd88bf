"""Group lasso against its closed form, and networks that are the same function without the units that it cut."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from bkd_fast.app.experiments.common import seeded
from bkd_fast.methods.group_lasso import GroupLasso, norms_of, prune


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)),
        0,
    ).eval()


def cnn() -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.GELU(),
            nn.Flatten(), nn.Linear(4 * 4 * 4, 6), nn.ReLU(), nn.Linear(6, 3),
        ),
        1,
    )  # fmt: skip


# ---- the proximal step ----


def test_a_step_is_the_proximal_operator():
    """It minimises |v - w|^2 / 2 + t sum of |group|, w the parameters before: here at points around it, in float64."""
    network = mlp().double()
    before = [parameter.clone() for layer in (network[0], network[2]) for parameter in (layer.weight, layer.bias)]
    lasso, optimizer = GroupLasso(network, 2.0), torch.optim.SGD(network.parameters(), 0.3)
    last = network[5].weight.clone()
    lasso.follow(optimizer)
    optimizer.step()  # without gradients: only the proximal step moves
    after = [parameter.detach() for layer in (network[0], network[2]) for parameter in (layer.weight, layer.bias)]
    for (w, b), (v, c) in zip((before[:2], before[2:]), (after[:2], after[2:]), strict=True):
        groups, found = torch.cat([w, b[:, None]], 1).detach(), torch.cat([v, c[:, None]], 1)
        norms = groups.norm(dim=1)
        assert ((found == 0).all(1) == (norms <= 0.6)).all()
        torch.testing.assert_close(found, groups * (1 - 0.6 / norms).clamp_min(0)[:, None])

        def value(x, groups=groups):
            return (x - groups).square().sum() / 2 + 0.6 * x.norm(dim=1).sum()

        for seed in range(20):
            nearby = found + 1e-3 * torch.randn(found.shape, generator=generator(seed), dtype=torch.float64)
            assert value(nearby) > value(found)
    assert torch.equal(network[5].weight, last)


def test_the_penalty_is_the_sum_of_norms_of_hidden_units():
    network = mlp()
    groups = [torch.cat([layer.weight, layer.bias[:, None]], 1) for layer in (network[0], network[2])]
    expected = sum(unit.norm() for group in groups for unit in group)
    torch.testing.assert_close(GroupLasso(network, 0.5).penalty(), 0.5 * expected)
    assert len(norms_of(cnn()[0])) == 5


def test_it_keeps_exactly_the_units_of_the_closed_form():
    """Orthogonal design: with X'X = n I the minimum of |Y - X W'|^2 / (2 n) + strength sum |w_k| is the least squares' rows,
    each shortened by `strength`, and gone where it is shorter."""
    n, inputs, units, strength = 64, 6, 12, 0.7
    x = torch.linalg.qr(torch.randn(n, inputs, generator=generator(), dtype=torch.float64)).Q * n**0.5
    scale = torch.linspace(0.1, 1.0, units, dtype=torch.float64)[:, None]
    truth = scale * torch.randn(units, inputs, generator=generator(1), dtype=torch.float64)
    y = x @ truth.T + 0.1 * torch.randn(n, units, generator=generator(2), dtype=torch.float64)
    least_squares = y.T @ x / n
    norms = least_squares.norm(dim=1)
    assert (norms < strength).sum() >= 3 and (norms > strength).sum() >= 3

    network = nn.Sequential(
        nn.Linear(inputs, units, bias=False), nn.Identity(), nn.Linear(units, units, bias=False)
    ).double()
    with torch.no_grad():
        network[2].weight.copy_(torch.eye(units))
    network[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([network[0].weight], lr=0.5)
    lasso = GroupLasso(network, strength)
    handle = lasso.follow(optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        (functional.mse_loss(network(x), y, reduction="sum") / (2 * n)).backward()
        optimizer.step()
    expected = least_squares * (1 - strength / norms).clamp_min(0)[:, None]
    torch.testing.assert_close(network[0].weight.detach(), expected, rtol=1e-9, atol=1e-12)
    pruned = prune(network)
    kept = norms > strength
    assert pruned[0].out_features == int(kept.sum())
    torch.testing.assert_close(pruned[0].weight.detach(), expected[kept], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pruned(x), network(x))

    handle.remove()
    before = network[0].weight.clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(network[0].weight, before)


def test_with_adam_the_zeros_are_exact_too_and_the_rate_is_that_of_the_step():
    network = mlp()
    optimizer = torch.optim.Adam(network.parameters(), 0.1)
    GroupLasso(network, 50.0).follow(optimizer)
    network(torch.randn(4, 6, generator=generator())).sum().backward()
    optimizer.step()
    assert not network[0].weight.any() and not network[2].bias.any() and network[5].weight.all()
    network = mlp()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    GroupLasso(network, 50.0).follow(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    before = network[0].weight.clone()
    optimizer.step()
    assert torch.equal(network[0].weight, before)


# ---- pruning ----


@pytest.mark.parametrize("make", [mlp, cnn])
def test_a_pruned_network_is_the_same_function(make):
    network = make().double()
    layers = [layer for layer in network if isinstance(layer, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        for number, layer in enumerate(layers[:-1]):
            for unit in range(number, len(layer.weight), 2):
                layer.weight[unit] = 0
                if layer.bias is not None:
                    layer.bias[unit] = 0
    pruned = prune(network)
    x = torch.randn(7, *((6,) if make is mlp else (2, 8, 8)), generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(pruned(x), network(x))
    for before, after in zip(
        layers, [layer for layer in pruned if isinstance(layer, nn.Linear | nn.Conv2d)], strict=True
    ):
        alive = int((norms_of(before) > 0).sum())
        assert (
            len(after.weight)
            == alive
            == getattr(after, "out_features" if isinstance(after, nn.Linear) else "out_channels")
        )
    assert len(layers[0].weight) == len(make()[0].weight), "the network itself is as it was"
    pruned(x).sum().backward()
    assert pruned[0].weight.grad.shape == pruned[0].weight.shape


def test_units_fed_by_nothing_but_units_that_are_gone_go_too():
    network = mlp()
    with torch.no_grad():
        network[0].weight[0], network[0].bias[0] = 0, 0
        network[2].weight[3], network[2].bias[3] = 0, 0
        network[2].weight[3, 0] = 5.0
    pruned = prune(network)
    assert (pruned[0].out_features, pruned[2].in_features, pruned[2].out_features) == (8, 8, 7)
    x = torch.randn(5, 6, generator=generator())
    torch.testing.assert_close(pruned(x), network(x))


def test_the_threshold_is_the_norm_that_a_unit_must_have():
    network = seeded(lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), 0)
    threshold = norms_of(network[0]).sort().values[3].item()
    assert prune(network, threshold)[0].out_features == 6
    assert prune(network, threshold * 1.0001)[0].out_features == 5


# ---- what is refused ----


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="no unit of hidden layer 0 is left; must be below"):
        prune(mlp(), 1e3)
    with pytest.raises(ValueError, match="threshold = 0"):
        prune(mlp(), 0.0)
    with pytest.raises(ValueError, match="strength = -1"):
        GroupLasso(mlp(), -1.0)
    with pytest.raises(ValueError, match="has 1 layers"):
        GroupLasso(nn.Sequential(nn.Linear(2, 2)), 1.0)
    for module in (nn.Sigmoid(), nn.BatchNorm1d(3), nn.Softmax(1), nn.Conv2d(4, 4, 1, groups=2)):
        with pytest.raises(TypeError, match=r"network\[1\] is "):
            prune(nn.Sequential(nn.Linear(3, 3), module, nn.Linear(3, 3)))
    network = mlp()
    with pytest.raises(ValueError, match="optimizer lacks weight, bias of Linear"):
        GroupLasso(network, 1.0).follow(torch.optim.SGD(network[4:].parameters(), 0.1))
