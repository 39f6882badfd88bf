"""KD energy, forward and backward, against eager torch, one `F.softmax` and an addition of the same bytes.

Eager is what a script writes, `F.cross_entropy + lambda F.kl_div(log_softmax(z / T), log_softmax(t / T))`, with the
gradient of `KDLoss(lambda, T)` in scale. All times include autograd and the gradient's allocation; logits are in the
cold state that cycling through several batches gives. The floor is 12 bytes a logit: read z, read t, write dz; `torch.add`
moves the same. The arithmetic beside it is two exponentials a logit, some 50 vector instructions for 16 logits.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from interleaved import Contender, Table
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
        return {"KDLoss": self.kd_energy, "eager": self.eager, "softmax": self.softmax, "add": self.add}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", CLASSES)
def test_kd_energy(benchmark, threads, show, classes, size):
    batches = Batches(classes, size)
    contenders = {name: Contender(call, sets=SETS) for name, call in batches.contenders().items()}
    table = Table(f"KD energy forward + backward, C = {classes:,}, {threads} thread{'s' * (threads > 1)}", "logit")
    times = table.time(f"{batches.size:,} logits", contenders, batches.size, seconds=3)
    show(table)
    benchmark.extra_info["eager / ours"] = times["eager"] / times["KDLoss"]
    benchmark.extra_info["ours / softmax"] = times["KDLoss"] / times["softmax"]
    benchmark.pedantic(batches.kd_energy, args=(0,), rounds=3)


@pytest.mark.parametrize("prior", ["reverse_kl", "continuous_categorical", "soft labels"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_general_energies(benchmark, threads, show, classes, prior):
    """What goes through the general row kernel, against the same formula in eager torch."""
    rows = max(1, 1_000_000 // classes)
    z = (torch.randn(rows, classes) * 3).requires_grad_()
    t, y = torch.randn(rows, classes) * 3, torch.randint(classes, (rows,))
    soft = F.softmax(t, -1)
    loss = KDLoss(STRENGTH, TEMPERATURE, prior="dirichlet" if prior == "soft labels" else prior)
    target = soft if prior == "soft labels" else y

    def ours(_: int) -> None:
        z.grad = None
        loss(z, target, t).backward()

    def eager(_: int) -> None:
        z.grad = None
        log_q, log_p = F.log_softmax(z / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)
        if prior == "reverse_kl":
            term = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        elif prior == "continuous_categorical":
            term = -(log_q.exp() * log_p).sum(-1).mean()
        else:
            term = -(log_p.exp() * log_q).sum(-1).mean()
        (F.cross_entropy(z, target) + STRENGTH * term).backward()

    table = Table(f"KD energy, {prior}, C = {classes:,}, {threads} thread{'s' * (threads > 1)}", "logit")
    times = table.time(f"{z.numel():,} logits", {"KDLoss": ours, "eager": eager}, z.numel(), seconds=2)
    show(table)
    benchmark.extra_info["eager / ours"] = times["eager"] / times["KDLoss"]
    benchmark.pedantic(ours, args=(0,), rounds=3)
