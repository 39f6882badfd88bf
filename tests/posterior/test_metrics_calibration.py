"""Calibration errors against closed forms and against loops that a reader can check line by line."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_fast.posterior.metrics import classwise_calibration_error, reliability_bins


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


@pytest.mark.parametrize("bins", [1, 7, 20])
def test_adaptive_bins_of_distinct_confidences_are_chunks_of_the_sorted_rows(bins):
    probs, labels = random_predictions(rows=420)
    top, predicted = probs.double().max(dim=1)
    assert len(top.unique()) == 420
    rows = sorted(zip(top.tolist(), (predicted == labels).tolist(), strict=True))
    size = 420 // bins
    chunks = [rows[start : start + size] for start in range(0, 420, size)]
    found = reliability_bins(probs, labels, bins, adaptive=True)
    assert found.count.tolist() == [size] * bins
    assert found.confidence.tolist() == pytest.approx([sum(p for p, _ in chunk) / size for chunk in chunks])
    assert found.accuracy.tolist() == pytest.approx([sum(right for _, right in chunk) / size for chunk in chunks])
    assert found.edges.tolist() == [0, *(chunk[-1][0] for chunk in chunks[:-1]), 1]
    gaps = sum(abs(sum(right - p for p, right in chunk)) for chunk in chunks)
    assert found.expected_calibration_error == pytest.approx(gaps / 420)


def test_adaptive_edges_are_the_confidences_of_rounded_up_ranks():
    top = torch.arange(10, 0, -1, dtype=torch.float64) / 20 + 0.45
    probs = torch.stack([top, 1 - top], dim=1)
    found = reliability_bins(probs, torch.zeros(10, dtype=torch.long), bins=4, adaptive=True)
    # of 10 rows, ranks 2.5, 5 and 7.5
    assert found.edges.tolist() == pytest.approx([0, 0.6, 0.7, 0.85, 1])
    assert found.count.tolist() == [3, 2, 3, 2]


@settings(deadline=None)
@given(st.lists(st.integers(8, 16), min_size=1, max_size=40), st.integers(1, 12))
def test_adaptive_bins_never_split_ties_and_are_never_empty(sixteenths, bins):
    top = torch.tensor(sixteenths, dtype=torch.float64) / 16
    probs = torch.stack([top, 1 - top], dim=1)
    found = reliability_bins(probs, torch.zeros(len(top), dtype=torch.long), bins, adaptive=True)
    edges = found.edges.tolist()
    assert edges[0] == 0 and edges[-1] == 1 and edges == sorted(set(edges))
    assert len(found.count) <= bins
    for b, (left, right) in enumerate(pairwise(edges)):
        inside = [p for p in top.tolist() if left < p <= right]
        assert len(inside) == found.count[b] > 0
        # without the ties of its last value a bin is smaller than its share
        assert sum(p < max(inside) for p in inside) < math.ceil(len(top) / bins)
    if len(set(sixteenths)) == len(sixteenths) >= bins:
        assert set(found.count.tolist()) <= {len(top) // bins, -(-len(top) // bins)}


def test_adaptive_bins_keep_confidences_of_one_and_above_in_the_last():
    probs = torch.tensor([[0.6, 0.4], [1.0, 0.0], [1.0001, 0.0], [1.0002, 0.0]], dtype=torch.float64)
    found = reliability_bins(probs, torch.tensor([0, 0, 0, 1]), bins=4, adaptive=True)
    assert found.edges.tolist() == [0, 0.6, 1]
    assert found.count.tolist() == [1, 3]
    assert found.accuracy.tolist() == pytest.approx([1, 2 / 3])


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_classwise_error_equals_a_loop_over_classes_bins_and_rows(bins):
    probs, labels = random_predictions()
    errors = []
    for c in range(probs.shape[1]):
        gaps = 0.0
        for b in range(bins):
            inside = [
                (p, label == c)
                for p, label in zip(probs[:, c].double().tolist(), labels.tolist(), strict=True)
                if b / bins < p <= (b + 1) / bins
            ]
            gaps += abs(sum(happened - p for p, happened in inside))
        errors.append(gaps / len(labels))
    assert classwise_calibration_error(probs, labels, bins) == pytest.approx(sum(errors) / len(errors))


def test_adaptive_classwise_error_equals_a_loop_over_chunks():
    probs, labels = random_predictions()
    errors = []
    for c in range(probs.shape[1]):
        rows = sorted(zip(probs[:, c].double().tolist(), (labels == c).tolist(), strict=True))
        chunks = [rows[start : start + 40] for start in range(0, 400, 40)]
        errors.append(sum(abs(sum(happened - p for p, happened in chunk)) for chunk in chunks) / 400)
    found = classwise_calibration_error(probs, labels, 10, adaptive=True)
    assert found == pytest.approx(sum(errors) / len(errors))


@pytest.mark.parametrize("adaptive", [False, True])
def test_classwise_error_of_certain_predictions(adaptive):
    certain, labels = torch.eye(3), torch.arange(3)
    assert classwise_calibration_error(certain, labels, bins=3, adaptive=adaptive) == 0
    # each class: p = 1 never happens in a third of the rows, p = 0 does in every other one of the rest
    wrong = classwise_calibration_error(certain, (labels + 1) % 3, bins=3, adaptive=adaptive)
    assert wrong == pytest.approx(1 / 3 + 2 / 3 / 2)


@pytest.mark.parametrize("adaptive", [False, True])
def test_classwise_error_sees_the_classes_below_the_top(adaptive):
    probs = torch.tensor([[0.5, 0.4, 0.1]]).expand(10, 3)
    labels = torch.tensor([0, 2] * 5)
    assert reliability_bins(probs, labels, adaptive=adaptive).expected_calibration_error == 0
    assert classwise_calibration_error(probs, labels, adaptive=adaptive) == pytest.approx((0.4 + 0.4) / 3)


def test_bins_must_be_positive():
    probs, labels = random_predictions(rows=3)
    for metric in (reliability_bins, classwise_calibration_error):
        with pytest.raises(ValueError, match="bins = 0"):
            metric(probs, labels, bins=0)
