"""What all metrics have in common: one place to import them from, and what they refuse."""

import math
import subprocess
import sys

import pytest
import torch

from bkd_fast.posterior import metrics


def test_every_metric_is_documented_and_can_be_imported_from_one_place():
    assert metrics.__all__ == sorted(metrics.__all__)
    for name in metrics.__all__:
        assert getattr(metrics, name).__doc__, name


def test_scikit_learn_and_scipy_are_loaded_where_they_are_needed_only():
    code = (
        "import sys, torch; old = {*sys.modules}; import bkd_fast.posterior.metrics;"
        "print(sorted({'sklearn', 'scipy'} & {*sys.modules} - old))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (torch.ones(2, 3) / 3, torch.tensor([0]), "labels"),
        (torch.empty(0, 3), torch.empty(0, dtype=torch.long), "N >= 1"),
        (torch.ones(3) / 3, torch.tensor([0, 0, 0]), r"\(N, C\)"),
        (torch.tensor([[0.5, 0.2]]), torch.tensor([0]), "sum to 0.7"),
        (torch.tensor([[1.5, -0.5]]), torch.tensor([0]), "row 0"),
        (torch.tensor([[0.5, 0.5], [math.nan, 0.5]]), torch.tensor([0, 0]), "row 1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), r"\[0, 2\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-1]), r"\[0, 2\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), "integers"),
    ],
)
def test_bad_predictions_are_named(probs, labels, message):
    for metric in (metrics.reliability_bins, metrics.classwise_calibration_error):
        with pytest.raises(ValueError, match=message):
            metric(probs, labels)
    with pytest.raises(ValueError, match=message):
        metrics.deviance_coverage(probs, labels, torch.zeros(len(labels)))


def test_labels_may_be_of_any_integer_type():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    for dtype in (torch.uint8, torch.int32, torch.int64):
        labels = torch.tensor([0, 0], dtype=dtype)
        assert metrics.reliability_bins(probs, labels, bins=1).accuracy == 0.5
        assert metrics.deviance_coverage(probs, labels, torch.full((2,), 1.0)) == 0.5
