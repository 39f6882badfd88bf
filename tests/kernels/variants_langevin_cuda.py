"""The CUDA Langevin step, to be compiled: dtypes and options, with their budgets. `record` is always in: it costs one comparison
and one select per element. test_kernels_cuda.py compiles the rest."""

import torch
from sass import Budget, CudaVariant

from bkd_fast.ops.cuda.langevin import find_instance_of, instance_of


def step(dtype, instructions, rounding="nearest", noisy=True, prior=True, moments=False):
    """A variant; `instructions` per element."""
    options = [name for name, on in (("noise", noisy), ("prior", prior), ("moments", moments)) if on]
    elements = 4 if dtype == torch.float64 or (dtype == torch.float32 and moments) else 8
    return CudaVariant(
        f"{str(dtype).removeprefix('torch.')}, {', '.join([rounding, *options])}",
        source="langevin.cu",
        instance=instance_of(dtype, rounding, noisy, prior, moments),
        budget=Budget(
            80 if moments and dtype.itemsize == 2 else 64, instructions, elements, "loop", loads={16}, stores={16}
        ),
    )


VARIANTS = [
    step(torch.float32, 35, prior=False),
    step(torch.float32, 42),
    step(torch.float32, 55, moments=True),
    step(torch.float32, 9.7, noisy=False),
    step(torch.float64, 60, moments=True),
    step(torch.bfloat16, 40, prior=False),
    step(torch.bfloat16, 66, "stochastic", prior=False),
    step(torch.bfloat16, 80, "stochastic", moments=True),
    step(torch.bfloat16, 45, "master"),
    step(torch.float16, 45),
    step(torch.float16, 75, "stochastic", prior=False),
    *(
        CudaVariant(
            f"find_nonfinite, {str(dtype).removeprefix('torch.')}",
            source="langevin.cu",
            instance=find_instance_of(dtype),
            budget=Budget(32, 2.9, 4 * 16 // dtype.itemsize, "loop", loads={16}),  # unrolled four times
        )
        for dtype in (torch.float32, torch.bfloat16)
    ),
]
