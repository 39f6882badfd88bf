"""Fused multiply-add with one rounding, emulated exactly in NumPy: what `fma` means on every backend, and in an interpreter."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def fma(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> Any:
    """`a * b + c` rounded once. Operands of one dtype, float32 or float64; broadcasts.

    Exact barring overflow and underflow of intermediate results, which the noise and the step never meet.
    """
    a, b, c = np.asarray(a), np.asarray(b), np.asarray(c)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity pass through, as in hardware
        return _fma32(a, b, c) if np.result_type(a, b, c) == np.float32 else _fma64(a, b, c)


def _fma32(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.float32]:
    product = a.astype(np.float64) * b.astype(np.float64)  # exact: 24 + 24 bits fit in 53
    return _add_to_odd(product, c.astype(np.float64)).astype(np.float32)


def _fma64(a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    # Boldo and Melquiond, "Emulation of FMA and correctly rounded sums" (IEEE Trans. Computers, 2008)
    high, low = _two_product(a, b)
    sum_high, sum_low = _two_sum(c, low)
    total_high, total_low = _two_sum(high, sum_high)
    return total_high + _add_to_odd(sum_low, total_low)


def _two_sum(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rounded sum and its exact error (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _two_product(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rounded product and its exact error (Dekker, Veltkamp's splitting)."""
    product = a * b
    splitter = np.float64(2**27 + 1)
    a_high = splitter * a - (splitter * a - a)
    b_high = splitter * b - (splitter * b - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _add_to_odd(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """`a + b` rounded to odd: a later rounding to fewer bits then equals a single rounding."""
    total, error = _two_sum(a, b)
    bits = np.ascontiguousarray(total).view(np.int64)
    toward_error = np.where((error > 0) == (total > 0), 1, -1)
    inexact_and_even = (np.abs(error) > 0) & ((bits & 1) == 0)  # not where an infinity made the error NaN
    return (bits + np.where(inexact_and_even, toward_error, 0)).view(np.float64)
