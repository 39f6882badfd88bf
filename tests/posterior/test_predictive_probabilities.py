"""Exceedance probabilities and shortest intervals against the draws themselves."""

import numpy as np
import pytest
import torch
from predictive_data import exact, stream
from torch import Tensor

from bkd_fast.posterior.predictive import PosteriorPredictive


def filled(logits: Tensor) -> PosteriorPredictive:
    posterior = PosteriorPredictive(*logits.shape[1:])
    posterior.update_logits(logits)
    return posterior


@pytest.mark.parametrize("draws", [1, 40, 64, 500])
@pytest.mark.parametrize("kind", ["iid", "sorted", "bimodal", "constant", "outliers", "masked", "huge"])
def test_exceedance_lies_within_its_bounds_and_they_hold_the_truth(kind: str, draws: int) -> None:
    logits = stream(kind, draws, 8, 6, seed=draws)
    posterior = filled(logits)
    p, _ = exact(logits)
    thresholds: list[float | Tensor] = [
        0.0,
        1e-6,
        0.03,
        0.5,
        0.97,
        1.0,
        torch.rand(8, 1),
        torch.rand(6),
        torch.rand(8, 6),
    ]
    for threshold in thresholds:
        truth = (p > np.asarray(threshold)).mean(0)
        lower, upper = (bound.numpy() for bound in posterior.exceedance_bounds(threshold))
        about = posterior.exceedance(threshold).numpy()
        assert (lower <= truth + 1e-6).all() and (truth <= upper + 1e-6).all()
        assert (lower <= about).all() and (about <= upper).all()
    if kind in ("iid", "bimodal") and draws == 500:
        error = np.abs(posterior.exceedance(0.1).numpy() - (p > 0.1).mean(0))
        assert error.mean() < 0.003 and error.max() < 0.05


@pytest.mark.parametrize("offset", [-0.45, -0.2, 0.2, 0.45])
def test_bounds_of_exceedance_allow_for_the_rounding_of_codes(offset: float) -> None:
    """All draws within one code of the threshold, on either side of it."""
    logit = (7 + offset) / 1024
    posterior = PosteriorPredictive(1, 2)
    posterior.update_logits(torch.tensor([[[logit, 0.0]]]).repeat(100, 1, 1))
    for shift in (-0.1, 0.1):
        threshold = 1 / (1 + np.exp(-(7 + offset + shift) / 1024))
        lower, upper = (float(bound[0, 0]) for bound in posterior.exceedance_bounds(threshold))
        assert lower <= (shift < 0) <= upper


def test_shortest_intervals_hold_their_share_and_are_short() -> None:
    logits = stream("iid", 2000, 12, 6, seed=4)
    posterior = filled(logits)
    p, _ = exact(logits)
    for level in (0.5, 0.8, 0.95):
        lower, upper = (end.numpy() for end in posterior.highest_density_interval(level))
        inside = ((p >= lower) & (p <= upper)).mean(0)
        assert np.abs(inside - level).max() < 0.03 and np.abs(inside - level).mean() < 0.006
        held = int(np.ceil(level * len(p)))
        ascending = np.sort(p, 0)
        shortest = (ascending[held - 1 :] - ascending[: len(p) - held + 1]).min(0)
        assert np.abs((upper - lower) / shortest - 1).mean() < 0.03
        equal_tailed = np.subtract(*(end.numpy() for end in reversed(posterior.interval(level))))
        assert ((upper - lower) <= equal_tailed * 1.001 + 1e-7).all()


def test_shortest_intervals_of_constant_masked_and_empty_cells() -> None:
    logits = torch.tensor([[1.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]).repeat(100, 1, 1)
    posterior = PosteriorPredictive(3, 3)
    posterior.update_logits(logits, torch.tensor([0, 2]))
    lower, upper = posterior.highest_density_interval(0.9)
    p = logits[0].double().softmax(1)
    for row, expected in ((0, p[0]), (2, p[1])):
        assert (lower[row] <= expected + 1e-6).all() and (expected <= upper[row] + 1e-6).all()
        assert ((upper - lower)[row] < 1e-3).all()
    assert lower[0, 2] == 0 and lower[1].isnan().all() and upper[1].isnan().all()
    assert posterior.exceedance(0.5)[1].isnan().all()


def test_bad_arguments() -> None:
    posterior = filled(torch.randn(5, 3, 4))
    for threshold in (-0.1, 1.1, float("nan"), torch.tensor([0.1, 0.2, 0.3, 2.0])):
        with pytest.raises(ValueError, match=r"threshold = .*: must be in \[0, 1\]"):
            posterior.exceedance(threshold)
    with pytest.raises(ValueError, match=r"threshold has shape \(3,\): must broadcast to \(3, 4\)"):
        posterior.exceedance_bounds(torch.zeros(3))
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="level = "):
            posterior.highest_density_interval(level)
