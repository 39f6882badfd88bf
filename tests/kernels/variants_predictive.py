"""The posterior predictive and the sketch: even and odd numbers of classes, 64 and 128 bins, short and long rows."""

from sass import Budget, CudaVariant, TritonVariant

from bkd_fast.kernels import predictive

STATE = {
    "counters": "*u16", "minimum": "*i16", "maximum": "*i16", "mean": "*fp32", "m2": "*fp32", "reference": "*fp32",
    "counts": "*i32",
}  # fmt: skip


def cuda(name, source, instance, budget):
    return CudaVariant(name, f"{source}.cu", f"bkd::{instance}", budget)


def triton(name, kernel, constants, registers, warps=4, **types):
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    options = {"enable_fp_fusion": False}
    return TritonVariant(name, kernel, signature, constants, warps=warps, options=options, budget=Budget(registers))


WINDOW = {"logits": "*fp32", "rows": "*i64", "batch": "*i64", "statistics": "*fp32", "divergences": "*fp32"}
PICKS = {"picked": "*i32", "codes": "*i16", "valid": "*i8"}

VARIANTS = [
    # the longest straight run takes four valid draws of one cell: codes, moments, divergence
    cuda("tiles, even", "predictive", "update_tiles<true, 6>", Budget(128, 71, elements=4, region="block")),
    cuda("tiles, odd", "predictive", "update_tiles<false, 6>", Budget(128, 71, elements=4, region="block")),
    cuda("tiles, even, 128 bins", "predictive", "update_tiles<true, 7>", Budget(128, 71, elements=4, region="block")),
    cuda("tiles, odd, 128 bins", "predictive", "update_tiles<false, 7>", Budget(128, 71, elements=4, region="block")),
    # there the run begins with what a group of draws needs: loads and masks
    cuda("tiles, no histogram, even", "predictive", "update_tiles<true, 0>", Budget(128, 74, elements=4, region="block")),
    cuda("tiles, no histogram, odd", "predictive", "update_tiles<false, 0>", Budget(128, 74, elements=4, region="block")),
    cuda("picks", "predictive", "pick_codes", Budget(40)),
    # the longest loop sums four classes of one row
    cuda("rows, short", "predictive", "measure_rows<true>", Budget(40, 27, elements=4, region="loop", loads={4})),
    cuda("rows, long", "predictive", "measure_rows<false>", Budget(40, 27, elements=4, region="loop", loads={4})),
    cuda("finish", "predictive", "finish_rows", Budget(40)),
    cuda("sort", "sketch", "sort_cells<6>", Budget(40)),
    cuda("sort, 128 bins", "sketch", "sort_cells<7>", Budget(40)),
    cuda("quantile", "sketch", "quantile_cells<6>", Budget(40)),
    cuda("quantile, 128 bins", "sketch", "quantile_cells<7>", Budget(40)),
    cuda("merge", "sketch", "merge_tiles<6>", Budget(96)),
    cuda("merge, 128 bins", "sketch", "merge_tiles<7>", Budget(96)),
    cuda("update", "sketch", "update_cells<6>", Budget(64)),
    cuda("update, 128 bins", "sketch", "update_cells<7>", Budget(96)),
    cuda("counts", "sketch", "count_draws", Budget(40)),
    cuda("histogram", "sketch", "histogram_cells<6>", Budget(64)),
    cuda("histogram, 128 bins", "sketch", "histogram_cells<7>", Budget(64)),
    cuda("deviance", "sketch", "deviance_quantile<6>", Budget(64)),
    cuda("deviance, 128 bins", "sketch", "deviance_quantile<7>", Budget(64)),
    triton("tiles, 64 bins", predictive.update_tiles, {"LOG2_BINS": 6, "HISTOGRAM": True}, 168, **STATE, **WINDOW),
    triton("tiles, 128 bins", predictive.update_tiles, {"LOG2_BINS": 7, "HISTOGRAM": True}, 192, 8, **STATE, **WINDOW),
    triton("tiles, no histogram", predictive.update_tiles, {"LOG2_BINS": 6, "HISTOGRAM": False}, 96, 2, **STATE, **WINDOW),
    triton("picks", predictive.pick_codes, {"BLOCK": 128}, 64, **PICKS, **WINDOW),
    triton("update, 64 bins", predictive.update_sketch, {"LOG2_BINS": 6}, 168, rows="*i64", **PICKS, **STATE),
    triton("update, 128 bins", predictive.update_sketch, {"LOG2_BINS": 7}, 192, 8, rows="*i64", **PICKS, **STATE),
    triton("rows, 10 classes", predictive.measure_rows, {"ROWS": 32, "BLOCK": 16}, 80, **WINDOW),
    triton("rows, 100 classes", predictive.measure_rows, {"ROWS": 8, "BLOCK": 128}, 80, **WINDOW),
    triton("rows, 1000 classes", predictive.measure_rows, {"ROWS": 1, "BLOCK": 1024}, 64, **WINDOW),
    triton(
        "finish", predictive.finish_rows, {"DRAWS": 32, "BLOCK": 1024}, 40, counts="*i32", invalid="*i32", entropy="*fp64",
        divergence="*fp64", **WINDOW,
    ),
]  # fmt: skip
