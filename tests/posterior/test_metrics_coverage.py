"""Coverage against loops, and against posteriors that are exact by conjugacy."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta

from bkd_fast.posterior.metrics import (
    averaged_deviance_coverage,
    deviance_coverage,
    interval_coverage,
)


def random_predictions(rows=400, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    return logits.softmax(dim=1), labels


def test_deviance_coverage_equals_a_loop_over_rows():
    probs, labels = random_predictions(seed=2)
    upper = torch.rand(len(labels), generator=torch.Generator().manual_seed(3)) * 6
    inside = [
        -2 * math.log(row[label]) <= bound
        for row, label, bound in zip(probs.double().tolist(), labels.tolist(), upper.tolist(), strict=True)
    ]
    assert 0 < sum(inside) < len(inside)
    assert deviance_coverage(probs, labels, upper) == pytest.approx(sum(inside) / len(inside))


def test_a_label_of_probability_zero_is_covered_by_an_infinite_bound_only():
    probs, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    assert deviance_coverage(probs, labels, torch.tensor([1e30])) == 0
    assert deviance_coverage(probs, labels, torch.tensor([math.inf])) == 1


def test_averaged_coverage_is_the_level_when_labels_follow_the_draws():
    draws, rows, classes, level = 400, 3000, 3, 0.8
    generator = torch.Generator().manual_seed(4)
    centre = torch.randn(rows, 1, classes, dtype=torch.float64, generator=generator)
    q = (centre + 0.5 * torch.randn(rows, draws, classes, dtype=torch.float64, generator=generator)).softmax(dim=2)
    labels = torch.multinomial(q[:, 0], 1, generator=generator)[:, 0]
    deviance, order = (-2 * q.flatten(1).log()).sort(dim=1)
    reached = q.flatten(1).gather(1, order).cumsum(1) >= level * draws
    upper = deviance.gather(1, reached.int().argmax(1, keepdim=True))[:, 0]
    own = q.gather(2, labels[:, None, None].expand(-1, draws, 1))[:, :, 0]
    quantiles = own.quantile((torch.arange(100, dtype=torch.float64) + 0.5) / 100, dim=1)
    found = averaged_deviance_coverage(quantiles, upper)
    inside = -2 * own.log() <= upper[:, None]
    assert found == pytest.approx(float(((own * inside).sum(1) / own.sum(1)).mean()), abs=0.01)
    assert found == pytest.approx(level, abs=5 * (level * (1 - level) / rows) ** 0.5 + 0.01)


def test_averaged_coverage_of_an_impossible_label():
    impossible = torch.zeros(10, 1)
    assert averaged_deviance_coverage(impossible, torch.tensor([5.0])) == 0
    assert averaged_deviance_coverage(impossible, torch.tensor([math.inf])) == 1


def dirichlet_posteriors(rows, classes, seed):
    """Concentrations (rows, classes), and one draw of each posterior as the truth: what exact intervals must cover."""
    random = np.random.default_rng(seed)
    concentration = 0.2 + 6 * random.random((rows, classes)) ** 3
    truth = random.standard_gamma(concentration)
    return torch.from_numpy(concentration), torch.from_numpy(truth / truth.sum(axis=1, keepdims=True))


def beta_quantile(concentration, q):
    """The marginal quantiles of Dirichlet distributions."""
    rest = concentration.sum(dim=1, keepdim=True) - concentration
    return torch.from_numpy(beta.ppf(q, concentration.numpy(), rest.numpy()))


def test_interval_coverage_equals_a_loop_over_cells():
    generator = torch.Generator().manual_seed(5)
    ends = torch.rand(2, 60, 4, generator=generator).sort(dim=0).values
    truth = torch.randn(60, 4, generator=generator).softmax(dim=1)
    top = torch.randint(4, (60,), generator=generator)
    covered, length, score = torch.zeros(60, 4), 0.0, 0.0
    for i in range(60):
        for c in range(4):
            lower, upper, p = (float(t[i, c]) for t in (*ends, truth))
            covered[i, c] = lower <= p <= upper
            length += upper - lower
            score += upper - lower
            if p < lower:
                score += 2 / 0.2 * (lower - p)
            if p > upper:
                score += 2 / 0.2 * (p - upper)
    found = interval_coverage(*ends, truth, 0.8, top)
    assert found.level == 0.8
    assert 0 < found.coverage.cells < 1
    assert found.coverage.cells == pytest.approx(float(covered.mean()))
    assert found.coverage.per_class.tolist() == pytest.approx(covered.mean(dim=0).tolist())
    assert found.coverage.top == pytest.approx(sum(float(covered[i, top[i]]) for i in range(60)) / 60)
    assert found.length == pytest.approx(length / 240)
    assert found.score == pytest.approx(score / 240)


def test_ends_belong_to_the_interval():
    truth = torch.tensor([[0.25, 0.75]])
    found = interval_coverage(truth, truth, truth, 0.9, torch.tensor([0]))
    assert (found.coverage.cells, found.length, found.score) == (1, 0, 0)


def test_exact_posteriors_are_covered_at_their_level_and_score_best():
    level, rows = 0.9, 5000
    concentration, truth = dirichlet_posteriors(rows, 4, seed=6)
    top = concentration.argmax(dim=1)

    def at(width):
        ends = [beta_quantile(concentration, (1 + sign * width) / 2) for sign in (-1, 1)]
        return interval_coverage(*ends, truth, level, top)

    exact = at(level)
    # a mean over rows of values in [0, 1] whose mean is the level: five standard errors, alarms at most once in 1e6
    error = 5 * math.sqrt(level * (1 - level) / rows)
    assert exact.coverage.cells == pytest.approx(level, abs=error)
    assert exact.coverage.top == pytest.approx(level, abs=error)
    assert exact.coverage.per_class.tolist() == pytest.approx([level] * 4, abs=error)
    assert exact.score < min(at(0.7).score, at(0.99).score)
    # why the class must be the prediction's
    ends = beta_quantile(concentration, 0.05), beta_quantile(concentration, 0.95)
    assert interval_coverage(*ends, truth, level, truth.argmax(dim=1)).coverage.top < level - error


def test_bad_intervals_are_named():
    truth = torch.tensor([[0.5, 0.5]] * 8)
    lower, upper, top = truth - 0.1, truth + 0.1, torch.zeros(8, dtype=torch.long)

    def changed(tensor, row, column, value):
        tensor = tensor.clone()
        tensor[row, column] = value
        return tensor

    cases = [
        ((lower[:1], upper, truth, 0.9, top), r"lower has shape \(1, 2\)"),
        ((lower, upper[:, :1], truth, 0.9, top), r"upper \(8, 1\)"),
        ((lower[:0], upper[:0], truth[:0], 0.9, top[:0]), "N >= 1"),
        ((lower, upper, 2 * truth, 0.9, top), "row 0.*sum to 2"),
        ((changed(lower, 3, 1, math.nan), upper, truth, 0.9, top), "of rows 3 are NaN"),
        ((changed(lower, 3, 1, math.nan), changed(upper, 5, 0, math.nan), truth, 0.9, top), "of rows 3, 5 are NaN"),
        ((math.nan * lower, upper, truth, 0.9, top), "of rows 0, 1, 2, 3, 4 and 3 more are NaN"),
        ((changed(lower, 2, 1, 0.7), upper, truth, 0.9, top), "row 2, class 1: lower = 0.7 > upper = 0.6"),
        ((lower, upper, truth, 1.0, top), "level = 1.0"),
        ((lower, upper, truth, math.nan, top), "level = nan"),
        ((lower, upper, truth, 0.9, top[:3]), r"top has shape \(3,\)"),
        ((lower, upper, truth, 0.9, top + 2), r"top of torch.int64 in \[2, 2\]: must be integers in \[0, 2\)"),
        ((lower, upper, truth, 0.9, top.float()), "top of torch.float32"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            interval_coverage(*arguments)


def test_bad_deviance_bounds_are_named():
    probs, labels = random_predictions(rows=3)
    with pytest.raises(ValueError, match="upper has shape"):
        deviance_coverage(probs, labels, torch.zeros(2))
    with pytest.raises(ValueError, match="of rows 1 are NaN"):
        deviance_coverage(probs, labels, torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match=r"\(Q, N\)"):
        averaged_deviance_coverage(torch.ones(4, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="of rows 0, 2 are NaN"):
        averaged_deviance_coverage(
            torch.tensor([[0.5, 0.5, math.nan], [0.5, 0.5, 0.5]]), torch.tensor([math.nan, 1.0, 1.0])
        )
