"""Words to normals alone, in Triton and in CUDA: small enough to be executed on a million pairs of words."""

from pathlib import Path

import triton
import triton.language as tl
from sass import Budget, CudaVariant, TritonVariant

from bkd_fast.kernels.noise import normal_pair

THREADS = 128


@triton.jit
def normals_of_words(radius, angle, first, second, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    a, b = normal_pair(tl.load(radius + at), tl.load(angle + at))
    tl.store(first + at, a)
    tl.store(second + at, b)


VARIANTS = [
    TritonVariant(
        "triton",
        kernel=normals_of_words,
        signature={"radius": "*u32", "angle": "*u32", "first": "*fp32", "second": "*fp32"},
        constants={"COUNT": THREADS},
        warps=THREADS // 32,
        options={"enable_fp_fusion": False},
        budget=Budget(32),
    ),
    CudaVariant(
        "cuda", source=str(Path(__file__).parent / "words.cu"), instance="bkd::normals_of_words", budget=Budget(32)
    ),
]
