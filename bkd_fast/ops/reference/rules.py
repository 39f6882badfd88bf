"""The rules of csrc/langevin.h in NumPy, operation by operation: each gives (theta, first, second) after one step.

Arrays and numbers are of one dtype, float32 or float64. `own` are the rule's own numbers, `z` the noise (-0 where there is none).
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from bkd_fast.kernels.exact import fma

Array: TypeAlias = Any
States: TypeAlias = tuple[Array, Array, Array]


def sgld(theta: Array, first: Array, second: Array, g: Array, z: Array, lr: Array, sigma: Array, own: Array) -> States:
    return fma(sigma, z, fma(-lr, g, theta)), first, second


def _momentum(b: Array, g: Array, z: Array, sigma: Array, own: Array) -> Array:
    return fma(sigma, z, fma(own[1], g, own[0] * b))


def sghmc(theta: Array, first: Array, second: Array, g: Array, z: Array, lr: Array, sigma: Array, own: Array) -> States:
    b = _momentum(first, g, z, sigma, own)
    return fma(-lr, b, theta), b, second


def nesterov(
    theta: Array, first: Array, second: Array, g: Array, z: Array, lr: Array, sigma: Array, own: Array
) -> States:
    b = _momentum(first, g, z, sigma, own)
    return fma(-lr, fma(own[0], b, g), theta), b, second


def rmsprop(
    theta: Array, first: Array, second: Array, g: Array, z: Array, lr: Array, sigma: Array, own: Array
) -> States:
    v = fma(own[1] * g, g, own[0] * first)
    root_of_metric = 1 / np.sqrt(np.sqrt(v) + own[2])
    return fma(root_of_metric, fma(sigma, z, -lr * (root_of_metric * g)), theta), v, second


def adam(theta: Array, first: Array, second: Array, g: Array, z: Array, lr: Array, sigma: Array, own: Array) -> States:
    v = fma(own[3] * g, g, own[2] * second)
    inverse_metric = fma(np.sqrt(v), own[5], own[4])
    m = fma(sigma * np.sqrt(inverse_metric), z, fma(own[1], g, own[0] * first))
    return fma(-lr, m / inverse_metric, theta), m, v


def sgnht(theta: Array, first: Array, second: Array, g: Array, z: Array, lr: Array, sigma: Array, own: Array) -> States:
    b = fma(sigma, z, g + second * first)
    square = b * b
    return fma(-lr, b, theta), b, fma(own[0], fma(square, second, square), second) + own[1]


def baoab(theta: Array, first: Array, second: Array, g: Array, z: Array, lr: Array, sigma: Array, own: Array) -> States:
    kicked = fma(-lr, g, first)
    p = fma(sigma, z, own[0] * kicked)
    return fma(own[1], p, fma(own[1], kicked, theta)), p, second


FUNCTIONS: dict[str, Callable[..., States]] = {
    function.__name__: function for function in (sgld, sghmc, nesterov, rmsprop, adam, sgnht, baoab)
}
