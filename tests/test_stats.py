"""The harness measures its own false-alarm rate, and what it can see."""

import numpy as np
import pytest
import stats


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


def test_ergodic_mean_has_its_rate_under_autocorrelation():
    # looser sigmas so that alarms are counted: P(|t| > bound at 2 sigma) = 4.6 %, of 300: 14 +- 3.6
    before, stats.SIGMAS = stats.SIGMAS, 2.0
    try:
        alarms = _alarms(
            lambda rng: stats.assert_ergodic_mean(_autoregressive(rng, 8, 200, 0.9), 0.0, "null"), range(300)
        )
    finally:
        stats.SIGMAS = before
    assert 1 <= alarms <= 32


def test_effective_size_of_an_autoregression():
    chain = _autoregressive(np.random.default_rng(1), 1, 200_000, 0.9)[0]
    assert stats.effective_size(chain) == pytest.approx(200_000 / 19, rel=0.15)
