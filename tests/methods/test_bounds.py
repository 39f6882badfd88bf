"""Interval bounds: they contain what the network gives, in exact arithmetic, and are exact where they can be."""

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from bkd_fast.errors import MissingLibraryError
from bkd_fast.methods.bounds import LAYERS, Box, ball, check_fixed, logit_bounds, softmax_bounds

POINTS = 10_000


def _networks() -> dict[str, tuple[nn.Sequential, tuple[int, ...]]]:
    """Random networks with every supported layer, in float64, and the shape of one input."""
    torch.manual_seed(0)
    networks = {
        "mlp": (
            nn.Sequential(
                nn.Flatten(), nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.5),
                nn.Sequential(nn.Linear(9, 7, bias=False), nn.Sigmoid(), nn.Identity()),
                nn.Linear(7, 8), nn.LeakyReLU(0.2, inplace=True), nn.Linear(8, 4),
            ),
            (2, 3),
        ),
        "cnn": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1),
                nn.Conv2d(4, 6, 3, groups=2, padding=2, dilation=2, padding_mode="circular"), nn.Dropout2d(0.3), nn.ReLU(),
                nn.AvgPool2d(2, padding=1), nn.Conv2d(6, 5, 2, bias=False), nn.BatchNorm2d(5, affine=False),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3),
            ),
            (2, 9, 9),
        ),
    }  # fmt: skip
    for network, _ in networks.values():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.2, 2)
                if module.affine:
                    nn.init.normal_(module.weight)  # of both signs
                    nn.init.normal_(module.bias)
        network.double().eval()
    return networks


NETWORKS = _networks()


def test_the_random_networks_have_every_supported_layer():
    modules = {type(m) for network, _ in NETWORKS.values() for m in network.modules()}
    assert modules - {nn.Sequential} == set(LAYERS)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("eps", [0.003, 0.05, 0.4])
