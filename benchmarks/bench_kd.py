"""KD energy, forward and backward, against eager torch, one `F.softmax` and an addition of the same bytes.

    pytest benchmarks/bench_kd.py --benchmark-enable     every case apart, by pytest-benchmark
    python benchmarks/bench_kd.py                        the table of ratios, every row from one interleaved run

Eager is what a script writes, `F.cross_entropy + lambda F.kl_div(log_softmax(z / T), log_softmax(t / T))`, with the
gradient of `KDLoss(lambda, T)` in scale. All times include autograd and the gradient's allocation; logits are in the
cold state that cycling through several batches gives. The floor is 12 bytes a logit: read z, read t, write dz; `torch.add`
moves the same. The arithmetic beside it is two exponentials a logit, some 50 vector instructions for 16 logits.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bkd_fast.distill import KDLoss

STRENGTH, TEMPERATURE = 5.0, 2.0
CLASSES = (10, 100, 1000, 32_000)
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)  # logits
SETS = 3  # batches in turn


class Batches:
    """`SETS` batches of `size` logits, and every contender as a function of the batch's number."""

    def __init__(self, classes: int, size: int) -> None:
        self.rows = max(1, size // classes)
        self.logits = [(torch.randn(self.rows, classes) * 3).requires_grad_() for _ in range(SETS)]
        self.teacher = [torch.randn(self.rows, classes) * 3 for _ in range(SETS)]
        self.target = [torch.randint(classes, (self.rows,)) for _ in range(SETS)]
        self.plain = [z.detach() for z in self.logits]
        self.loss = KDLoss(STRENGTH, TEMPERATURE)

    @property
    def size(self) -> int:
        return self.plain[0].numel()

    def kd_energy(self, i: int) -> None:
        self.logits[i].grad = None
        self.loss(self.logits[i], self.target[i], self.teacher[i]).backward()

    def eager(self, i: int) -> None:
        z, t = self.logits[i], self.teacher[i]
        z.grad = None
        log_q, log_p = F.log_softmax(z / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)
        divergence = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        (F.cross_entropy(z, self.target[i]) + STRENGTH * divergence).backward()

    def softmax(self, i: int) -> Tensor:
        return F.softmax(self.plain[i], -1)

    def add(self, i: int) -> Tensor:
        return torch.add(self.plain[i], self.teacher[i])

    def contenders(self) -> dict[str, Callable[[int], object]]:
        return {"kd_energy": self.kd_energy, "eager": self.eager, "softmax": self.softmax, "add": self.add}


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("contender", ["kd_energy", "eager", "softmax", "add"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", CLASSES)
def test_kd_energy(benchmark, threads, classes, size, contender):
    batches = Batches(classes, size)
    call = batches.contenders()[contender]
    turn = iter(range(10**9))
    benchmark.extra_info["logits"] = batches.size
    benchmark.pedantic(lambda: call(next(turn) % SETS), rounds=9, warmup_rounds=SETS)


def times(batches: Batches, rounds: int) -> dict[str, float]:
    """Median seconds of every contender, taken in turn on every batch."""
    taken: dict[str, list[float]] = {name: [] for name in batches.contenders()}
    for turn in range(rounds + 1):
        for name, call in batches.contenders().items():
            for i in range(SETS):
                start = time.perf_counter()
                call(i)
                if turn:  # the first turn warms up
                    taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", help="scalar, avx2 or avx512; the machine's widest otherwise")
    arguments = parser.parse_args()
    from bkd_fast import _native as native

    if arguments.isa:
        native.use_isa(arguments.isa)
    print(f"KD energy forward + backward, fp32, T = {TEMPERATURE:g}, {native.isa()}, threads of {native.threading()}")
    print(
        f"{'threads':>7} {'classes':>7} {'logits':>10} {'ns/logit':>9} {'vs eager':>9} {'vs softmax':>10} {'vs add':>7}"
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for classes in CLASSES:
            for size in SIZES:
                if size < classes:
                    continue
                batches = Batches(classes, size)
                taken = times(batches, arguments.rounds)
                ours = taken["kd_energy"]
                print(
                    f"{threads:>7} {classes:>7} {batches.size:>10} {ours / batches.size * 1e9:>9.2f} "
                    f"{taken['eager'] / ours:>8.1f}x {ours / taken['softmax']:>9.2f}x {ours / taken['add']:>6.2f}x",
                    flush=True,
                )
    print("vs eager: how many times faster. vs softmax, vs add: our time over theirs.")


if __name__ == "__main__":
    main()
