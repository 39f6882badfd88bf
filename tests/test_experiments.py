"""The experiments of benchmarks/experiments: each runs end to end at tiny settings, and arithmetic of their own is right."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is no installed package

from benchmarks.experiments import cifar10h, common, gaussians, mnist_ood
from bkd_fast.app.data import Batches
from bkd_fast.app.experiments import common as shared
from bkd_fast.app.experiments.datasets import Gaussians

needs_data = pytest.mark.skipif(
    "BKD_FAST_DATA" not in os.environ, reason="BKD_FAST_DATA is not set: it names the folder with the data sets"
)


# ---- the Gaussian problem ----


def test_true_class_probabilities_are_those_of_bayes_rule_with_the_densities():
    from scipy.stats import multivariate_normal

    problem = Gaussians(3)
    x, _ = problem.draw(40)
    densities = np.stack(
        [
            multivariate_normal(mean, Gaussians.variance).pdf(x.double().numpy())
            for mean in problem.means.double().numpy()
        ],
        axis=1,
    )
    expected = densities / densities.sum(1, keepdims=True)
    np.testing.assert_allclose(problem.log_probs(x).exp().numpy(), expected, rtol=1e-3, atol=1e-7)


def test_labels_follow_the_true_class_probabilities():
    """The log loss of true probabilities on 20,000 labels is their expected entropy, and the accuracy is the published one."""
    problem = Gaussians(0)
    x, y = problem.draw(20_000)
    log_probs = problem.log_probs(x).double()
    scores = gaussians.point_scores(log_probs, log_probs)
    excess = -log_probs.gather(1, y[:, None])[:, 0] - torch.special.entr(log_probs.exp()).sum(1)
    assert abs(float(excess.mean())) < 5 * float(excess.std()) / 20_000**0.5
    assert 0.55 < scores["accuracy"] < 0.65
    assert scores["kl"] == pytest.approx(0, abs=1e-12)


def test_point_scores_are_those_of_repeated_rows_with_labels_in_the_true_proportions():
    """Against scikit-learn on a hundred copies of each row, labelled in the true proportions of 1/100."""
    from scipy.stats import entropy
    from sklearn.metrics import accuracy_score, log_loss

    truth = np.array([[0.70, 0.20, 0.10], [0.05, 0.35, 0.60], [0.25, 0.40, 0.35]])
    predicted = np.array([[0.6, 0.3, 0.1], [0.1, 0.5, 0.4], [0.2, 0.3, 0.5]])
    labels = np.concatenate([np.repeat([0, 1, 2], np.rint(100 * row).astype(int)) for row in truth])
    rows = np.repeat(predicted, 100, axis=0)
    found = gaussians.point_scores(torch.tensor(predicted).log(), torch.tensor(truth).log())
    assert found["nll"] == pytest.approx(log_loss(labels, rows))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, rows.argmax(1)))
    assert found["kl"] == pytest.approx(entropy(truth, predicted, axis=1).mean())


# ---- what they share ----


def test_log_odds_are_those_of_the_softmax_and_stay_finite():
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(shared.log_odds(logits), torch.logit(logits.softmax(-1)))
    assert shared.log_odds(torch.tensor([[900.0, 0.0, 0.0]]))[0, 0] == pytest.approx(900 - np.log(2))


def test_normal_quantiles_are_those_of_scipys_logistic_transform():
    from scipy.special import expit
    from scipy.stats import norm

    logits = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
    odds = torch.logit(logits.double().softmax(-1)).numpy()
    for q in (0.025, 0.5, 0.9):
        expected = expit(norm(odds.mean(0), odds.std(0, ddof=1)).ppf(q))
        np.testing.assert_allclose(shared.normal_quantile(logits, q).numpy(), expected, rtol=1e-6)


def test_a_fit_with_weight_decay_finds_the_mode_of_the_posterior():
    """The gradient of the whole energy, prior included, vanishes at the end, and does not without the prior's share."""
    x, y = Gaussians(1).draw(200)
    loss, precision = gaussians.bkd.KDLoss(2.0), 20.0
    batches = Batches(x, y, torch.randn(200, 10), batch_size=200, shuffle_seed=0)
    model = shared.seeded(lambda: gaussians.student("linear"), 0)
    shared.fit(model, batches, loss, epochs=1500, lr=1e-2, weight_decay=precision / 200)
    weight = model[-1].weight
    (gradient,) = torch.autograd.grad(loss(model(x), y, batches.tensors[2]), weight)
    weight = weight.detach()
    assert float((gradient + precision / 200 * weight).abs().max()) < 1e-4
    assert float(gradient.abs().max()) > 1e-3


