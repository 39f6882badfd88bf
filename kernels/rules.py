"""The rules of csrc/langevin.h in Triton: each gives (theta, first, second) of a tile after one step.

`n0` .. `n5` are the rule's own numbers; the order of operations is the contract.
"""

import triton
import triton.language as tl

from bkd_fast.kernels.arithmetic import fma

# the names of csrc/rules.h, in its order
SGLD, SGHMC, NESTEROV, RMSPROP, ADAM, SGNHT, BAOAB = (tl.constexpr(rule) for rule in range(7))
NUMBERS = {
    "sgld": SGLD,
    "sghmc": SGHMC,
    "nesterov": NESTEROV,
    "rmsprop": RMSPROP,
    "adam": ADAM,
    "sgnht": SGNHT,
    "baoab": BAOAB,
}


@triton.jit
def _root(x):
    """To nearest, as the CPU's."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _divide(a, b):
    """To nearest, as the CPU's."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _momentum(b, g, noise, sigma, n0, n1, NOISE: tl.constexpr):
    b = fma(n1, g, n0 * b)
    if NOISE:
        b = fma(sigma, noise, b)
    return b


@triton.jit
def advance(
    theta, first, second, g, noise, minus_lr, sigma, n0, n1, n2, n3, n4, n5, RULE: tl.constexpr, NOISE: tl.constexpr
):  # fmt: skip
    """One step by RULE. Without NOISE sigma is 0, and what is added is left out."""
    if RULE == SGLD:
        theta = fma(minus_lr, g, theta)
        if NOISE:
            theta = fma(sigma, noise, theta)
    elif RULE == SGHMC:
        first = _momentum(first, g, noise, sigma, n0, n1, NOISE)
        theta = fma(minus_lr, first, theta)
    elif RULE == NESTEROV:
        first = _momentum(first, g, noise, sigma, n0, n1, NOISE)
        theta = fma(minus_lr, fma(n0, first, g), theta)
    elif RULE == RMSPROP:
        first = fma(n1 * g, g, n0 * first)
        root_of_metric = _divide(tl.full(g.shape, 1.0, g.dtype), _root(_root(first) + n2))
        move = minus_lr * (root_of_metric * g)
        if NOISE:
            move = fma(sigma, noise, move)
        theta = fma(root_of_metric, move, theta)
    elif RULE == ADAM:
        second = fma(n3 * g, g, n2 * second)
        inverse_metric = fma(_root(second), n5, n4)
        first = fma(n1, g, n0 * first)
        if NOISE:
            first = fma(sigma * _root(inverse_metric), noise, first)
        theta = fma(minus_lr, _divide(first, inverse_metric), theta)
    elif RULE == SGNHT:
        first = g + second * first
        if NOISE:
            first = fma(sigma, noise, first)
        theta = fma(minus_lr, first, theta)
        square = first * first
        second = fma(n0, fma(square, second, square), second) + n1
    elif RULE == BAOAB:
        kicked = fma(minus_lr, g, first)
        first = n0 * kicked
        if NOISE:
            first = fma(sigma, noise, first)
        theta = fma(n1, first, fma(n1, kicked, theta))
    return theta, first, second
