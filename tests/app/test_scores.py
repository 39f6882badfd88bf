"""The table: every score against its closed form, and paired differences against a bootstrap."""

import math

import pytest
import torch

from bkd_fast.app.scores import Difference, Prediction, compare, score


def prediction(probs, uncertainty=None, key="kd"):
    probs = torch.as_tensor(probs, dtype=torch.float64)
    uncertainty = torch.arange(len(probs)).double() if uncertainty is None else torch.as_tensor(uncertainty).double()
    return Prediction(key, key, probs, uncertainty, "score", parameters=1)


def test_scores_of_two_images():
    found = score(prediction([[0.8, 0.2, 0.0], [0.6, 0.3, 0.1]], [0.0, 1.0]), torch.tensor([0, 1]))
    assert found.accuracy == 0.5
    assert found.nll == pytest.approx(-(math.log(0.8) + math.log(0.3)) / 2)
    assert found.brier == pytest.approx((0.04 + 0.04 + 0.36 + 0.49 + 0.01) / 2)
    assert found.ece == pytest.approx((0.2 + 0.6) / 2)
    assert found.error_auroc == 1
    assert found.aurc == pytest.approx((0 + 0.5) / 2)


def test_error_auroc_needs_a_right_and_a_wrong_prediction():
    probs = [[0.9, 0.1], [0.8, 0.2]]
    assert score(prediction(probs), torch.tensor([0, 0])).error_auroc is None
    assert score(prediction(probs), torch.tensor([1, 1])).error_auroc is None
    assert score(prediction(probs, [1.0, 0.0]), torch.tensor([0, 1])).error_auroc == 0


def test_a_class_that_the_labels_lack_is_no_error():
    assert score(prediction([[0.5, 0.25, 0.25]]), torch.tensor([0])).nll == pytest.approx(math.log(2))


def test_point_estimates_are_ranked_by_their_entropy():
    logits = torch.tensor([[0.0, 0.0], [80.0, -80.0]])
    found = Prediction.from_logits("kd", "KD", logits, parameters=3)
    torch.testing.assert_close(found.probs.sum(1), torch.ones(2, dtype=torch.float64))
    assert found.uncertainty.tolist() == pytest.approx([math.log(2), 0], abs=1e-12)


def test_differences_are_paired():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (500,), generator=generator)
    logits = torch.randn(500, 4, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 4)
    better = prediction(logits.double().softmax(1))
    worse = prediction((logits.double() + 0.3 * torch.randn(500, 4, generator=generator)).softmax(1))
    found = compare(better, worse, labels)
    for name, sign in (("accuracy", 1), ("nll", 1), ("brier", 1)):
        gap = getattr(score(better, labels), name) - getattr(score(worse, labels), name)
        assert found[name].mean == pytest.approx(sign * gap)
    # the standard error of the mean difference, by resampling the images
    rows = torch.randint(500, (4000, 500), generator=generator)
    own = (-better.probs.gather(1, labels[:, None]).log() + worse.probs.gather(1, labels[:, None]).log())[:, 0]
    assert found["nll"].standard_error == pytest.approx(float(own[rows].mean(1).std()), rel=0.08)


@pytest.mark.parametrize(
    ("mean", "verdict"), [(0.3, "higher"), (-0.3, "lower"), (0.2, "no clear difference"), (-0.1, "no clear difference")]
)
def test_a_verdict_needs_two_standard_errors(mean, verdict):
    assert Difference(mean, 0.1).verdict == verdict
