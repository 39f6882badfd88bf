"""Simulation-based calibration (Talts et al., 2018): the true parameters' ranks among the draws of the posterior are uniform.

5,000 times over: parameters from the prior, data from the model, and the posterior of conjugate Bayesian linear regression
sampled through the public API. All run at once, 20 replications to a chain, each with data of its own.
"""

import math

import pytest
import torch
from scipy.stats import chi2

import bkd_fast as bkd

CHAINS, IN_A_CHAIN = 250, 20
REPLICATIONS = CHAINS * IN_A_CHAIN
DRAWS = 15  # ranks fall into 16 cells
ROWS, NOISE, PRECISION = 12, 0.8, 2.0  # data of a replication, their standard deviation; the prior's precision
FALSE_ALARMS = 1e-4  # of one run, over its four quantities
BOUND = chi2.isf(FALSE_ALARMS / 4, DRAWS)


def _design():
    """Two inputs of correlation 1/2 and a constant, of unit mean square: the mean loss has curvatures .5, 1 and 1.5 / NOISE^2."""
    columns, _ = torch.linalg.qr(torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0)))
    correlate = torch.tensor([[1, 0.5, 0], [0, math.sqrt(0.75), 0], [0, 0, 1]])
    return math.sqrt(ROWS) * columns @ correlate


def _predict(slopes, intercept, design):
    return slopes @ design[:, :2].T + intercept[..., None] * design[:, 2]


def _chi_squares(sampler_class, lr, thin, **settings):
    """{quantity: chi-square of the ranks of its true values, 15 degrees of freedom}; a draw every `thin` steps."""
    generator, design = torch.Generator().manual_seed(1), _design()
    true = [torch.randn(CHAINS, IN_A_CHAIN, *shape, generator=generator) / math.sqrt(PRECISION) for shape in ((2,), ())]
    y = _predict(*true, design) + NOISE * torch.randn(CHAINS, IN_A_CHAIN, ROWS, generator=generator)

    def losses(slopes, intercept):
        return ((y - _predict(slopes, intercept, design)) ** 2).mean(-1) / (2 * NOISE**2)

    def quantities(slopes, intercept):
        prediction = slopes[..., 0] - 2 * slopes[..., 1] + 0.5 * intercept
        return {
            "slope": slopes[..., 0],
            "intercept": intercept,
            "prediction": prediction,
            "energy": losses(slopes, intercept),
        }

    parameters = [torch.zeros_like(value).requires_grad_() for value in true]
    settings = {"prior_precision": PRECISION, "num_data": ROWS, "chains": CHAINS, "seed": 2, **settings}
    sampler = sampler_class(parameters, lr, **settings)
    ranks = {name: torch.zeros(CHAINS, IN_A_CHAIN, dtype=torch.int64) for name in quantities(*true)}
    for _ in range(DRAWS):
        for _ in range(thin):
            sampler.zero_grad()
            losses(*parameters).sum().backward()  # of all replications: each has its own mean loss
            sampler.step()
        with torch.no_grad():
            below = quantities(*parameters)
            for name, value in quantities(*true).items():
                ranks[name] += below[name] < value
    expected = REPLICATIONS / (DRAWS + 1)
    cells = {name: torch.bincount(rank.flatten(), minlength=DRAWS + 1) for name, rank in ranks.items()}
    return {name: float((count - expected).square().sum() / expected) for name, count in cells.items()}


BAOAB = (bkd.BAOAB, 0.5, 20, {"friction": 3.0})


@pytest.mark.parametrize(
    ("sampler_class", "lr", "thin", "settings"),
    [(bkd.SGLD, 0.025, 170, {}), (bkd.SGHMC, 0.02, 100, {"momentum": 0.9}), BAOAB],
    ids=["SGLD", "SGHMC", "BAOAB"],
)
def test_ranks_of_the_truth_are_uniform(sampler_class, lr, thin, settings):
    """A draw forgets the one before to exp(-4) or less.

    A standard deviation wrong by the share d adds 2 d^2 REPLICATIONS to a chi-square of mean 15 and bound 48. What a finite
    step makes of it, at most lr l / 4 for SGLD and half of that for SGHMC at the largest curvature l = 2.5, adds less than
    2.5 and 0.5; BAOAB's is exact.
    """
    found = _chi_squares(sampler_class, lr, thin, **settings)
    assert max(found.values()) < BOUND, f"{sampler_class.__name__}: chi-squares {found}, bound {BOUND:.1f}"


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 1.3}, {"temperature": 1.1**2}, {"temperature": 0.9**2}, {"prior_precision": 3 * PRECISION}],
    ids=["temperature 1.3", "10 % more noise", "10 % less noise", "three times the prior"],
)
def test_a_wrong_posterior_is_seen(wrong):
    sampler_class, lr, thin, settings = BAOAB
    found = _chi_squares(sampler_class, lr, thin, **{**settings, **wrong})
    assert max(found.values()) > BOUND, f"chi-squares {found}, bound {BOUND:.1f}"
