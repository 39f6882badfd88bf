"""The head step's kernels: dtypes of features and teacher, with and without each part, aligned rows of weights and others."""

from sass import Budget, TritonVariant

from bkd_fast.kernels import head

SETTINGS = {
    "seed": "u64", "step": "i64", "chain": "i32", "weight_parameter": "i32", "bias_parameter": "i32", "ignore_index": "i64",
    "inverse_temperature": "fp32", "label_share": "fp32", "lr": "fp32", "decay": "fp32", "sigma": "fp32",
}  # fmt: skip
SIZES = {"all_rows": "i32", "rows": "i32"}
POINTERS = ("weight", "bias", "x", "logits", "teacher", "statistics", "nonfinite", "target")


def step(name, classes, registers, instructions, features="fp32", teacher="fp32", width=2048, **changed):
    """A variant whose budget is of instructions per logit of the loop over rows, product with `block_f` features included."""
    block_c, block_f, warps = next(tile for most, tile in head.TILES if classes <= most)
    constants = {
        "PRIOR": True, "LABELS": True, "POWER": 2, "BIAS": True, "DECAY": True, "NOISE": True, "CLASSES": classes,
        "FEATURES": width, "BLOCK_C": block_c, "BLOCK_F": block_f, "BLOCK_R": head.BLOCK_R, **changed,
    }  # fmt: skip
    signature = {
        "weight": "*fp32", "bias": "*fp32", "x": f"*{features}", "logits": "*fp32", "teacher": f"*{teacher}",
        "target": "*i64", "statistics": "*fp32", "nonfinite": "*i1", **SIZES, **SETTINGS,
    }  # fmt: skip
    return TritonVariant(
        f"step, {name}",
        head.head_step_kernel,
        signature,
        constants,
        aligned=POINTERS,
        warps=warps,
        options={"enable_fp_fusion": False},
        budget=Budget(registers, instructions, block_c * head.BLOCK_R // (32 * warps), "loop", tensor_cores=True),
    )


def statistics(name, classes, budget, teacher="fp32", **changed):
    block, rows = head.statistics_tile(classes)
    constants = {"CLASSES": classes, "PRIOR": True, "LABELS": True, "POWER": 2, "ROWS": rows, "BLOCK": block, **changed}
    signature = {
        "logits": "*fp32", "teacher": f"*{teacher}", "target": "*i64", "statistics": "*fp32", "energy": "*fp32",
        "register": "*i64", "stamp": "i32", **SIZES, "prior_strength": "fp32",
        "inverse_temperature": "fp32", "label_weight": "fp32", "ignore_index": "i64",
    }  # fmt: skip
    pointers = ("logits", "teacher", "target", "statistics", "energy")
    return TritonVariant(
        f"statistics, {name}", head.row_statistics_kernel, signature, constants, pointers, budget=budget
    )


VARIANTS = [
    statistics("10 classes", 10, Budget(88, 140, 8)),
    statistics("1000 classes", 1000, Budget(48, 70, 8)),
    statistics("1000 classes, bf16", 1000, Budget(48, 70, 8), "bf16"),
    statistics("33000 classes", 33_000, Budget(64, 27, 8, "loops", loads={16})),
    step("1024 classes", 1024, 208, 73),
    step("1000 classes", 1000, 216, 77),
    step("1000 classes, T = 3", 1000, 216, 78, POWER=0),
    step("1000 classes, 2047 features", 1000, 255, 97, width=2047),
    step("1024 classes, bf16", 1024, 208, 54, "bf16", "bf16"),
    step("1000 classes, fp16", 1000, 208, 61, "fp16", "fp16"),
    step("32 classes", 32, 224, 76),
    step("10 classes", 10, 160, 123),
    step("10 classes, bf16", 10, 136, 81, "bf16", "bf16"),
]
