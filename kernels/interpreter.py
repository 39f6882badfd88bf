"""Triton's interpreter, mended: what it needs to run our kernels, bit for bit, on the CPU. Imported only where it is in use."""

import sys

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from bkd_fast.kernels import exact


def fma(a, b, c):
    """a * b + c rounded once; float32 or float64 throughout. (The interpreter's own tl.fma rounds twice.)"""
    twice = a * b + c  # of the right shape and type
    data = twice.handle.data
    once = np.broadcast_to(exact.fma(*(_numbers(x, data.dtype) for x in (a, b, c))), data.shape)
    once = np.where(np.isfinite(data), once, data)  # the emulation is for finite numbers
    return tl.tensor(interpreter.TensorHandle(once, twice.dtype.scalar), twice.type)


def _numbers(x, dtype):
    return np.asarray(x.handle.data if isinstance(x, tl.tensor) else getattr(x, "value", x), dtype)


def _let_scalars_count_loops() -> None:
    """A scalar is an array of one element there, which NumPy 2.4 no longer takes for the integer that `range` asks for."""
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


_let_scalars_count_loops()


def _remap_the_language_once_per_launch() -> None:
    """The interpreter remaps triton.language at every call of a function inside a kernel, milliseconds each time; once per launch
    and module is enough."""
    remap = interpreter._patch_lang
    modules = (tl, tl.core)
    done: set[tuple[int, ...]] = set()
    launches = 0

    class Launch:
        """The outermost remapping, which its launch undoes."""

        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            nonlocal launches
            launches -= 1
            done.clear()
            self.scope.restore()

    def remap_once(function):
        nonlocal launches
        names = tuple(i for i, module in enumerate(modules) if any(v is module for v in function.__globals__.values()))
        inside = sys._getframe(1).f_code is interpreter.InterpretedFunction.__call__.__code__
        if inside and launches:
            if names not in done:
                done.add(names)
                remap(function)
            return None
        launches += 1
        done.add(names)
        return Launch(remap(function))

    interpreter._patch_lang = remap_once


_remap_the_language_once_per_launch()
