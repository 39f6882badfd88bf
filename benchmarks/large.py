"""`make bench-large`: the posterior predictive at ImageNet's size, 50,000 rows x 1000 classes, through its public face.

Needs about 8.5 GB of memory (16 with --merge, which holds two posteriors). Batches of logits are made once and used again with
another shift, so that what is timed is the update. Reported: nanoseconds per cell and draw, bytes of state per cell, peak memory
beyond the start, and the time of a quantile, of diagnostics, of saving, and (--merge) of a merge.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import bkd_fast as bkd
from bkd_fast import _native as native

BATCH = 250  # rows of a batch of logits: with 32 draws 32 MB
WINDOW = 32


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def state_bytes(posterior: bkd.PosteriorPredictive) -> int:
    """Of every array that the posterior keeps."""
    return sum(array.nbytes for array in posterior._as_dict().values() if isinstance(array, Tensor))


def fill(posterior: bkd.PosteriorPredictive, windows: int, batches: list[Tensor]) -> list[float]:
    """Nanoseconds per cell and draw of each window over all rows."""
    times = []
    for window in range(windows):
        spent = 0.0
        for begin in range(0, posterior.num_rows, BATCH):
            rows = torch.arange(begin, min(begin + BATCH, posterior.num_rows))
            logits = batches[(begin // BATCH + window) % len(batches)][:, : len(rows)]
            spent += seconds(lambda logits=logits, rows=rows: posterior.update_logits(logits, rows))
        times.append(1e9 * spent / (posterior.num_rows * posterior.num_classes * WINDOW))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--windows", type=int, default=4, help="windows of 32 draws")
    parser.add_argument("--track", default="all", help='"all" or "topk:k"; the label is tracked too, then')
    parser.add_argument("--diagnostics", action="store_true")
    parser.add_argument("--merge", action="store_true")
    arguments = parser.parse_args()
    rows, classes = arguments.rows, arguments.classes

    generator = torch.Generator().manual_seed(0)
    batches = [
        0.6 * torch.randn(WINDOW, BATCH, classes, generator=generator)
        + 3 * torch.randn(BATCH, classes, generator=generator)
        for _ in range(3)
    ]
    labels = torch.randint(classes, (rows,), generator=generator)
    before = peak_bytes()

    def posterior(chain: int) -> bkd.PosteriorPredictive:
        made = bkd.PosteriorPredictive(
            rows, classes, track=arguments.track, labels=labels, diagnostics=arguments.diagnostics, stream=(1, chain)
        )
        if arguments.track != "all" or arguments.diagnostics:
            made.choose_classes_by(batches[0][0].repeat(-(-rows // BATCH), 1)[:rows])
        return made

    ours = posterior(0)
    times = fill(ours, arguments.windows, batches)
    cells, size = rows * classes, state_bytes(ours)
    print(f"{rows:,} x {classes:,} cells, track = {arguments.track}, {native.isa()}, {torch.get_num_threads()} threads")
    print("update, ns per cell and draw, window by window: " + ", ".join(f"{t:.2f}" for t in times))
    peak = (peak_bytes() - before) / 1e9
    print(f"state: {size / 1e9:.3f} GB, {size / cells:.1f} bytes per cell; peak beyond the start: {peak:.3f} GB")
    print(f"quantile: {1e9 * seconds(lambda: ours.quantile(0.975)) / cells:.1f} ns per cell")
    if arguments.diagnostics:
        print(f"diagnostics: {seconds(lambda: ours.diagnostics().sentence()):.1f} s; {ours.diagnostics().sentence()}")
    with tempfile.TemporaryDirectory() as folder:
        spent = seconds(lambda: ours.save(Path(folder) / "posterior"))
        print(f"save: {spent:.1f} s, {size / spent / 1e9:.2f} GB/s")
    if arguments.merge:
        other = posterior(1)
        fill(other, arguments.windows, batches)
        spent = seconds(lambda: ours.merge_(other))
        print(f"merge: {spent:.1f} s, {size / spent / 1e9:.2f} GB of state per second")


if __name__ == "__main__":
    main()
