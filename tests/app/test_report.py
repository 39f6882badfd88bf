"""The report's words: verdicts that follow the numbers, and numbers as people read them."""

from types import SimpleNamespace

import pytest

from bkd_fast.app import report
from bkd_fast.app.scores import Difference, Scores


def results(accuracy=0.0, nll=0.0, brier=0.0, standard_error=0.1, scores=None):
    means = {"accuracy": accuracy, "nll": nll, "brier": brier}
    return SimpleNamespace(
        differences={name: Difference(mean, standard_error) for name, mean in means.items()}, scores=scores
    )


@pytest.mark.parametrize(
    ("means", "sentence"),
    [
        ({}, "there is no clear difference in accuracy, NLL and Brier score."),
        (
            {"accuracy": 1.0, "nll": -1.0},
            "BKD is better in accuracy and NLL; there is no clear difference in Brier score.",
        ),
        ({"accuracy": -1.0, "nll": 1.0, "brier": 1.0}, "BKD is worse in accuracy, NLL and Brier score."),
        (
            {"accuracy": 1.0, "nll": 1.0, "brier": 0.1},
            "BKD is better in accuracy; BKD is worse in NLL; there is no clear difference in Brier score.",
        ),
    ],
)
def test_the_sentence_follows_the_differences(means, sentence):
    assert report._sentence(results(**means)) == f"Against KD, image by image, {sentence}"


def test_the_comparison_gives_points_and_nats_with_their_errors():
    accuracy, nll, brier = report._comparison(results(accuracy=0.0123, nll=-0.5, standard_error=0.004))
    assert accuracy == {"name": "Accuracy", "value": "+1.23 ± 0.40 points", "verdict": "BKD better"}
    assert nll == {"name": "NLL", "value": "\N{MINUS SIGN}0.5000 ± 0.0040 nats", "verdict": "BKD better"}
    assert brier["verdict"] == "no clear difference"


def test_the_best_of_each_column_is_marked_ties_and_gaps_included():
    scores = {
        "teacher": Scores(accuracy=0.9, nll=0.3, brier=0.1, ece=0.02, error_auroc=None, aurc=0.01),
        "kd": Scores(accuracy=0.9, nll=0.2, brier=0.2, ece=0.03, error_auroc=0.8, aurc=0.02),
        "bkd": Scores(accuracy=0.8, nll=0.4, brier=0.3, ece=0.01, error_auroc=0.7, aurc=0.03),
    }
    assert report._best(results(scores=scores)) == {
        "accuracy": {"teacher", "kd"},
        "nll": {"kd"},
        "brier": {"teacher"},
        "ece": {"bkd"},
        "error_auroc": {"kd"},
        "aurc": {"teacher"},
    }


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (report._count(1234567.4), "1,234,567"),
        (report._percent(0.98765), "98.8 %"),
        (report._percent(0.95, 0), "95 %"),
        (report._signed(-0.5, 1), "\N{MINUS SIGN}0.5"),
        (report._duration(119.96), "120.0 s"),
        (report._duration(150), "2.5 min"),
    ],
)
def test_numbers_as_people_read_them(shown, expected):
    assert shown == expected
