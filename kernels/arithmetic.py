"""The fused multiply-add of every kernel: rounded once, on a GPU and in Triton's interpreter."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

if INTERPRETED:
    from bkd_fast.kernels.interpreter import fma
else:

    @triton.jit
    def fma(a, b, c):
        """a * b + c rounded once; float32 or float64 throughout."""
        return tl.fma(a, b, c)


__all__ = ["INTERPRETED", "fma"]
