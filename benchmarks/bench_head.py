"""The head step of K linear heads against what a script writes: F.linear, cross entropy + KL divergence, backward, add_ noise.

"KDLoss + SGLD" is this package's own two operations with autograd between them: the head step without being one. All sample
one posterior. Of the head step's time the two matrix products are torch's and everybody's.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from interleaved import Table
from torch import nn

import bkd_fast as bkd

ROWS, NUM_DATA, LR, STRENGTH, TEMPERATURE = 256, 50_000, 0.05, 5.0, 2.0
SIGMA = math.sqrt(2 * LR / NUM_DATA)


class Heads:
    """K heads of one shape, and a step of each contender on one batch."""

    def __init__(self, chains: int, classes: int, features: int) -> None:
        self.x = torch.randn(ROWS, features)
        self.target, self.teacher = torch.randint(classes, (ROWS,)), 3 * torch.randn(ROWS, classes)
        self.ours = bkd.LinearHeadSampler(
            features, classes, lr=LR, num_data=NUM_DATA, chains=chains, prior_strength=STRENGTH, temperature=TEMPERATURE
        )
        self.plain = [nn.Linear(features, classes) for _ in range(chains)]
        self.modules = [nn.Linear(features, classes) for _ in range(chains)]
        self.loss = bkd.KDLoss(STRENGTH, TEMPERATURE)
        self.samplers = [
            bkd.SGLD(module.parameters(), LR, num_data=NUM_DATA, chain=k, nonfinite="propagate")
            for k, module in enumerate(self.modules)
        ]

    def head_step(self, _: int) -> None:
        self.ours.step(self.x, self.target, self.teacher)

    def two_operations(self, _: int) -> None:
        for module, sampler in zip(self.modules, self.samplers, strict=True):
            sampler.zero_grad()
            self.loss(module(self.x), self.target, self.teacher).backward()
            sampler.step()

    def eager(self, _: int) -> None:
        log_p = F.log_softmax(self.teacher / TEMPERATURE, -1)
        for module in self.plain:
            module.zero_grad()
            z = module(self.x)
            divergence = F.kl_div(F.log_softmax(z / TEMPERATURE, -1), log_p, log_target=True, reduction="batchmean")
            (F.cross_entropy(z, self.target) + STRENGTH * divergence).backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(parameter.grad, alpha=-LR)
                    parameter.add_(torch.randn_like(parameter), alpha=SIGMA)

    @torch.no_grad()
    def products(self, _: int) -> None:
        """The two matrix products of each head and nothing else."""
        for module in self.plain:
            self.teacher.T @ self.x
            self.x @ module.weight.T


@pytest.mark.filterwarnings("ignore:another live sampler")
@pytest.mark.parametrize("chains", [1, 8])
@pytest.mark.parametrize(("classes", "features"), [(10, 64), (10, 512), (100, 512), (1000, 2048)])
def test_head_step(benchmark, threads, show, chains, classes, features):
    heads = Heads(chains, classes, features)
    contenders = {
        "head step": heads.head_step,
        "KDLoss + SGLD": heads.two_operations,
        "eager": heads.eager,
        "two products": heads.products,
    }
    title = f"head step, K = {chains}, {ROWS} rows, {threads} thread{'s' * (threads > 1)}"
    table = Table(title, "weight")
    times = table.time(f"{classes} classes, {features} features", contenders, chains * classes * features, seconds=4)
    show(table)
    benchmark.extra_info["eager / head step"] = times["eager"] / times["head step"]
    benchmark.extra_info["head step / KDLoss + SGLD"] = times["head step"] / times["KDLoss + SGLD"]
    benchmark.pedantic(heads.head_step, args=(0,), rounds=3)
