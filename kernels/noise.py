"""The noise of csrc/noise.h in Triton, bit for bit: Philox4x32-10 words, polynomial Box-Muller normals.

Budget per element on sm_80 and sm_90: 29 instructions, in registers: one Philox call for four elements, two polynomials and half
a root. The functions are for kernels that use the noise where it is made; `normal_` stores it: 4 bytes, 37 instructions with its
prologue (47 where the first element is inside a block).
"""

import triton
import triton.language as tl
from torch import Tensor

from bkd_fast.kernels.arithmetic import INTERPRETED, fma


def _numbers(*hexadecimal: str) -> tl.constexpr:
    return tl.constexpr(tuple(float.fromhex(text) for text in hexadecimal))


# lowest power first (csrc/noise.h says what they approximate)
RADIUS = _numbers(
    "-0x1.8b8e68p-2", "0x1.ff5aa2p-3", "0x1.626562p-4", "0x1.1b0e12p-6", "0x1.5ff422p-5", "-0x1.cdaf1cp-6", "0x1.2731b2p-6"
)  # fmt: skip
COS = _numbers("0x1.fffffep-1", "-0x1.3bd3a4p+2", "0x1.03bcfcp+2", "-0x1.54f5e8p+0", "0x1.c1f36ap-3")
SIN = _numbers("0x1.921fb4p+1", "-0x1.4abba2p+2", "0x1.466504p+1", "-0x1.31fbf4p-1", "0x1.3912a8p-4")
EPSILON = tl.constexpr(2.0**-42)
SLOPE = tl.constexpr(float.fromhex("0x1.62e43p-23"))

TILE = 1024
WARPS = 4


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four words of four counter words and two of the key, uint32. Words that a launch shares stay scalars for two rounds."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def words_of(block, seed, step, chain, parameter, tag):
    """The words of Philox calls `block` (uint64, any shape) of a stream: the counter's layout."""
    seed, step = tl.cast(seed, tl.uint64), tl.cast(step, tl.uint64)
    chain, parameter = tl.cast(chain, tl.uint32), tl.cast(parameter, tl.uint32)
    stream = (tl.cast(tag, tl.uint32) << 28) | parameter
    return philox(
        block.to(tl.uint32),
        step.to(tl.uint32),
        (chain << 12) | (step >> 32).to(tl.uint32),
        ((block >> 32).to(tl.uint32) << 24) | stream,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def _horner(x, coefficients: tl.constexpr, last: tl.constexpr):
    value = fma(x, coefficients[last], coefficients[last - 1])
    for k in tl.static_range(2, last + 1):
        value = fma(value, x, coefficients[last - k])
    return value


@triton.jit
def _root(x):
    """The correctly rounded square root of x in [2^-42, 46]: a reciprocal root and one Newton step, 5 instructions."""
    if INTERPRETED:
        return tl.sqrt_rn(x)
    else:
        return tl.inline_asm_elementwise(
            "{.reg .f32 y, g, h, n, e; rsqrt.approx.ftz.f32 y, $1; mul.rn.f32 g, $1, y; mul.rn.f32 h, y, 0f3F000000; "
            "neg.f32 n, g; fma.rn.f32 e, n, g, $1; fma.rn.f32 $0, e, h, g;}",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def normal_pair(radius_word, angle_word):
    """Two standard normals (float32) of two words (uint32)."""
    signed = radius_word.to(tl.int32, bitcast=True)
    m = tl.maximum(tl.abs(signed.to(tl.float32)), 0.25)
    j = 0x4F000000 - m.to(tl.int32, bitcast=True)
    t = ((j & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    q = fma(_horner(t, RADIUS, 6), t, EPSILON)
    radius = _root(fma(j.to(tl.float32), SLOPE, q))
    sign = radius_word & 0x80000000
    signed_radius = (radius.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    w = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10  # 2^-32
    v = w * w
    return signed_radius * _horner(v, COS, 4), (signed_radius * w) * _horner(v, SIN, 4)


@triton.jit
def blocks_of(first, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """The blocks (uint64) of COUNT elements from block `first` on, for threads that hold WIDTH = 4 or 8 neighbours: COUNT / WIDTH
    numbers; at 8 those of the even blocks, and the functions below take the odd ones with them."""
    return tl.cast(first, tl.uint64) + (tl.arange(0, COUNT // WIDTH) * (WIDTH // 4)).to(tl.uint64)


@triton.jit
def in_order(a, b, c, d, COUNT: tl.constexpr):
    """Four numbers of each block as the row of its elements."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (COUNT,))


@triton.jit
def _normals_of_block(block, seed, step, chain, parameter, tag):
    w0, w1, w2, w3 = words_of(block, seed, step, chain, parameter, tag)
    a, b = normal_pair(w0, w1)
    c, d = normal_pair(w2, w3)
    return a, b, c, d


@triton.jit
def normals_of(block, seed, step, chain, parameter, tag, COUNT: tl.constexpr):
    """The noise of the COUNT elements of blocks `block` (from `blocks_of`), float32 (COUNT,)."""
    a, b, c, d = _normals_of_block(block, seed, step, chain, parameter, tag)
    if block.shape[0] * 4 == COUNT:
        return in_order(a, b, c, d, COUNT)
    else:
        e, f, g, h = _normals_of_block(block + 1, seed, step, chain, parameter, tag)
        return in_order(tl.join(a, e), tl.join(b, f), tl.join(c, g), tl.join(d, h), COUNT)


@triton.jit
def element_words_of(block, seed, step, chain, parameter, tag, COUNT: tl.constexpr):
    """One random word of its own for each of the COUNT elements of blocks `block` (from `blocks_of`), uint32 (COUNT,)."""
    a, b, c, d = words_of(block, seed, step, chain, parameter, tag)
    if block.shape[0] * 4 == COUNT:
        return in_order(a, b, c, d, COUNT)
    else:
        e, f, g, h = words_of(block + 1, seed, step, chain, parameter, tag)
        return in_order(tl.join(a, e), tl.join(b, f), tl.join(c, g), tl.join(d, h), COUNT)


@triton.jit(do_not_specialize=["seed", "step", "chain", "parameter", "tag", "first_block"])
def normal_kernel(
    out, count, seed: tl.uint64, step: tl.int64, chain, parameter, tag, first_block: tl.int64,
    PHASE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """out[i] = the noise of element 4 first_block + PHASE + i, i < count."""
    begin = tl.program_id(0).to(tl.int64) * SIZE
    noise = normals_of(
        blocks_of(tl.cast(first_block, tl.int64) + begin // 4, SIZE, 4), seed, step, chain, parameter, tag, SIZE
    )
    index = begin + tl.arange(0, SIZE) - PHASE
    tl.store(out + index, noise, mask=(index >= 0) & (index < count))


def normal_(out: Tensor, seed: int, step: int, chain: int, parameter: int, tag: int, first_element: int) -> None:
    """Fill `out` (contiguous float32, not empty) with the noise of the elements from `first_element` on."""
    phase = first_element % 4
    grid = (triton.cdiv(out.numel() + phase, TILE),)
    normal_kernel[grid](
        out, out.numel(), seed, step, chain, parameter, tag, first_element // 4,
        PHASE=phase, SIZE=TILE, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
