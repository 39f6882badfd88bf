"""`python -m benchmarks.features`: linear heads on cached features that need not fit in memory, against the same by autograd.

Synthetic features are recorded into a temporary file (default: ImageNet's 1.28 M x 2048 in float16, 5.2 GB), which is deleted
afterwards. Contenders take turns on the same batches, one thread; before every turn the file is dropped from the system's
cache, so that each reads it from the disk. The teacher's logits come from a small table in memory. Medians of the turns.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import bkd_fast as bkd

RECORDED = 1000  # rows of a batch of recording
TURNS = 7
LR, STRENGTH, TEMPERATURE = 1e-3, 5.0, 2.0


class Teacher:
    """Logits of 4096 samples, for any sample id."""

    def __init__(self, classes: int) -> None:
        self.table = (3 * torch.randn(4096, classes)).half()

    def logits(self, ids: Tensor) -> Tensor:
        return self.table[ids % len(self.table)]


def anonymous() -> float:
    """MB of memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def forget(path: Path) -> None:
    """Drop a file from the system's cache, so that reading it waits for the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def samples(rows: int, features: int, classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    noise = torch.randn(RECORDED, features)
    for begin in range(0, rows, RECORDED):
        ids = torch.arange(begin, min(begin + RECORDED, rows))
        yield noise[: len(ids)].roll(begin // RECORDED, 1), ids % classes, ids


def contenders(
    features: int, classes: int, chains: list[int], num_data: int
) -> dict[str, Callable[[Tensor, Tensor, Tensor], object]]:
    """What is done with a batch (x, target, teacher_logits)."""
    head = nn.Linear(features, classes)
    sampler = bkd.SGLD(head.parameters(), LR, num_data=num_data)
    loss = bkd.KDLoss(STRENGTH, TEMPERATURE)

    def autograd(x: Tensor, target: Tensor, logits: Tensor) -> None:
        sampler.zero_grad()
        loss(head(x.float()), target, logits).backward()
        sampler.step()

    found: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {"reading alone": lambda *_: None}
    for k in chains:
        found[f"head step, K = {k}"] = bkd.LinearHeadSampler(
            features,
            classes,
            lr=LR,
            num_data=num_data,
            chains=k,
            prior_strength=STRENGTH,
            temperature=TEMPERATURE,
        ).step
    return found | {"autograd, K = 1": autograd}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5, help="of a turn")
    parser.add_argument("--folder", type=Path, help="of the temporary file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        begin, start = time.perf_counter(), anonymous()
        cache = bkd.record_features(
            nn.Identity(),
            samples(options.rows, options.features, options.classes),
            Path(folder) / "features",
            fingerprint={},
        )
        seconds, size = time.perf_counter() - begin, cache.path.stat().st_size
        print(
            f"recorded {size / 1e9:.2f} GB: {size / 1e9 / seconds:.2f} GB/s, + {anonymous() - start:.0f} MB",
            flush=True,
        )
        batches = bkd.FeatureBatches(cache, Teacher(options.classes), batch_size=options.batch, seed=0)
        runs = contenders(options.features, options.classes, options.chains, options.rows)
        steps, peak = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0.0)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _, (name, run) in itertools.product(range(TURNS), runs.items()):
            forget(cache.path)
            begin, first = time.perf_counter(), steps[name]
            for batch in batches.at(first):
                run(*batch)
                steps[name] += 1
                peak[name] = max(peak[name], anonymous() - start)
                if time.perf_counter() - begin > options.seconds:
                    break
            rates[name].append((steps[name] - first) / (time.perf_counter() - begin))
    print(f"{options.rows:,} x {options.features} features, {options.classes} classes, batches of {options.batch}")
    print(f"{'':20}{'steps/s':>10}{'rows/s':>12}{'chain steps/s':>16}{'+ MB':>8}")
    for name in runs:
        rate, chains = statistics.median(rates[name]), int(name.partition("K = ")[2] or 0)
        print(f"{name:20}{rate:10.1f}{rate * options.batch:12,.0f}{rate * chains:16.1f}{peak[name]:8.0f}")


if __name__ == "__main__":
    main()
