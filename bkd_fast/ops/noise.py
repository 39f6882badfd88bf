"""The noise operation: normals that are a pure function of (seed, chain, step, parameter, tag, element).

The layout of the counter and the polynomial that makes normals of its words are specified in csrc/noise.h and in
docs/noise.md. The bits do not depend on device, backend, launch shape, sharding or resume.
"""

from enum import IntEnum

import torch
from torch import Tensor

from bkd_fast.ops.registry import find


class Tag(IntEnum):
    """What a stream of noise is for. Streams with different tags are independent."""

    LANGEVIN = 0
    STOCHASTIC_ROUNDING = 1
    INITIAL_MOMENTUM = 2
    SECOND_NORMAL = 3
    DATA_ORDER = 4
    DISTILLATION = 5


# The counter's fields: name -> the first value that does not fit.
LIMITS = {
    "seed": 2**64,
    "chain": 2**20,
    "step": 2**44,
    "parameter": 2**24,
    "tag": 2**4,
    "element": 2**38,
}

_LIBRARY = torch.library.Library("bkd_fast", "FRAGMENT")
_LIBRARY.define(
    "normal_(Tensor(a!) out, int seed, int chain, int step, int parameter, int tag, int first_element) -> ()",
)


@torch.library.impl(_LIBRARY, "normal_", "CompositeExplicitAutograd")
def _normal(out: Tensor, seed: int, chain: int, step: int, parameter: int, tag: int, first_element: int) -> None:
    find("normal_", out.device)(out, seed % 2**64, chain, step, parameter, tag, first_element)


@torch.library.register_fake("bkd_fast::normal_", lib=_LIBRARY)
def _normal_fake(out: Tensor, seed: int, chain: int, step: int, parameter: int, tag: int, first_element: int) -> None:
    return None


def check_field(name: str, value: int, spelled: str | None = None) -> None:
    """Raise if `value` does not fit the counter's field `name` (ValueError), or is no integer (TypeError)."""
    spelled = spelled or name
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{spelled} = {value!r}: must be an int")
    if not 0 <= value < LIMITS[name]:
        raise ValueError(f"{spelled} = {value}: must be in [0, 2**{LIMITS[name].bit_length() - 1})")


def signed(seed: int) -> int:
    """An unsigned 64-bit seed as the signed integer that operator schemas carry."""
    return seed - 2**64 if seed >= 2**63 else seed


def normal_(
    out: Tensor, *, seed: int, chain: int = 0, step: int = 0, parameter: int = 0, tag: int = 0, first_element: int = 0
) -> Tensor:
    """Fill `out` (float32, contiguous) with the noise of elements `first_element ...` in row-major order.

    Raises:
        TypeError: `out` is not a contiguous float32 tensor, or a coordinate is no int.
        ValueError: a coordinate does not fit its field of the counter (`LIMITS`).
    """
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise TypeError(f"out is {out.dtype} with strides {out.stride()}: must be a contiguous float32 tensor")
    for name, value in (("seed", seed), ("chain", chain), ("step", step), ("parameter", parameter), ("tag", tag)):
        check_field(name, value)
    check_field("element", first_element, "first_element")
    if out.numel():
        check_field("element", first_element + out.numel() - 1, "the last element")
        torch.ops.bkd_fast.normal_(out, signed(seed), chain, step, parameter, tag, first_element)
    return out