def test_bounds_contain_the_outputs_at_random_points_and_corners(name, eps):
    network, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    box = ball(x, eps)
    logits = logit_bounds(network, box)
    probs = softmax_bounds(logits)
    part = torch.rand(POINTS, *shape, generator=generator, dtype=torch.float64)
    part[: POINTS // 2].round_()
    points = torch.lerp(box.lower, box.upper, part)
    with torch.no_grad():
        found = network(points)
    for value, bounds in ((found, logits), (found.softmax(1), probs)):
        assert bool((bounds.lower <= value).all()) and bool((value <= bounds.upper).all())
    assert bool((probs.lower >= 0).all()) and bool((probs.upper <= 1).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_shrink_to_the_output_with_the_ball(name):
    network, shape = NETWORKS[name]
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        found = network(x)
    for eps, width in ((0.0, 1e-12), (1e-9, 1e-6), (1e-6, 1e-3)):
        bounds = logit_bounds(network, ball(x, eps))
        assert bool((bounds.lower <= found).all()) and bool((found <= bounds.upper).all())
        assert float((bounds.upper - bounds.lower).max()) < width


def test_one_linear_layer_is_exact():
    torch.manual_seed(3)
    layer = nn.Linear(8, 5).double()
    x = torch.rand(1, 8, dtype=torch.float64)
    box = ball(x, 0.3)
    corners = torch.tensor(list(itertools.product((0, 1), repeat=8)), dtype=torch.float64)
    with torch.no_grad():
        found = layer(torch.lerp(box.lower, box.upper, corners))
    bounds = logit_bounds(layer, box)
    torch.testing.assert_close(bounds.lower[0], found.amin(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(bounds.upper[0], found.amax(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("eps", [0.0, 2.0**-20])
def test_bounds_hold_in_exact_arithmetic_where_sums_cancel(eps):
    """Fractions against terms up to 2^40 that cancel: what a sum rounds is far above the value, and covered."""
    generator = torch.Generator().manual_seed(4)
    scale = 2.0 ** torch.randint(-20, 40, (50, 64), generator=generator)
    half = torch.randn(50, 64, generator=generator, dtype=torch.float64) * scale
    layer = nn.Linear(128, 50).double()
    with torch.no_grad():
        layer.weight.copy_(torch.cat([half, -half], 1))
    x = torch.rand(1, 64, generator=generator, dtype=torch.float64).repeat(1, 2)
    box = ball(x, eps)
    bounds = logit_bounds(layer, box)
    naive_fails = 0
    lows, highs = ([Fraction(v) for v in end[0].tolist()] for end in box)
    for row, (weights, bias) in enumerate(zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)):
        exact = [Fraction(w) for w in weights]
        least = Fraction(bias) + sum(
            w * (low if w > 0 else high) for w, low, high in zip(exact, lows, highs, strict=True)
        )
        most = Fraction(bias) + sum(
            w * (high if w > 0 else low) for w, low, high in zip(exact, lows, highs, strict=True)
        )
        assert Fraction(bounds.lower[0, row].item()) <= least <= most <= Fraction(bounds.upper[0, row].item())
        naive_fails += Fraction(layer(box.lower)[0, row].item()) != least
    assert naive_fails > 25  # rounding to nearest would not do


def test_softmax_bounds_are_attained_at_corners_and_hold_inside():
    generator = torch.Generator().manual_seed(5)
    lower = torch.randn(1, 6, generator=generator, dtype=torch.float64) * 3
    upper = lower + 2 * torch.rand(1, 6, generator=generator, dtype=torch.float64)
    bounds = softmax_bounds(Box(lower, upper))
    corners = torch.tensor(list(itertools.product((0, 1), repeat=6)), dtype=torch.float64)
    found = torch.lerp(lower, upper, corners).softmax(1)
    torch.testing.assert_close(bounds.lower[0], found.amin(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(bounds.upper[0], found.amax(0), rtol=0, atol=1e-13)
    inside = torch.lerp(lower, upper, torch.rand(POINTS, 6, generator=generator, dtype=torch.float64)).softmax(1)
    assert bool((bounds.lower <= inside).all()) and bool((inside <= bounds.upper).all())


def test_softmax_bounds_are_finite_where_exponentials_are_not():
    z = torch.tensor([[2000.0, -3000.0, 1999.0]], dtype=torch.float64)
    bounds = softmax_bounds(Box(z - 1, z + 1))
    expected = torch.tensor([[1 / (1 + math.exp(1)), 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(bounds.lower[:, :2], expected[:, :2], rtol=0, atol=1e-10)
    assert bool((bounds.upper[0] <= 1).all()) and float(bounds.upper[0, 1]) < 1e-10


def test_float32_networks_are_bounded_as_the_float64_ones_that_they_equal():
    network, shape = NETWORKS["cnn"]
    single = copy.deepcopy(network).float()
    x = torch.rand(3, *shape)
    bounds = logit_bounds(single, ball(x, 0.01))
    double = logit_bounds(copy.deepcopy(single).double(), ball(x, 0.01))
    assert bounds.lower.dtype == torch.float64
    torch.testing.assert_close(bounds, double, rtol=0, atol=1e-12)


def test_the_ball_is_cut_to_the_range_of_the_data():
    x = torch.tensor([[0.0, 0.5, 1.0]])
    box = ball(x, 0.2)
    torch.testing.assert_close(box.lower, torch.tensor([[0.0, 0.3, 0.8]]))
    torch.testing.assert_close(box.upper, torch.tensor([[0.2, 0.7, 1.0]]))
    mean = torch.tensor([0.1, 0.2, 0.3])
    centred = ball(x - mean, 0.2, -mean, 1 - mean)
    torch.testing.assert_close(centred.lower + mean, box.lower)
    torch.testing.assert_close(centred.upper + mean, box.upper)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps = -0.1"),
        ({"eps": math.inf}, ValueError, "eps = inf"),
        ({"eps": 0.1, "upper": 0.7}, ValueError, r"x\[0, 2\] = 0.75: must be in the data's range \[0, 0.7\]"),
        ({"eps": 0.1, "lower": torch.zeros(4)}, ValueError, r"lower has shape \(4,\): must broadcast to \(1, 3\)"),
        ({"x": torch.tensor([[0.1, math.nan, 0.2]]), "eps": 0.1}, ValueError, r"x\[0, 1\] = nan"),
        ({"x": torch.ones(1, 3, dtype=torch.long), "eps": 0.1}, TypeError, "x has dtype torch.int64"),
    ],
)
def test_balls_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ball(**{"x": torch.tensor([[0.25, 0.5, 0.75]]), **arguments})


class Doubled(nn.Linear):
    """A linear layer by inheritance only."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(4, 4), nn.GELU()], "layer 1 is a GELU: must be one of Linear, Conv2d"),
        ([nn.Sequential(nn.Linear(4, 4), Doubled(4, 4))], "layer 0.1 is a Doubled"),
        ([nn.Linear(4, 4), nn.LeakyReLU(-0.1)], "negative_slope = -0.1"),
        ([nn.Unflatten(1, (1, 2, 2)), nn.Flatten()], "layer 0 is a Unflatten"),
    ],
)
def test_layers_that_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        logit_bounds(nn.Sequential(*layers).eval(), ball(torch.rand(2, 4), 0.1))


def test_pools_that_are_no_averages_or_maxima_are_refused():
    box = ball(torch.rand(1, 1, 4, 4), 0.1)
    with pytest.raises(ValueError, match="divisor_override"):
        logit_bounds(nn.AvgPool2d(2, divisor_override=-1), box)
    with pytest.raises(ValueError, match="return_indices"):
        logit_bounds(nn.MaxPool2d(2, return_indices=True), box)


def test_boxes_and_methods_that_are_refused():
    box = ball(torch.rand(2, 4), 0.1)
    with pytest.raises(ValueError, match="lower must be at most upper"):
        logit_bounds(nn.Linear(4, 2), Box(box.upper, box.lower))
    with pytest.raises(ValueError, match="method = 'exact'"):
        logit_bounds(nn.Linear(4, 2), box, method="exact")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Dropout(0.5), "teacher: layer 0 .Dropout. is in training mode"),
        (nn.BatchNorm1d(4), "layer 0 .BatchNorm1d. is in training mode"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "has no running statistics"),
    ],
)
def test_networks_that_are_not_fixed_are_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        check_fixed(nn.Sequential(layer), "teacher")
    with pytest.raises(ValueError, match="layer 0"):
        logit_bounds(nn.Sequential(layer), ball(torch.rand(2, 4), 0.1))
    check_fixed(nn.Sequential(nn.Dropout(0.0)))


def test_crown_is_tighter_and_contains_the_outputs():
    pytest.importorskip("auto_LiRPA", reason="auto_LiRPA is not installed")
    torch.manual_seed(6)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 12), nn.ReLU(), nn.Linear(12, 3)
    ).eval()  # fmt: skip
    x = torch.rand(1, 1, 6, 6)
    box = ball(x, 0.05)
    ours, crown = logit_bounds(network, box), logit_bounds(network, box, "crown")
    assert float((crown.upper - crown.lower).mean()) < float((ours.upper - ours.lower).mean())
    with torch.no_grad():
        found = network(torch.lerp(box.lower, box.upper, torch.rand(POINTS, 1, 6, 6)))
    assert bool((crown.lower - 1e-5 <= found).all()) and bool((found <= crown.upper + 1e-5).all())


def test_crown_without_its_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "auto_LiRPA", None)
    with pytest.raises(MissingLibraryError, match="auto_LiRPA is not installed: pip install"):
        logit_bounds(nn.Linear(4, 2), ball(torch.rand(2, 4), 0.1), "crown")
