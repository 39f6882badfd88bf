"""Votes against sums over every count, and against Dirichlet-multinomial posteriors that are exact."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, betabinom
from scipy.stats import entropy as kl_divergence

from bkd_fast.posterior.metrics import (
    interval_coverage,
    vote_divergence,
    vote_frequencies,
    vote_pit,
)
from bkd_fast.posterior.predictive import PosteriorPredictive


def exact_posteriors(rows, classes, seed):
    """Concentrations (rows, classes) of Dirichlet posteriors and 20 to 30 votes for each row that follow them."""
    random = np.random.default_rng(seed)
    concentration = 0.3 + 8 * random.random((rows, classes)) ** 3
    truth = random.standard_gamma(concentration)
    counts = random.multinomial(random.integers(20, 31, rows), truth / truth.sum(axis=1, keepdims=True))
    return torch.from_numpy(concentration), torch.from_numpy(counts)


def beta_quantiles(concentration, number):
    """(number, rows, classes): the marginal quantiles at the levels (j + 1/2) / number."""
    rest = concentration.sum(dim=1, keepdim=True) - concentration
    levels = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    return torch.from_numpy(beta.ppf(levels[:, None, None].numpy(), concentration.numpy(), rest.numpy()))


def binomial(k, n, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def test_the_transform_is_a_sum_of_binomial_probabilities():
    generator = torch.Generator().manual_seed(0)
    quantiles = torch.rand(5, 6, 3, generator=generator).round(decimals=1)  # zeros and ones among them
    counts = torch.randint(0, 5, (6, 3), generator=generator)
    counts[0] = torch.tensor([9, 0, 0])
    found = vote_pit(quantiles, counts)
    for i in range(6):
        n = int(counts[i].sum())
        for c in range(3):
            k = int(counts[i, c])
            chances = [sum(binomial(j, n, float(p)) for p in quantiles[:, i, c]) / 5 for j in range(n + 1)]
            assert float(found.below[i, c]) == pytest.approx(sum(chances[:k]), abs=1e-6)
            assert float(found.upto[i, c]) == pytest.approx(sum(chances[: k + 1]), abs=1e-6)
            assert float(found.mid[i, c]) == pytest.approx(sum(chances[:k]) + chances[k] / 2, abs=1e-6)


def test_many_quantiles_of_a_dirichlet_give_the_beta_binomial():
    concentration, counts = exact_posteriors(40, 3, seed=1)
    total = counts.sum(dim=1, keepdim=True)
    rest = concentration.sum(dim=1, keepdim=True) - concentration
    found = vote_pit(beta_quantiles(concentration, 200), counts)
    for part, shift in ((found.below, 1), (found.upto, 0)):
        exact = betabinom.cdf((counts - shift).numpy(), total.numpy(), concentration.numpy(), rest.numpy())
        assert part.numpy() == pytest.approx(exact, abs=1 / 200)


def test_the_accumulators_quantiles_stand_for_its_draws():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 8, 4, generator=generator) + 2 * torch.randn(1, 8, 4, generator=generator)
    posterior = PosteriorPredictive(8, 4)
    posterior.update_logits(logits)
    counts = torch.randint(0, 12, (8, 4), generator=generator)
    quantiles = torch.stack([posterior.quantile((j + 0.5) / 50) for j in range(50)])
    found, exact = vote_pit(quantiles, counts), vote_pit(logits.softmax(dim=2), counts)
    torch.testing.assert_close(found.below, exact.below, atol=0.01, rtol=0)
    torch.testing.assert_close(found.upto, exact.upto, atol=0.01, rtol=0)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_votes_of_an_exact_posterior_are_covered_at_the_level_while_the_naive_reading_is_not(level):
    rows, number = 5000, 40
    concentration, counts = exact_posteriors(rows, 4, seed=3)
    quantiles, top = beta_quantiles(concentration, number), concentration.argmax(dim=1)
    pit = vote_pit(quantiles, counts)
    found = pit.coverage(level, top)
    # means over rows of values in [0, 1] whose mean is the level: five standard errors, alarms at most once in 1e6; the
    # quantiles' own error is far below 1 / number
    error = 5 * math.sqrt(level * (1 - level) / rows) + 0.1 / number
    assert found.cells == pytest.approx(level, abs=error)
    assert found.top == pytest.approx(level, abs=error)
    assert found.per_class.tolist() == pytest.approx([level] * 4, abs=error)
    assert float(pit.mid.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / rows))
    # the same posterior too sure of itself, and too unsure
    centre = quantiles.mean(dim=0)
    assert vote_pit(centre + 0.1 * (quantiles - centre), counts).coverage(level, top).cells < level - error
    wide = beta_quantiles(concentration / 4, number)
    assert vote_pit(wide, counts).coverage(level, top).top > level + error
    ends = quantiles[round((1 - level) / 2 * number - 0.5)], quantiles[round((1 + level) / 2 * number - 0.5)]
    naive = interval_coverage(*ends, vote_frequencies(counts), level, top)
    assert naive.coverage.cells < level - error
    assert naive.coverage.top < level - error


def test_coverage_is_the_chance_of_a_randomised_transform():
    concentration, counts = exact_posteriors(30, 3, seed=4)
    pit = vote_pit(beta_quantiles(concentration, 20), counts)
    between = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    randomised = pit.below + (pit.upto - pit.below) * between[:, None, None]
    covered = ((randomised >= 0.1) & (randomised <= 0.9)).double().mean(dim=0)
    found = pit.coverage(0.8, torch.zeros(30, dtype=torch.long))
    assert found.cells == pytest.approx(float(covered.mean()), abs=1e-3)
    assert found.per_class.tolist() == pytest.approx(covered.mean(dim=0).tolist(), abs=1e-3)
    assert found.top == pytest.approx(float(covered[:, 0].mean()), abs=1e-3)


def test_certain_and_impossible_counts():
    counts = torch.tensor([[2, 0]])
    top = torch.tensor([0])
    certain = vote_pit(torch.tensor([[[1.0, 0.0]]]), counts)
    assert certain.below.tolist() == [[0, 0]]
    assert certain.upto.tolist() == [[1, 1]]
    assert certain.coverage(0.9, top).cells == pytest.approx(0.9)
    impossible = vote_pit(torch.tensor([[[0.0, 1.0]]]), counts)
    assert impossible.coverage(0.99, top).cells == 0
    # one vote each, where the posterior knows unanimous rows only: in the middle, though impossible
    split = vote_pit(torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]), torch.tensor([[1, 1]]))
    assert split.mid.tolist() == [[0.5, 0.5]]
    assert split.coverage(0.5, top).cells == 1


def test_frequencies_add_up_from_small_integers_too():
    counts = torch.tensor([[200, 100], [0, 5]], dtype=torch.uint8)
    torch.testing.assert_close(vote_frequencies(counts), torch.tensor([[2 / 3, 1 / 3], [0, 1]], dtype=torch.float64))


@pytest.mark.parametrize("pseudo_count", [0.0, 0.5])
def test_divergence_equals_scipy(pseudo_count):
    generator = torch.Generator().manual_seed(5)
    probs = torch.randn(50, 6, generator=generator).softmax(dim=1)
    counts = torch.randint(0, 4, (50, 6), generator=generator, dtype=torch.uint8)
    counts[:, 0] += 1
    found = vote_divergence(probs, counts, pseudo_count)
    votes, p = counts.numpy() + pseudo_count, probs.double().numpy()
    kl, own = kl_divergence(votes, p, axis=1), kl_divergence(votes, axis=1)
    assert found.kl.numpy() == pytest.approx(kl)
    assert found.entropy.numpy() == pytest.approx(own)
    assert found.cross_entropy.numpy() == pytest.approx(kl + own)


def test_divergence_of_a_perfect_prediction_is_its_sampling_error():
    p, n, rows = torch.tensor([0.5, 0.3, 0.2]), 50, 20_000
    ballots = torch.multinomial(p, rows * n, replacement=True, generator=torch.Generator().manual_seed(6))
    counts = torch.nn.functional.one_hot(ballots.view(rows, n), 3).sum(dim=1)
    kl = vote_divergence(p.expand(rows, 3), counts).kl
    # 2 n KL is chi-square with 2 degrees of freedom up to terms of 1 / n: mean 2, standard deviation 2
    assert float(kl.mean()) == pytest.approx(1 / n, abs=5 / n / math.sqrt(rows) + 1 / n**2)


def test_divergence_at_the_corners():
    counts = torch.tensor([[4, 0], [4, 0], [3, 1]])
    found = vote_divergence(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), counts)
    assert found.kl.tolist() == [0, math.inf, math.inf]
    assert found.cross_entropy.tolist() == [0, math.inf, math.inf]
    assert found.entropy[:2].tolist() == [0, 0]


def test_rounding_makes_no_prediction_better_or_worse_than_perfect():
    counts = torch.randint(1, 20, (1000, 5), generator=torch.Generator().manual_seed(7))
    for total in (0.9995, 1.0, 1.0005):
        found = vote_divergence(total * vote_frequencies(counts), counts)
        assert 0 <= found.kl.min() <= found.kl.max() < 1e-14
        torch.testing.assert_close(found.cross_entropy, found.entropy)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([1, 2]), r"counts have shape \(2,\)"),
        (torch.zeros(0, 2), "N >= 1"),
        (torch.tensor([[1, 2], [3, -1]]), r"counts in row 1 are \[3, -1\]"),
        (torch.tensor([[1.0, 0.5], [1.0, 0.0]]), "row 0.*whole numbers"),
        (torch.tensor([[1.0, 0.0], [math.nan, 1.0]]), "row 1.*whole numbers"),
        (torch.tensor([[1.0, 0.0], [math.inf, 1.0]]), "row 1.*whole numbers"),
        (torch.tensor([[1, 0], [0, 0]]), "counts in row 1: there are no votes"),
    ],
)
def test_bad_counts_are_named(counts, message):
    probs = torch.tensor([[0.5, 0.5]] * 2)
    for metric in (vote_frequencies, lambda c: vote_divergence(probs, c), lambda c: vote_pit(probs[None], c)):
        with pytest.raises(ValueError, match=message):
            metric(counts)


def test_other_bad_arguments_are_named():
    probs, counts = torch.tensor([[0.5, 0.5]] * 2), torch.ones(2, 2, dtype=torch.long)
    for quantiles in (probs, probs[None, :1], probs[None][:0], torch.ones(1, 2, 3)):
        with pytest.raises(ValueError, match=r"must be \(Q, N, C\)"):
            vote_pit(quantiles, counts)
    for broken in (math.nan, -0.1, 1.1):
        quantiles = probs.repeat(3, 1, 1)
        quantiles[2, 1, 0] = broken
        with pytest.raises(ValueError, match=r"row 1, class 0: must be in \[0, 1\]"):
            vote_pit(quantiles, counts)
    with pytest.raises(ValueError, match=r"row 0.*sum to 1\.5"):
        vote_divergence(probs * 1.5, counts)
    with pytest.raises(ValueError, match="must be equal"):
        vote_divergence(probs[:1], counts)
    for pseudo_count in (-0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="pseudo_count"):
            vote_divergence(probs, counts, pseudo_count)
    pit = vote_pit(probs[None], counts)
    with pytest.raises(ValueError, match="level = 0"):
        pit.coverage(0, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="top has shape"):
        pit.coverage(0.9, torch.zeros(3, dtype=torch.long))
