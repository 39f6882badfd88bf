"""The KD energy's kernels as they are launched, with their budgets.

Budgets in instructions per logit. An H100 issues about 115 while 12 bytes of a float32 logit (read z, read t, write the gradient)
pass its memory, and 57 for bfloat16; rows of few classes also read a label and write an energy, 12 bytes more.
"""

from sass import Budget, TritonVariant

from bkd_fast.kernels import kd, kd_settle
from bkd_fast.kernels.kd_row import HARD, PRIORS, SIGNED, SOFT

SETTINGS = (
    "strength", "inverse_temperature", "label_weight", "smoothing", "scale", "tolerance_teacher", "tolerance_target",
)  # fmt: skip
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


def arguments(storage, classes, prior, labels, probs):
    """Signature, constants and aligned arguments that every kernel has."""
    double = storage == "fp64"
    energy = "*fp64" if double else "*fp32"
    signature = {
        "logits": f"*{storage}", "teacher": f"*{storage}", "labels": "*i64", "soft": energy, "gradient": f"*{storage}",
        "energy": energy, "rows": "i32", "ignore_index": "i32", **dict.fromkeys(SETTINGS, "i64" if double else "fp32"),
    }  # fmt: skip
    constants = {
        "REAL": kd.tl.float64 if double else kd.tl.float32,
        "CLASSES": classes,
        "PROBS": probs,
        "LABELS": labels,
    }
    for name, absent in (
        ("teacher", prior == "none"),
        ("labels", labels != HARD.value),
        ("soft", labels not in (SOFT.value, SIGNED.value)),
    ):
        if absent:
            del signature[name]
            constants[name] = None
    return signature, constants


def named(signature, constants, top):
    """Adds the arguments of a top-k teacher of `top` classes, 0 for a dense one, whose kernels do not have them."""
    constants["TOP"] = top
    for name, kind in (("indices", "*i32"), ("rest", "*fp32")):
        if top:
            signature[name] = kind
        else:
            constants[name] = None


def aligned(signature):
    return tuple(name for name, kind in signature.items() if kind.startswith("*"))


def rows(classes, storage, budget, prior="dirichlet", labels=HARD.value, probs=False, power=2, smoothed=False, top=0,
         by_label=False):  # fmt: skip
    """The launch of `energy_and_gradient` for one teacher or none."""
    signature, constants = arguments(storage, classes, prior, labels, probs)
    signature["blocks"] = "i32"
    constants |= {"PRIOR": PRIORS[prior], "POWER": power, "SMOOTHED": smoothed, "BY_LABEL": by_label}
    named(signature, constants, top)
    soft = {SOFT.value: ["soft labels"], SIGNED.value: ["signed labels"]}.get(labels, [])
    widest = max(BYTES[storage], 4 if soft else 0)
    plain = prior in ("none", "dirichlet") and not soft and power != 0 and not smoothed
    shape = kd.shape_of(classes, 8 * widest, plain)
    constants["WIDTH"] = kd.named_width(top, *((1, kd.TILE_WARPS) if shape is None else (shape.rows, shape.warps)))
    if shape is None:
        constants["BLOCK"] = kd.TILE // 2 if storage == "fp64" else kd.TILE
        kernel, warps, each = kd.tiled, kd.TILE_WARPS, constants["BLOCK"] / (32 * kd.TILE_WARPS)
    else:
        constants |= {"ROWS": shape.rows, "BLOCK": shape.block, "CHUNKS": shape.chunks}
        kernel, warps, each = kd.on_chip, shape.warps, shape.rows * classes / (32 * shape.warps)
    forms = [prior, storage, f"C = {classes}", f"T = {power or 'any'}"]
    forms += soft + ["probabilities"] * probs + ["smoothed"] * smoothed
    forms += [f"top {top}"] * (top > 0) + ["teacher by label"] * by_label
    return TritonVariant(
        ", ".join(forms), kernel, signature, constants, aligned(signature), warps,
        budget=Budget(elements=each, region="loops" if shape is None else "kernel", **budget),
    )  # fmt: skip


def mixture(classes, storage, teachers, weighted, budget):
    signature, constants = arguments(storage, classes, "mixture", HARD.value, False)
    signature |= {"blocks": "i32", "teachers": "i32", "weights_stride": "i32"}
    block, warps = kd.mixture_shape(classes, storage == "fp64")
    constants |= {"POWER": 2, "SMOOTHED": False, "WEIGHTED": weighted, "BLOCK": block}
    constants["SLOTS"] = 1 << (teachers - 1).bit_length()
    if weighted:
        signature["weights"] = "*fp64"
    else:
        constants["weights"] = None
    name = f"mixture, {storage}, C = {classes}"
    return TritonVariant(name, kd.mixture, signature, constants, aligned(signature), warps, budget=budget)


