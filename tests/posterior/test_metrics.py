"""Metrics against closed forms and against loops that a reader can check line by line."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_fast.posterior.metrics import (
    averaged_deviance_coverage,
    deviance_coverage,
    reliability_bins,
    risk_coverage,
)


def random_predictions(rows=400, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    return logits.softmax(dim=1), labels


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_a_loop_over_rows(bins):
    probs, labels = random_predictions()
    gaps = 0.0
    for b in range(bins):
        inside = []
        for row, label in zip(probs.double().tolist(), labels.tolist(), strict=True):
            top = max(row)
            if b / bins < top <= (b + 1) / bins:
                inside.append((top, row.index(top) == label))
        gaps += abs(sum(right - top for top, right in inside))
    assert reliability_bins(probs, labels, bins).expected_calibration_error == pytest.approx(gaps / len(labels))


def test_every_row_is_in_one_bin_and_confidence_one_in_the_last():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.9, 0.1]])
    bins = reliability_bins(probs, torch.tensor([0, 0, 0, 0]), bins=10)
    assert bins.count.sum() == 4
    assert bins.count[9] == 2  # both certain rows
    assert bins.confidence[9] == 1
    assert bins.accuracy[9] == 0.5
    assert bins.accuracy[:4].isnan().all()


def test_certain_and_right_has_no_calibration_error_certain_and_wrong_has_all_of_it():
    certain = torch.eye(3, dtype=torch.float64)
    right = torch.arange(3)
    assert reliability_bins(certain, right).expected_calibration_error == 0
    assert reliability_bins(certain, (right + 1) % 3).expected_calibration_error == 1


def test_a_calibrated_forecaster_has_a_small_calibration_error():
    generator = torch.Generator().manual_seed(1)
    probs = (2 * torch.randn(200_000, 4, generator=generator)).softmax(dim=1)
    labels = torch.multinomial(probs, 1, generator=generator)[:, 0]
    # a bin of n rows misses by about 1 / (2 sqrt n): 15 bins of at least 1e4 rows, at five sigma
    assert reliability_bins(probs, labels).expected_calibration_error < 0.025
    too_bold = probs.square() / probs.square().sum(dim=1, keepdim=True)
    assert reliability_bins(too_bold, labels).expected_calibration_error > 0.05


def test_risk_coverage_of_distinct_scores():
    curve = risk_coverage(torch.tensor([0.3, 0.1, 0.2, 0.4]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert curve.area == pytest.approx((1 / 3 + 1 / 2) / 4)


def test_perfect_ranking_has_the_known_area():
    errors = torch.zeros(1000)
    errors[-100:] = 1
    best = risk_coverage(torch.arange(1000.0), errors).area
    # Geifman, Uziel and El-Yaniv, equation 5: r + (1 - r) log(1 - r)
    assert best == pytest.approx(0.1 + 0.9 * math.log(0.9), abs=1e-3)
    assert risk_coverage(torch.arange(1000.0).flip(0), errors).area > best


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6))
def test_tied_scores_count_by_their_expectation_over_orders(pairs):
    score = torch.tensor([float(s) for s, _ in pairs])
    error = torch.tensor([float(e) for _, e in pairs])
    curves = []
    for order in permutations(range(len(pairs))):
        ranked = sorted(order, key=lambda row: pairs[row][0])
        if [pairs[row][0] for row in order] == [pairs[row][0] for row in ranked]:
            curves.append(error[list(order)].double().cumsum(0))
    expected = torch.stack(curves).mean(0) / torch.arange(1, len(pairs) + 1)
    torch.testing.assert_close(risk_coverage(score, error).risk, expected)


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


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (torch.ones(2, 3) / 3, torch.tensor([0]), "labels"),
        (torch.empty(0, 3), torch.empty(0, dtype=torch.long), "N >= 1"),
        (torch.tensor([[0.5, 0.2]]), torch.tensor([0]), "sum to 0.7"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), "row 0"),
        (torch.tensor([[0.5, 0.5], [math.nan, 0.5]]), torch.tensor([0, 0]), "row 1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), r"\[0, 2\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-1]), r"\[0, 2\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), "integers"),
    ],
)
def test_bad_predictions_are_named(probs, labels, message):
    with pytest.raises(ValueError, match=message):
        reliability_bins(probs, labels)
    with pytest.raises(ValueError, match=message):
        deviance_coverage(probs, labels, torch.zeros(len(labels)))


def test_other_bad_arguments_are_named():
    probs, labels = random_predictions(rows=3)
    with pytest.raises(ValueError, match="bins = 0"):
        reliability_bins(probs, labels, bins=0)
    with pytest.raises(ValueError, match="upper has shape"):
        deviance_coverage(probs, labels, torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(Q, N\)"):
        averaged_deviance_coverage(torch.ones(4, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="both must be"):
        risk_coverage(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        risk_coverage(torch.tensor([0.0, math.nan]), torch.zeros(2))
