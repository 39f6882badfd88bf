"""The noise alone in Triton, to be compiled: from the start of a block, and from inside one."""

from sass import Budget, TritonVariant

from bkd_fast.kernels import noise


def normals(name, instructions, phase, aligned, stores):
    return TritonVariant(
        name,
        kernel=noise.normal_kernel,
        signature={
            "out": "*fp32",
            "count": "i32",
            "seed": "u64",
            "step": "i64",
            "chain": "i32",
            "parameter": "i32",
            "tag": "i32",
            "first_block": "i64",
        },
        constants={"PHASE": phase, "SIZE": noise.TILE},
        aligned=aligned,
        warps=noise.WARPS,
        options={"enable_fp_fusion": False},
        budget=Budget(64, instructions, noise.TILE // (32 * noise.WARPS), "kernel", stores=stores),
    )


VARIANTS = [
    normals("a multiple of 16 elements", 37, 0, ("out", "count"), {16}),
    normals("from inside a block", 47, 1, ("out",), {4}),
]