def settle(classes, storage, prior, labels, probs, budget, top=0, by_label=False):
    signature, constants = arguments(storage, classes, prior, labels, probs)
    signature |= {
        "weights": "*fp64",
        "out": "*fp32",
        "register": "*i64",
        "count": "i32",
        "weights_stride": "i32",
        "stamp": "i32",
    }
    signature["factor"] = "i64" if storage == "fp64" else "fp32"
    named(signature, constants, top)
    constants |= {"TEACHERS": 3 if prior == "mixture" else 1, "PRIOR": PRIORS[prior], "WEIGHTED": prior == "mixture"}
    constants |= {"BY_LABEL": by_label, "SUMMED": True, "CHUNK": kd_settle.CHUNK, "BLOCK": kd_settle.BLOCK}
    name = f"settle, {prior}, {storage}, C = {classes}" + f", top {top}" * (top > 0) + ", teacher by label" * by_label
    return TritonVariant(name, kd_settle.settle_rows, signature, constants, aligned(signature), 8, budget=budget)


def multiply(storage):
    signature = {"gradient": f"*{storage}", "incoming": "*fp32", "count": "i32", "divisor": "fp32"}
    budget = Budget(64, region="tile", loads={16}, stores={16})
    return TritonVariant(
        f"multiply, {storage}", kd_settle.multiply, signature, {"BLOCK": 2048}, ("gradient",), 4, budget=budget
    )


# (classes, float32's registers and instructions, bfloat16's): rows of 2 and 10 are memory-bound by their labels and energies too
HOT = [
    (2, (40, 116), (40, 119)),
    (10, (48, 78), (48, 81)),
    (33, (56, 58), (56, 61)),
    (100, (64, 53), (64, 56)),
    (1000, (120, 32), (120, 35.5)),
    (4096, (104, 33), (104, 36.5)),
    (16384, (112, 36), (112, 39)),
    (32000, (168, 37), (168, 42.5)),
    (50257, (208, 52), (208, 57)),  # rows at odd addresses: 4-byte and 2-byte accesses
    (131072, (168, 37), (168, 42.5)),
]
# a top-k teacher's classes, storage of the logits, k, registers and instructions, for which 8 and 4 bytes leave 79 and 39
TOP_K = [
    (10, "fp32", 3, 64, 141),
    (100, "fp32", 8, 72, 69.5),
    (1000, "fp32", 32, 72, 34),
    (1000, "bf16", 32, 72, 36.5),
    (16384, "fp32", 64, 80, 40),
    (32000, "fp32", 64, 128, 26.5),
    (32000, "bf16", 32, 128, 29.5),
]
VARIANTS = [
    *(
        rows(classes, storage, {"registers": registers, "instructions": instructions})
        for classes, *both in HOT
        for storage, (registers, instructions) in zip(("fp32", "bf16"), both, strict=True)
    ),
    # everything at once
    *(
        rows(c, "fp32", {"registers": 255}, "reverse_kl", SOFT.value, True, 0, True)
        for c in (10, 100, 1000, 8192, 32000)
    ),
    *(rows(c, "fp64", {"registers": 255}) for c in (10, 1000, 4096, 32000)),
    rows(2048, "fp64", {"registers": 255}, "reverse_kl", SOFT.value, True, 0, True),
    rows(8192, "fp32", {"registers": 128}, power=0, smoothed=True),
    rows(32000, "bf16", {"registers": 255}, "continuous_categorical", power=0, smoothed=True),
    rows(1000, "fp16", {"registers": 128}, "none", power=1),
    *(
        rows(classes, storage, {"registers": registers, "instructions": instructions}, top=top)
        for classes, storage, top, registers, instructions in TOP_K
    ),
    rows(8192, "fp32", {"registers": 255}, "reverse_kl", SOFT.value, False, 0, True, top=1000),
    rows(32000, "fp64", {"registers": 255}, "continuous_categorical", top=32),
    mixture(10, "fp32", 3, True, Budget(255)),
    mixture(1000, "bf16", 3, False, Budget(255)),
    mixture(32000, "fp64", 4, True, Budget(255)),
    settle(1000, "fp32", "dirichlet", HARD.value, False, Budget(64)),
    settle(10, "bf16", "mixture", SOFT.value, True, Budget(72)),
    settle(32000, "fp64", "reverse_kl", SOFT.value, True, Budget(96)),
    settle(1000, "fp32", "dirichlet", HARD.value, False, Budget(96), top=32),
    rows(1000, "fp32", {"registers": 64}, "reverse_kl", power=1, by_label=True),
    rows(32000, "bf16", {"registers": 144}, "reverse_kl", power=1, by_label=True),
    rows(100, "fp32", {"registers": 64}, "none", SIGNED.value, power=1),
    rows(32000, "fp32", {"registers": 128}, "none", SIGNED.value, power=1),
    settle(100, "fp32", "reverse_kl", HARD.value, False, Budget(64), by_label=True),
    settle(100, "fp32", "none", SIGNED.value, False, Budget(64)),
    multiply("fp32"),
    multiply("bf16"),
]
