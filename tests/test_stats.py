"""The harness measures its own false-alarm rate, and what it can see."""

import numpy as np
import pytest
import stats
from scipy.stats import binom, kstwo, multivariate_normal, norm


def _alarms(test, seeds):
    count = 0
    for seed in seeds:
        try:
            test(np.random.default_rng(seed))
        except AssertionError:
            count += 1
    return count


def test_standard_normals_pass():
    # per run: 5 tests at 6e-7, the Kolmogorov test at 9e-4: 400 runs alarm 0.4 times on average, 5 or more once in 1e4
    assert _alarms(lambda rng: stats.assert_standard_normal(rng.standard_normal(20_000), "null"), range(400)) < 5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda z: 1.005 * z,
        lambda z: z + 0.003,
        lambda z: np.clip(z, -4, 4),
        lambda z: np.where(np.abs(z) < 3e-3, 0.5, z),
        lambda z: z * (1 + 0.004 * (z * z - 1)),
    ],
)
def test_small_errors_are_seen(wrong):
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError):
        stats.assert_standard_normal(wrong(rng.standard_normal(5_000_000)), "wrong")


def _autoregressive(rng, chains, draws, phi):
    x = np.empty((chains, draws))
    state = rng.standard_normal(chains)
    for t in range(draws):
        state = phi * state + np.sqrt(1 - phi**2) * rng.standard_normal(chains)
        x[:, t] = state
    return x


RUNS = 1000
TWO_SIGMAS = 2 * norm.sf(2.0)  # 4.6 %: looser bounds, so that there are alarms to count


def _assert_rate(alarms, rate):
    """Alarms of 1000 runs, within what a binomial of that rate leaves once in 1e5."""
    low, high = binom.ppf([5e-6, 1 - 5e-6], RUNS, rate)
    assert low <= alarms <= high, (
        f"{alarms} alarms of {RUNS}, expected {RUNS * rate:.0f}, allowed {low:.0f} to {high:.0f}"
    )


@pytest.mark.parametrize(
    "null",
    [
        lambda rng: stats.assert_close_in_standard_errors(3 + 0.1 * rng.standard_normal(), 3.0, 0.1, "null"),
        lambda rng: stats.assert_mean(3 + 0.5 * rng.standard_normal(50), 3.0, 0.5, "null"),
        lambda rng: stats.assert_variance(3 + 0.5 * rng.standard_normal(2000), 0.25, "null", mean=3.0),
        lambda rng: stats.assert_uncorrelated(rng.standard_normal(500), 2 + 3 * rng.standard_normal(500), "null"),
        lambda rng: stats.assert_ergodic_mean(3 + rng.standard_normal((4, 20)), 3.0, "null"),
        lambda rng: stats.assert_ergodic_mean(_autoregressive(rng, 8, 100, 0.9), 0.0, "null"),
    ],
    ids=["a value", "mean", "variance", "correlation", "ergodic mean", "ergodic mean of correlated draws"],
)
def test_alarms_come_at_the_stated_rate(null, monkeypatch):
    monkeypatch.setattr(stats, "SIGMAS", 2.0)
    _assert_rate(_alarms(null, range(RUNS)), TWO_SIGMAS)


def test_standard_normals_alarm_at_the_rate_of_their_parts(monkeypatch):
    """Moments 1 and 3 have correlation 3 / sqrt(15), 2 and 4 have 12 / sqrt(2 * 96), odd and even ones none."""
    passing = 1.0
    for correlation in (3 / 15**0.5, 12 / 192**0.5):
        pair = multivariate_normal(cov=[[1, correlation], [correlation, 1]])
        passing *= pair.cdf([2, 2], lower_limit=[-2, -2])
    monkeypatch.setattr(stats, "SIGMAS", 2.0)
    monkeypatch.setattr(stats, "KOLMOGOROV", np.inf)
    _assert_rate(
        _alarms(lambda rng: stats.assert_standard_normal(rng.standard_normal(2000), "null"), range(RUNS)), 1 - passing
    )


def test_kolmogorov_distances_alarm_at_their_rate(monkeypatch):
    monkeypatch.setattr(stats, "SIGMAS", np.inf)
    monkeypatch.setattr(stats, "KOLMOGOROV", 1.3)
    rate = kstwo.sf(1.3 / 400**0.5, 400)  # 6.5 %
    _assert_rate(_alarms(lambda rng: stats.assert_standard_normal(rng.standard_normal(400), "null"), range(RUNS)), rate)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rng, x, y: stats.assert_mean(x + 0.01, 0.0, 1.0, "wrong"),
        lambda rng, x, y: stats.assert_variance(1.005 * x, 1.0, "wrong"),
        lambda rng, x, y: stats.assert_uncorrelated(x, y + 0.01 * x, "wrong"),
        lambda rng, x, y: stats.assert_ergodic_mean(_autoregressive(rng, 16, 5000, 0.9) + 0.3, 0.0, "wrong"),
    ],
    ids=["mean", "variance", "correlation", "ergodic mean"],
)
def test_what_is_wrong_by_ten_standard_errors_is_seen(wrong):
    rng = np.random.default_rng(3)
    with pytest.raises(AssertionError):
        wrong(rng, rng.standard_normal(2_000_000), rng.standard_normal(2_000_000))


def test_effective_size_of_an_autoregression():
    chain = _autoregressive(np.random.default_rng(1), 1, 200_000, 0.9)[0]
    assert stats.effective_size(chain) == pytest.approx(200_000 / 19, rel=0.15)
