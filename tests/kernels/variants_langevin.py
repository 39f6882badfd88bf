"""The Triton Langevin step and its pre-pass, to be compiled: dtypes and options, with their budgets."""

import torch
import triton.language as tl
from sass import Budget, TritonVariant

from bkd_fast.kernels import langevin
from bkd_fast.kernels.rules import NUMBERS
from bkd_fast.ops.rules import RULES

TYPES = {
    torch.float32: ("fp32", tl.float32),
    torch.float64: ("fp64", tl.float64),
    torch.bfloat16: ("bf16", tl.bfloat16),
    torch.float16: ("fp16", tl.float16),
}
POINTERS = ("nonfinite", "noise_table", "scalars", "clock")


def step(
    name, instructions, dtype=torch.float32, prior=0, noise=True, moments=False, master=False, small=(), unrolled=1,
    rule="sgld", **given,
):  # fmt: skip
    """A variant of the step. `given`: the types of the optional pointers that it gets; `small`: widths of its narrower loads;
    `unrolled`: times, by the compiler."""
    states, own = RULES[rule].states, RULES[rule].own
    size, width = langevin.tile(dtype, moments, states)
    registers = langevin.registers(dtype, moments, rule)
    in_memory, theta = TYPES[dtype]
    narrowest = (
        16 if dtype.itemsize * width >= 16 else dtype.itemsize * width
    )  # 4 elements of 16 bits, beside their moments
    return TritonVariant(
        f"{in_memory}, {name}" + f", {rule}" * (rule != "sgld"),
        kernel=langevin.langevin_kernel,
        signature={
            "rows": "*i64", "labels": "*i32", "chunks": "*i32", "size": "i32",
            "lr": "fp64", "decay": "fp64", "sigma": "fp64", "inverse_count": "fp64", **{f"n{k}": "fp64" for k in range(6)},
            "seed": "u64", "chain": "i32", "step": "i64", "scalars_stride": "i32", "table_stride": "i32",
            **given,
        },
        constants={
            "DTYPE": theta, "REAL": tl.float64 if dtype == torch.float64 else tl.float32, "PRIOR": prior,
            "RULE": NUMBERS[rule].value, "STATES": states, "OWN": own,
            "NOISE": noise, "MOMENTS": moments, "MASTER": master, "WIDTH": width, "SIZE": size,
            **{pointer: None for pointer in POINTERS if pointer not in given},
        },
        warps=langevin.WARPS,
        options={"num_stages": 1, "maxnreg": registers, "enable_fp_fusion": False},
        budget=Budget(
            registers, instructions, unrolled * size // (32 * langevin.WARPS), "loop",
            loads={narrowest, 16, *small}, stores={narrowest, 16} if moments or states else {16},
        ),
    )  # fmt: skip


RECORD = {"nonfinite": "*u8"}
TABLE = {"noise_table": "*fp32", "small": (4,)}

VARIANTS = [
    step("SGLD", 34),
    step("no noise", 2.2, noise=False, unrolled=4),
    step("prior, record", 38, prior=1, **RECORD),
    step("centred prior, record", 40.5, prior=2, **RECORD),
    step("prior, record, moments", 48, prior=1, moments=True, **RECORD),
    step("prior, record, in a graph", 38, prior=1, scalars="*fp32", clock="*i64", **RECORD),
    step("prior, record", 50, torch.float64, prior=1, **RECORD),
    step("prior, record, moments", 58, torch.float64, prior=1, moments=True, **RECORD),
    step("nearest, record", 39.5, torch.bfloat16, **RECORD),
    step("stochastic, record", 60, torch.bfloat16, **TABLE, **RECORD),
    step("master, record", 40.5, torch.bfloat16, master=True, **RECORD),
    step("stochastic, prior, record, moments", 72, torch.bfloat16, prior=1, moments=True, **TABLE, **RECORD),
    step("stochastic, record", 72, torch.float16, **TABLE, **RECORD),
    step("prior, record", 44.5, prior=1, rule="sghmc", **RECORD),
    step("no noise", 10.1, noise=False, unrolled=4, rule="nesterov", **RECORD),
    step("prior, record", 92, prior=1, rule="rmsprop", **RECORD),
    step("prior, record", 96, prior=1, rule="adam", **RECORD),
    step("prior, record", 50, prior=1, rule="sgnht", **RECORD),
    step("prior, record", 45.5, prior=1, rule="baoab", **RECORD),
    step("prior, record, moments", 103.5, prior=1, moments=True, rule="adam", **RECORD),
    step("prior, record, moments", 86, torch.float64, prior=1, moments=True, rule="sgnht", **RECORD),
    step("master, record", 50, torch.bfloat16, master=True, rule="sghmc", **RECORD),
    step("master, record", 57, torch.float16, master=True, rule="sgnht", **RECORD),
    TritonVariant(
        "fp32, find_nonfinite",
        kernel=langevin.nonfinite_kernel,
        signature={"rows": "*i64", "chunks": "*i32", "size": "i32", "nonfinite": "*u8"},
        constants={"DTYPE": tl.float32, "REAL": tl.float32, "SIZE": langevin.tile(torch.float32)[0]},
        warps=langevin.WARPS,
        budget=Budget(32, 2.3, 32, "loop", loads={16}),  # unrolled four times
    ),
]
