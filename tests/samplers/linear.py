"""What a sampler does to a Gaussian target, exactly: the step as a linear map with noise, after any number of steps.

For a mean loss of curvature l, prior precision tau around mu and fixed numbers, a step is x' = A x + c + w xi with x the
parameter and its momentum: mean and covariance after t steps from a fixed start follow by recursion in float64. The maps
are written down from the samplers' docstrings, not from their code.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg


@dataclass(frozen=True)
class Target:
    """One group of independent coordinates."""

    curvature: float  # of the mean loss
    num_data: float
    lr: float
    temperature: float = 1.0
    prior_precision: float = 0.0
    center: float = 0.0
    gradient_noise: float = 0.0  # standard deviation of the minibatch gradient

    @property
    def total(self):
        """Curvature of the mean loss with the prior's share."""
        return self.curvature + self.prior_precision / self.num_data

    @property
    def pull(self):
        """What the prior's centre adds to the gradient."""
        return -self.prior_precision / self.num_data * self.center


@dataclass(frozen=True)
class LinearStep:
    """x' = a x + c + w xi, and v for the gradient's own noise."""

    a: np.ndarray
    c: np.ndarray
    w: np.ndarray
    v: np.ndarray

    def law(self, start, steps):
        """(mean, covariance) after so many steps from a fixed start."""
        mean, covariance = np.array(start, float), np.zeros_like(self.a)
        for _ in range(steps):
            mean = self.a @ mean + self.c
            covariance = self.a @ covariance @ self.a.T + self.noise
        return mean, covariance

    @property
    def noise(self):
        return np.outer(self.w, self.w) + np.outer(self.v, self.v)

    def stationary(self):
        return scipy.linalg.solve_discrete_lyapunov(self.a, self.noise)


def sgld(t: Target, metric=1.0):
    """theta <- theta - lr G g + sqrt(2 lr G T / N) xi"""
    rate = t.lr * metric
    sigma = math.sqrt(2 * rate * t.temperature / t.num_data)
    return LinearStep(
        np.array([[1 - rate * t.total]]),
        np.array([-rate * t.pull]),
        np.array([sigma]),
        np.array([-rate * t.gradient_noise]),
    )


def sghmc(t: Target, momentum=0.9, dampening=0.0, metric=1.0):
    """b <- mu b + (1 - d) g + sqrt(2 (1 - mu) (1 - d) T / (lr N)) xi; theta <- theta - lr b"""
    rate, share = t.lr * metric, 1 - dampening
    sigma = math.sqrt(2 * (1 - momentum) * share * t.temperature / (rate * t.num_data))
    b = np.array([share * t.total, momentum])  # of (theta, b)
    a = np.array([[1, 0] - rate * b, b])
    move = np.array([-rate, 1])
    return LinearStep(a, move * share * t.pull, move * sigma, move * share * t.gradient_noise)


def baoab(t: Target, friction):
    """Kick, half a drift, friction and noise, half a drift."""
    h = math.sqrt(t.lr / t.num_data)
    mu, k = math.exp(-friction * h), math.sqrt(t.lr * t.num_data)
    kick, drift = np.array([[1, 0], [-k * t.total, 1]]), np.array([[1, h / 2], [0, 1]])
    after = drift @ np.diag([1, mu]) @ drift  # the kick
    sigma = math.sqrt((1 - mu**2) * t.temperature)
    return LinearStep(
        after @ kick,
        after @ np.array([0, -k * t.pull]),
        drift @ np.array([0, sigma]),
        after @ np.array([0, -k * t.gradient_noise]),
    )
