"""bfloat16 and float16 in memory, float32 in registers: csrc/half.h in Triton."""

import triton
import triton.language as tl

from bkd_fast.kernels.arithmetic import INTERPRETED


@triton.jit
def widen(x, REAL: tl.constexpr):
    """A loaded value in the type of the arithmetic, exactly."""
    if x.dtype == tl.bfloat16:  # by its bits: the interpreter's conversion loses subnormals
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(REAL)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in the type of the memory, rounded to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        chosen = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
        return chosen.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def exponent_field(x, DTYPE: tl.constexpr):
    """The exponent field, as DTYPE stores it, of x rounded toward zero to DTYPE."""
    field = (x.to(tl.uint32, bitcast=True) >> 23) & 0xFF
    if DTYPE == tl.float16:
        field = tl.minimum(tl.maximum(field.to(tl.int32) - 112, 0), 30).to(tl.uint32)
    return field


@triton.jit
def round_stochastically(x, random, DTYPE: tl.constexpr):
    """x as one of its neighbours in DTYPE, by `random` uniform on 0 .. 65535 (csrc/half.h derives each operation)."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = (bits >> 16) & 0x8000
    if DTYPE == tl.bfloat16:
        finite = tl.minimum(magnitude + random, 0x7F7FFFFF)
        rounded = tl.maximum(finite, magnitude) >> 16
    else:
        normal = (tl.minimum(magnitude + (random >> 3), 0x477FFFFF) - 0x38000000) >> 13
        small = tl.minimum(magnitude, 0x387FFFFF).to(tl.float32, bitcast=True)
        fixed = (small * 1099511627776.0).to(tl.int32).to(tl.uint32)  # 2^40
        finite = tl.where(magnitude < 0x38800000, (fixed + random) >> 16, normal)
        rounded = tl.where(magnitude < 0x7F800000, finite, (magnitude >> 13) & 0x7FFF)
    return (sign | rounded).to(tl.uint16).to(DTYPE, bitcast=True)