def test_r_hat_tells_chains_that_agree_from_chains_that_do_not():
    draws = torch.randn(2, 500, 3, 4, generator=torch.Generator().manual_seed(2))
    apart = draws.clone()
    apart[1, ..., 0] += 3
    assert shared.largest_r_hat(draws) < 1.05 < 1.5 < shared.largest_r_hat(apart)
    assert np.isnan(shared.largest_r_hat(draws[:1]))


def test_means_and_standard_errors_over_seeds():
    runs = [{"row": {"figure": value}} for value in (1.0, 2.0, 6.0)]
    mean, error = shared.over_seeds(runs)["row"]["figure"]
    assert (mean, error) == (pytest.approx(3), pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3)))


def test_results_of_one_experiment_leave_the_others_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "experiments.json")
    common.save("one", "command", {"seeds": [0]}, {"row": {"figure": [1.23456789, float("nan")]}}, begin=0)
    common.save("two", "command", {}, {}, begin=0)
    found = json.loads((tmp_path / "experiments.json").read_text())
    assert set(found) == {"one", "two"}
    assert found["one"]["results"] == {"row": {"figure": [1.2346, None]}}


# ---- end to end ----


def _check(results, methods):
    assert methods <= set(results)
    for row, figures in results.items():
        for figure, (mean, _) in figures.items():
            assert np.isfinite(mean), (row, figure)
            if any(word in figure for word in ("accuracy", "coverage", "naive", "votes", "AUROC", "FPR95", "aurc")):
                assert 0 <= mean <= 1, (row, figure)


def test_the_gaussian_experiment_runs():
    results = gaussians.run([0], replace(gaussians.SMALL, passes=4))
    methods = ("KD", "BKD", "BKD, T = 1 + lambda", "MC dropout", "ensemble")
    _check(results, {f"100/own/{kind}/{method}" for kind in ("linear", "mlp") for method in methods})
    _check(results, {"Bayes", "100/own/teacher", "100/none/linear/Bayes", "100/none/mlp/Bayes"})


@needs_data
def test_the_mnist_experiment_runs():
    results = mnist_ood.run([0], mnist_ood.SMALL)
    _check(results, {"teacher", "KD", "BKD", "Bayes without teacher", "MC dropout", "ensemble"})
    assert "kmnist mutual information AUROC" in results["BKD"]
    assert "kmnist mutual information AUROC" not in results["KD"]


@needs_data
def test_the_cifar_experiment_runs(tmp_path, monkeypatch):
    """The teacher is trained once: afterwards it comes from its cache."""
    monkeypatch.setattr(cifar10h, "CACHE", tmp_path)
    data = cifar10h.load(cifar10h.SMALL)
    first = cifar10h.teacher_logits(data, cifar10h.SMALL)
    results = cifar10h.run([0], cifar10h.SMALL)
    _check(results, {"teacher", "KD", "BKD", "MC dropout", "ensemble"})
    monkeypatch.delattr(cifar10h, "fit")
    again = cifar10h.teacher_logits(data, cifar10h.SMALL)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@needs_data
def test_cifar_images_and_human_labels_belong_together():
    """Nine in ten images have the label of CIFAR-10 for the class with most human votes; each image has 47 to 63 votes."""
    data = cifar10h.load(replace(cifar10h.SMALL, test=500))
    assert float((data.counts.argmax(1) == data.test_y).double().mean()) > 0.9
    votes = data.counts.sum(1)
    assert float(votes.min()) >= 47 and float(votes.max()) <= 63
    assert float(data.train_x.mean().abs()) < 1e-4


@needs_data
def test_a_head_on_centred_features_gives_the_students_logits():
    data = cifar10h.load(cifar10h.SMALL)
    student = shared.seeded(cifar10h.student_network, 0)
    head, features, test = cifar10h.centred_head(student, data.train_x, data.test_x)
    with torch.no_grad():
        torch.testing.assert_close(head(test), student(data.test_x), rtol=1e-4, atol=1e-5)
        assert float(features.mean(0).abs().max()) < 1e-5
