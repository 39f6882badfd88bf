"""The shared statistical harness: tests with a stated false-alarm rate, for samples whose law is known.

Every bound is a number of standard errors, or a quantile, of the statistic under the null hypothesis. At 5 standard errors a
test rejects a correct sampler once in 1.7 million runs; `test_stats.py` measures the rates.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

SIGMAS = 5.0
KOLMOGOROV = 1.96  # P(sqrt(n) D > 1.96) = 9e-4


def z_score(value: float, expected: float, standard_error: float) -> float:
    """How many standard errors `value` is from `expected`."""
    return (value - expected) / standard_error


def assert_close_in_standard_errors(value: float, expected: float, standard_error: float, what: str) -> None:
    z = z_score(value, expected, standard_error)
    assert abs(z) < SIGMAS, (
        f"{what}: {value:.6g}, expected {expected:.6g} +- {standard_error:.2g} ({z:+.1f} standard errors)"
    )


def assert_variance(sample: ArrayLike, expected: float, what: str, mean: float = 0.0) -> None:
    """The second moment of independent normal numbers about a known mean. Its standard error is expected * sqrt(2 / n)."""
    x = np.asarray(sample, np.float64).ravel() - mean
    assert_close_in_standard_errors(
        float(np.mean(x * x)), expected, expected * math.sqrt(2 / x.size), f"{what}: variance"
    )


def assert_mean(sample: ArrayLike, expected: float, standard_deviation: float, what: str) -> None:
    x = np.asarray(sample, np.float64).ravel()
    assert_close_in_standard_errors(float(x.mean()), expected, standard_deviation / math.sqrt(x.size), f"{what}: mean")


def assert_standard_normal(sample: ArrayLike, what: str) -> None:
    """Mean, variance, skewness, kurtosis, Kolmogorov distance and tail count of independent standard normals."""
    x = np.asarray(sample, np.float64).ravel()
    n = x.size
    assert_mean(x, 0.0, 1.0, what)
    assert_variance(x, 1.0, what)
    assert_close_in_standard_errors(float(np.mean(x**3)), 0.0, math.sqrt(15 / n), f"{what}: third moment")
    assert_close_in_standard_errors(float(np.mean(x**4)), 3.0, math.sqrt(96 / n), f"{what}: fourth moment")
    distance = float(scipy_stats.kstest(x, "norm").statistic)
    assert distance * math.sqrt(n) < KOLMOGOROV, f"{what}: Kolmogorov distance {distance:.2e} at n = {n}"
    tail = 2 * scipy_stats.norm.sf(4.0)
    count = int(np.sum(np.abs(x) > 4.0))
    # Poisson, so a count bound on both sides rather than a normal one
    low, high = scipy_stats.poisson.ppf([3e-7, 1 - 3e-7], n * tail)
    assert low <= count <= high, f"{what}: {count} values beyond 4 standard deviations, expected {n * tail:.0f}"


def assert_uncorrelated(a: ArrayLike, b: ArrayLike, what: str) -> None:
    """The correlation of two independent standardised samples has standard error 1 / sqrt(n)."""
    x, y = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    correlation = float(np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std()))
    assert_close_in_standard_errors(correlation, 0.0, 1 / math.sqrt(x.size), f"{what}: correlation")


def effective_size(chain: NDArray[np.float64]) -> float:
    """Effective sample size of one stationary series (Geyer's initial positive sequence)."""
    x = chain - chain.mean()
    n = x.size
    spectrum = np.fft.rfft(x, 2 * n)
    autocovariance = np.fft.irfft(spectrum * np.conj(spectrum))[:n] / n
    pairs = autocovariance[0 : n - n % 2 : 2] + autocovariance[1:n:2]
    stop = int(np.argmax(pairs <= 0)) if np.any(pairs <= 0) else pairs.size
    time = max(2 * float(pairs[:stop].sum()) / float(autocovariance[0]) - 1, 1 / n)
    return n / time


def assert_ergodic_mean(chains: ArrayLike, expected: float, what: str, allowance: float = 0.0) -> None:
    """The mean of several stationary chains (chains, draws), its standard error from the spread of the chains' means.

    `allowance`: known bias of the discretisation, added to the bound. With m chains the bound is the Student quantile
    with the two-sided false-alarm rate of 5 normal standard errors.
    """
    means = np.asarray(chains, np.float64).mean(axis=1)
    m = means.size
    error = float(means.std(ddof=1)) / math.sqrt(m)
    bound = float(scipy_stats.t.isf(scipy_stats.norm.sf(SIGMAS), m - 1)) * error + allowance
    difference = abs(float(means.mean()) - expected)
    assert difference < bound, (
        f"{what}: {means.mean():.6g}, expected {expected:.6g}; off by {difference:.2g} of {bound:.2g}"
    )
