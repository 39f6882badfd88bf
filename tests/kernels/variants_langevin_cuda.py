"""The CUDA Langevin step, to be compiled: dtypes and options, with their budgets. `record` is always in: it costs one comparison
and one select per element. test_kernels_cuda.py compiles the rest."""

import torch
from sass import Budget, CudaVariant

from bkd_fast.ops.cuda.langevin import find_instance_of, instance_of
from bkd_fast.ops.rules import RULES


def step(
    dtype,
    instructions,
    rounding="nearest",
    noisy=True,
    prior=True,
    moments=False,
    rule="sgld",
    registers=64,
    unrolled=1,
):
    """A variant; `instructions` per element."""
    options = [name for name, on in (("noise", noisy), ("prior", prior), ("moments", moments)) if on]
    alone = not moments and not RULES[rule].states
    elements = 8 if dtype.itemsize == 2 or (dtype == torch.float32 and alone) else 4
    return CudaVariant(
        f"{str(dtype).removeprefix('torch.')}, {', '.join([*[rule] * (rule != 'sgld'), rounding, *options])}",
        source="langevin.cu",
        instance=instance_of(dtype, rounding, noisy, prior, moments, rule),
        budget=Budget(registers, instructions, unrolled * elements, "loop", loads={16}, stores={16}),
    )


VARIANTS = [
    step(torch.float32, 35, prior=False),
    step(torch.float32, 42),
    step(torch.float32, 55, moments=True),
    step(torch.float32, 9.7, noisy=False),
    step(torch.float64, 60, moments=True),
    step(torch.bfloat16, 40, prior=False),
    step(torch.bfloat16, 66, "stochastic", prior=False),
    step(torch.bfloat16, 80, "stochastic", moments=True, registers=80),
    step(torch.bfloat16, 45, "master"),
    step(torch.float16, 45),
    step(torch.float16, 75, "stochastic", prior=False),
    step(torch.float32, 51, rule="sghmc"),
    step(torch.float32, 12, rule="nesterov", noisy=False, prior=False, unrolled=2),
    step(torch.float32, 97, rule="rmsprop", registers=80),
    step(torch.float32, 101, rule="adam"),
    step(torch.float32, 58, rule="sgnht"),
    step(torch.float32, 52, rule="baoab"),
    step(torch.float32, 108, rule="adam", moments=True, registers=80),
    step(torch.float64, 86, rule="sgnht", moments=True, registers=96),
    step(torch.bfloat16, 50, "master", rule="sghmc", registers=96),
    step(torch.bfloat16, 101, "master", rule="adam", moments=True, registers=128),
    step(torch.float16, 54, "master", rule="sgnht", registers=96),
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
