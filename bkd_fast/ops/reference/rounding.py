"""Stochastic rounding to 16 bits in float64, from its definition in csrc/half.h: the oracle for its bits."""

import numpy as np
import torch
from numpy.typing import NDArray

from bkd_fast.ops.rounding import BIASES, FRACTION_BITS


def exponent_field(x: NDArray[np.float32], dtype: torch.dtype) -> NDArray[np.int64]:
    """The exponent field of each x rounded toward zero to `dtype`; any of the dtype's where x is not finite."""
    _, exponent = np.frexp(x.astype(np.float64))  # |x| in [1/2, 1) 2^exponent
    field = np.where(x == 0, 0, exponent.astype(np.int64) - 1 + BIASES[dtype])
    return np.clip(field, 0, 2 * BIASES[dtype])


def round_stochastically(x: NDArray[np.float32], random: NDArray[np.uint32], dtype: torch.dtype) -> NDArray[np.float32]:
    """Each x as one of its neighbours in `dtype`, by `random` in [0, 2**16): away from zero in proportion to closeness."""
    magnitude = np.abs(x.astype(np.float64))
    largest = float(torch.finfo(dtype).max)
    spacing = np.ldexp(1.0, np.maximum(exponent_field(x, dtype), 1) - BIASES[dtype] - FRACTION_BITS[dtype])
    with np.errstate(invalid="ignore"):  # infinities and NaNs pass through
        lower, fraction = np.floor(magnitude / spacing), np.mod(magnitude / spacing, 1.0)
        away = np.floor(2.0**16 * fraction) + random >= 2.0**16
        rounded = np.minimum(spacing * (lower + away), largest)
    return np.copysign(np.where(np.isfinite(x), rounded, magnitude), x).astype(np.float32)
