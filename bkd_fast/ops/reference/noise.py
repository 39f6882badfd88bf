"""The noise in NumPy: the specification of csrc/noise.h a second time, for every other implementation to be equal to."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bkd_fast.kernels.exact import fma
from bkd_fast.ops.registry import implements

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox4x32: Salmon, Moraes, Dror, Shaw (SC 2011)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def _floats(*hexadecimal: str) -> list[np.float32]:
    return [np.float32(float.fromhex(text)) for text in hexadecimal]


# lowest power first
RADIUS = _floats(
    "-0x1.8b8e68p-2", "0x1.ff5aa2p-3", "0x1.626562p-4", "0x1.1b0e12p-6", "0x1.5ff422p-5", "-0x1.cdaf1cp-6",
    "0x1.2731b2p-6",
)  # fmt: skip
SIN = _floats("0x1.921fb4p+1", "-0x1.4abba2p+2", "0x1.466504p+1", "-0x1.31fbf4p-1", "0x1.3912a8p-4")
COS = _floats("0x1.fffffep-1", "-0x1.3bd3a4p+2", "0x1.03bcfcp+2", "-0x1.54f5e8p+0", "0x1.c1f36ap-3")
EPSILON, SLOPE = _floats("0x1p-42", "0x1.62e43p-23")


def philox(counter: list[NDArray[np.uint32]], key: int) -> list[NDArray[np.uint32]]:
    """Philox4x32-10: four counter words (arrays) and a 64-bit key to four random words."""
    low32 = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    for round_ in range(ROUNDS):
        k0 = np.uint64((key + round_ * KEY_STEPS[0]) & 0xFFFFFFFF)
        k1 = np.uint64(((key >> 32) + round_ * KEY_STEPS[1]) & 0xFFFFFFFF)
        p0, p1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & low32, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & low32
    return [word.astype(np.uint32) for word in (c0, c1, c2, c3)]


def pack(block: ArrayLike, *, step: int, chain: int, parameter: int, tag: int) -> list[NDArray[np.uint32]]:
    """The four counter words of each block (csrc/noise.h has the layout)."""
    block = np.asarray(block, np.uint64)
    same = np.zeros(block.shape, np.uint32)
    return [
        (block & np.uint64(0xFFFFFFFF)).astype(np.uint32),
        same + np.uint32(step & 0xFFFFFFFF),
        same + np.uint32(chain << 12 | step >> 32),
        (block >> np.uint64(32)).astype(np.uint32) << np.uint32(24) | np.uint32(tag << 28 | parameter),
    ]


def unpack(counter: list[NDArray[np.uint32]]) -> dict[str, NDArray[np.uint64]]:
    """The fields that four counter words hold: the inverse of `pack`."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    return {
        "block": c0 | (c3 >> np.uint64(24) & np.uint64(0xF)) << np.uint64(32),
        "step": c1 | (c2 & np.uint64(0xFFF)) << np.uint64(32),
        "chain": c2 >> np.uint64(12),
        "parameter": c3 & np.uint64(0xFFFFFF),
        "tag": c3 >> np.uint64(28),
    }


def normal_pair(
    radius_word: NDArray[np.uint32], angle_word: NDArray[np.uint32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two standard normals of two words: Box-Muller with polynomials, every multiply-add rounded once."""
    m = np.maximum(np.abs(radius_word.view(np.int32).astype(np.float32)), np.float32(0.25))
    j = np.uint32(0x4F000000) - m.view(np.uint32)
    y = j.view(np.int32).astype(np.float32)
    t = (j & np.uint32(0x7FFFFF) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    q = fma(_horner(RADIUS, t), t, EPSILON)
    radius = np.sqrt(fma(y, SLOPE, q))
    signed_radius = (radius.view(np.uint32) | radius_word & np.uint32(0x80000000)).view(np.float32)
    w = angle_word.view(np.int32).astype(np.float32) * np.float32(2.0**-32)
    v = w * w
    return signed_radius * _horner(COS, v), (signed_radius * w) * _horner(SIN, v)


def _horner(coefficients: list[np.float32], x: NDArray[np.float32]) -> NDArray[np.float32]:
    value: NDArray[np.float32] = np.full(x.shape, coefficients[-1], np.float32)
    for coefficient in coefficients[-2::-1]:
        value = fma(value, x, coefficient)
    return value


def normals(
    count: int, *, seed: int, chain: int, step: int, parameter: int, tag: int, first_element: int
) -> NDArray[np.float32]:
    """The noise of elements first_element .. first_element + count - 1, float32 (count,)."""
    w0, w1, w2, w3 = _blocks(count, seed, chain, step, parameter, tag, first_element)
    return _elements([*normal_pair(w0, w1), *normal_pair(w2, w3)], count, first_element)


def words(
    count: int, *, seed: int, chain: int, step: int, parameter: int, tag: int, first_element: int
) -> NDArray[np.uint32]:
    """One random word for each of the elements first_element .. first_element + count - 1: its own of its block's four."""
    return _elements(_blocks(count, seed, chain, step, parameter, tag, first_element), count, first_element)


def _blocks(
    count: int, seed: int, chain: int, step: int, parameter: int, tag: int, first_element: int
) -> list[NDArray[np.uint32]]:
    """The four words of every block that the elements touch."""
    first, last = first_element >> 2, (first_element + count - 1) >> 2
    blocks = np.arange(first, last + 1, dtype=np.uint64)
    return philox(pack(blocks, step=step, chain=chain, parameter=parameter, tag=tag), seed)


def _elements(of_blocks: list[NDArray[Any]], count: int, first_element: int) -> NDArray[Any]:
    """Four numbers per block, put in a row and cut to the elements asked for."""
    skip = first_element % 4
    row: NDArray[Any] = np.stack(of_blocks, axis=-1).reshape(-1)[skip : skip + count]
    return row


@implements("normal_", "reference")
def normal_(out: Tensor, seed: int, chain: int, step: int, parameter: int, tag: int, first_element: int) -> None:
    values = normals(
        out.numel(), seed=seed, chain=chain, step=step, parameter=parameter, tag=tag, first_element=first_element
    )
    out.copy_(torch.from_numpy(values).view(out.shape))
