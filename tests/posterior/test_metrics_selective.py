"""Rankings by uncertainty against every order of the rows, every pair of scores and every threshold."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_fast.posterior.metrics import ood_detection, rank_correlation, risk_coverage


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


def area(errors):
    """AURC of losses in the order of their scores, by its definition."""
    return sum(sum(errors[:kept]) / kept for kept in range(1, len(errors) + 1)) / len(errors)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=6), st.randoms())
def test_best_and_random_areas_are_those_of_all_orders(losses, random):
    areas = [area(order) for order in permutations(losses)]
    score = torch.tensor([random.random() for _ in losses])
    curve = risk_coverage(score, torch.tensor(losses))
    assert curve.best_area == pytest.approx(min(areas))
    assert curve.random_area == pytest.approx(sum(areas) / len(areas))
    assert curve.excess_area == pytest.approx(curve.area - min(areas))


def test_excess_area_is_zero_for_a_perfect_ranking_and_nothing_is_worse_than_its_reverse():
    errors = torch.zeros(50)
    errors[::7] = 1
    assert risk_coverage(errors, errors).excess_area == pytest.approx(0, abs=1e-12)
    ranking = errors + torch.linspace(0, 0.5, 50)
    assert risk_coverage(ranking, errors).excess_area == pytest.approx(0, abs=1e-12)
    constant = risk_coverage(torch.zeros(50), errors)
    assert constant.area == pytest.approx(constant.random_area)
    assert risk_coverage(-ranking, errors).area > constant.area


scores = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 3.0, math.inf]), min_size=1, max_size=45)


@settings(deadline=None)
@given(scores, scores)
def test_detection_equals_all_pairs_and_all_thresholds(known, unknown):
    pytest.importorskip("sklearn", reason="ood_detection needs scikit-learn")
    found = ood_detection(torch.tensor(known), torch.tensor(unknown))
    wins = sum((b > a) + (b == a) / 2 for a in known for b in unknown)
    assert found.auroc == pytest.approx(wins / len(known) / len(unknown))
    precision_gain, recall = 0.0, 0.0
    for threshold in sorted({*known, *unknown}, reverse=True):
        hits, alarms = sum(b >= threshold for b in unknown), sum(a >= threshold for a in known)
        precision_gain += (hits / len(unknown) - recall) * hits / (hits + alarms)
        recall = hits / len(unknown)
    assert found.aupr == pytest.approx(precision_gain)
    # the strictest threshold that accepts 19 in 20 of the known, and whatever ties with it
    threshold = min(t for t in known if 20 * sum(a <= t for a in known) >= 19 * len(known))
    assert found.fpr_at_95_tpr == pytest.approx(sum(b <= threshold for b in unknown) / len(unknown))


@pytest.mark.parametrize("size", [1, 19, 20, 21, 60, 1000])
def test_detection_equals_scikit_learn_with_in_distribution_as_the_positive_class_of_the_fpr(size):
    metrics = pytest.importorskip("sklearn.metrics", reason="ood_detection needs scikit-learn")
    generator = torch.Generator().manual_seed(size)
    known = torch.randn(size, generator=generator)
    unknown = 1.5 + torch.randn(700, generator=generator)
    found = ood_detection(known, unknown)
    is_known = torch.cat([torch.ones(size), torch.zeros(700)])
    both = torch.cat([known, unknown])
    fpr, tpr, _ = metrics.roc_curve(is_known, -both, drop_intermediate=False)
    assert found.fpr_at_95_tpr == pytest.approx(fpr[tpr >= 0.95 - 1e-12][0])
    assert found.auroc == pytest.approx(metrics.roc_auc_score(1 - is_known, both))
    assert found.aupr == pytest.approx(metrics.average_precision_score(1 - is_known, both))


def test_detection_is_not_symmetric_where_its_names_say_so():
    pytest.importorskip("sklearn", reason="ood_detection needs scikit-learn")
    known, unknown = torch.arange(20.0), torch.tensor([17.5, 18.0, 18.5, 30.0])
    # 18 accepts 19 of 20, and with them 17.5 and its tie
    assert ood_detection(known, unknown).fpr_at_95_tpr == 0.5
    # with the signs and the sides exchanged it is the other convention: 17.5 finds all unknown, 18 and 19 are false alarms
    assert ood_detection(-unknown, -known).fpr_at_95_tpr == 0.1
    assert ood_detection(torch.zeros(3), torch.zeros(1)).aupr == 0.25


def mean_ranks(values):
    return [sum(other < v for other in values) + (sum(other == v for other in values) + 1) / 2 for v in values]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=20))
def test_rank_correlation_is_the_correlation_of_mean_ranks(pairs):
    first, second = ([float(v) for v in column] for column in zip(*pairs, strict=True))
    if len({*first}) == 1 or len({*second}) == 1:
        with pytest.raises(ValueError, match="constant"):
            rank_correlation(torch.tensor(first), torch.tensor(second))
        return
    a, b = (torch.tensor(mean_ranks(column), dtype=torch.float64) for column in (first, second))
    a, b = a - a.mean(), b - b.mean()
    expected = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
    assert rank_correlation(torch.tensor(first), torch.tensor(second)) == pytest.approx(float(expected), abs=1e-12)


def test_rank_correlation_sees_order_only():
    score = torch.tensor([0.1, 0.5, 0.2, math.inf])
    assert rank_correlation(score, torch.tensor([1.0, 30.0, 2.0, 31.0])) == pytest.approx(1)
    assert rank_correlation(score, -score) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(2), torch.zeros(3), "both must be"),
        (torch.zeros(2, 1), torch.zeros(2, 1), r"score has shape \(2, 1\)"),
        (torch.zeros(0), torch.zeros(0), "N >= 1"),
        (torch.tensor([0.0, math.nan]), torch.zeros(2), "score: 1 of 2 values are NaN"),
        (torch.zeros(2), torch.tensor([math.nan, math.nan]), "(error|reference): 2 of 2 values are NaN"),
    ],
)
def test_bad_scores_are_named(first, second, message):
    for metric in (risk_coverage, rank_correlation):
        with pytest.raises(ValueError, match=message):
            metric(first, second)


def test_bad_scores_of_detection_are_named():
    fine = torch.zeros(2)
    with pytest.raises(ValueError, match=r"in_distribution has shape \(0,\)"):
        ood_detection(torch.zeros(0), fine)
    with pytest.raises(ValueError, match=r"out_of_distribution has shape \(2, 1\)"):
        ood_detection(fine, fine[:, None])
    with pytest.raises(ValueError, match="out_of_distribution: 1 of 2 values are NaN"):
        ood_detection(fine, torch.tensor([math.nan, 0.0]))
    with pytest.raises(ValueError, match="all 1 values are 3"):
        rank_correlation(torch.tensor([3.0]), torch.tensor([1.0]))
