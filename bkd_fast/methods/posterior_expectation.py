"""Generalised posterior expectation distillation: while the chain runs, a student learns what the posterior says of every input.

Vadera, Cobb, Jalaian and Marlin, *Generalized Bayesian Posterior Expectation Distillation for Deep Neural Networks*, UAI 2020.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from bkd_fast.ops.noise import Tag, check_field, normal_
from bkd_fast.posterior.evaluation import evaluating
from bkd_fast.sampling import Callback, Draw

Estimator: TypeAlias = Literal["running", "memoryless"]

VERSION = 1
LARGEST_LOG_ODDS = 32.0  # beyond it lie 0 and 1, as for the quantiles of `PosteriorPredictive`


class Rows(Protocol):
    """What distillation points come from: a tensor (points, ...), or anything that is asked for rows in the same way."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


class Expectation(ABC):
    """One head of a student: the statistic g of a draw that it learns from, its loss, and what it then says.

    Attributes:
        memory: whether the running mean of g at each point serves the head: it may ("optional"), it must ("required": without it
            there is nothing to learn from), or it would mislead ("useless": each draw is learned from as it comes).
    """

    memory: ClassVar[Literal["optional", "required", "useless"]] = "optional"

    @abstractmethod
    def width(self, num_classes: int) -> int:
        """Columns of the student's output."""

    def numbers(self, num_classes: int) -> int:
        """How many numbers g has for a point."""
        return self.width(num_classes)

    @abstractmethod
    def statistic(self, logits: Tensor) -> Tensor:
        """g, (B, numbers), of one draw's logits (B, C)."""

    @abstractmethod
    def loss(self, g: Tensor, counts: Tensor | None, output: Tensor) -> Tensor:
        """(B,) the loss of outputs (B, width) on the mean g of `counts` draws (B,), or on a single draw's where it is None."""

    @abstractmethod
    def read(self, output: Tensor) -> Tensor:
        """What outputs (B, width) say."""


class Predictive(Expectation):
    """The posterior predictive distribution E p: g = p = softmax(logits), loss CE(g, softmax(output)). Reads as (B, C)."""

    def width(self, num_classes: int) -> int:
        return num_classes

    def statistic(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def loss(self, g: Tensor, counts: Tensor | None, output: Tensor) -> Tensor:
        return -(g * output.log_softmax(1)).sum(1)

    def read(self, output: Tensor) -> Tensor:
        return output.softmax(1)


class ExpectedEntropy(Expectation):
    """The data uncertainty E H(p) in nats, of one output o: reads as exp(o), (B,).

    The loss on a running mean is the paper's, |g - exp(o)|. A single draw has another one, exp(o) - g o: its minimum over draws
    lies at their mean, where that of the absolute error lies at their *median*.
    """

    def width(self, num_classes: int) -> int:
        return 1

    def statistic(self, logits: Tensor) -> Tensor:
        entropy: Tensor = torch.special.entr(logits.softmax(1)).sum(1, keepdim=True)
        return entropy

    def loss(self, g: Tensor, counts: Tensor | None, output: Tensor) -> Tensor:
        if counts is None:
            return functional.poisson_nll_loss(output, g, reduction="none")[:, 0]
        return (g - output.exp()).abs()[:, 0]

    def read(self, output: Tensor) -> Tensor:
        return output[:, 0].exp()


class Variance(Expectation):
    """The variance over draws of every class's probability, with n - 1: reads as sigmoid(o) / 4, (B, C). Ours, not the paper's.

    It is no mean of something that one draw has, so it needs memory, of p and p^2: in float32 known to about 1e-7. Points of
    one draw teach nothing. A variance v of numbers in [0, 1] is at most 1/4: the loss is the binary cross entropy of 4 v, summed
    over classes, whose minimum lies at the mean v of points alike.
    """

    memory = "required"

    def width(self, num_classes: int) -> int:
        return num_classes

    def numbers(self, num_classes: int) -> int:
        return 2 * num_classes

    def statistic(self, logits: Tensor) -> Tensor:
        p = logits.softmax(1)
        return torch.cat([p, p.square()], 1)

    def loss(self, g: Tensor, counts: Tensor | None, output: Tensor) -> Tensor:
        assert counts is not None
        mean, square = g.chunk(2, 1)
        n = counts[:, None]
        variance = (square - mean.square()).clamp_min(0) * n / (n - 1).clamp_min(1)
        losses = functional.binary_cross_entropy_with_logits(output, 4 * variance, reduction="none")
        return torch.where(n > 1, losses, 0).sum(1)

    def read(self, output: Tensor) -> Tensor:
        return output.sigmoid() / 4


class Quantiles(Expectation):
    """Quantiles over draws of every class's probability: reads as (levels, B, C), ascending in the levels. Ours, not the paper's.

    A quantile is no mean over draws, and a running mean of g would hide the spread that is asked for. But the pinball loss of a
    draw (Koenker and Bassett, Econometrica 1978) has, averaged over draws, its minimum at their quantile: each draw is learned
    from as it comes, with either estimator. That is done for the log odds, whose quantiles are those of p: a logistic output's
    gradient would vanish near 0 and 1. Outputs may cross; sorting them mends it (Chernozhukov, Fernandez-Val and Galichon, 2010).

    Args:
        levels: ascending, in (0, 1).

    Raises:
        ValueError: levels that are not.
    """

    memory = "useless"

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels = tuple(levels)
        ascending = all(low < high for low, high in pairwise((0.0, *self.levels, 1.0)))
        if not self.levels or not ascending:
            raise ValueError(f"levels = {self.levels}: must be at least one, ascending, in (0, 1)")

    def width(self, num_classes: int) -> int:
        return len(self.levels) * num_classes

    def numbers(self, num_classes: int) -> int:
        return num_classes

    def statistic(self, logits: Tensor) -> Tensor:
        log_p = logits.double().log_softmax(1)
        return (log_p - (-torch.expm1(log_p)).log()).clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS).to(logits.dtype)

    def loss(self, g: Tensor, counts: Tensor | None, output: Tensor) -> Tensor:
        level = output.new_tensor(self.levels)[:, None]
        above = g[:, None] - self._by_level(output)
        return torch.maximum(level * above, (level - 1) * above).mean((1, 2))

    def read(self, output: Tensor) -> Tensor:
        return self._by_level(output).transpose(0, 1).sort(0).values.sigmoid()

    def _by_level(self, output: Tensor) -> Tensor:
        return output.view(len(output), len(self.levels), -1)


class Uncertainty(NamedTuple):
    """Scores (N,) in nats that rank inputs: total = knowledge + data, exactly.

    total: H(E q), of the predictive distribution.
    data: E H(q); half the mean deviance of Fang et al. (ICML 2024).
    knowledge: their difference, the mutual information. Two heads need not respect that it is not negative: where they err it is.
    """

    total: Tensor
    data: Tensor
    knowledge: Tensor


def uncertainty(probs: Tensor, expected_entropy: Tensor) -> Uncertainty:
    """The decomposition of what two heads, or two students, say.

    Args:
        probs: (N, C), what `Predictive` reads.
        expected_entropy: (N,), what `ExpectedEntropy` reads.

    Raises:
        ValueError: shapes that disagree.
    """
    if probs.dim() != 2 or expected_entropy.shape != probs.shape[:1]:
        raise ValueError(
            f"probs have shape {tuple(probs.shape)} and expected_entropy {tuple(expected_entropy.shape)}: must be (N, C) and (N,)"
        )
    total = torch.special.entr(probs).sum(1)
    return Uncertainty(total, expected_entropy, total - expected_entropy)


class PosteriorExpectation(Callback):
    """Distils expectations over a chain's draws into a student, as a callback of `bkd_fast.sample` (the paper's Algorithm 1).

    Every `every`-th draw of each chain makes one step of the student: a batch of distillation points, the draw's g there, and a
    step of `optimizer` on the mean loss, summed over heads. With `sample(..., thin=H)` the paper's H is `every` * H. No draw is
    kept; on a GPU nothing waits for it.

    - "running" (U_o): the student learns from the mean of g over the draws that met the point so far, a point that a batch holds
      twice counted twice. It is kept in float32 on the student's device: 4 points * (numbers + 1) bytes, numbers the sum over the
      heads of what they keep (C for `Predictive`, 1 for `ExpectedEntropy`, 2 C for `Variance`, none for `Quantiles`).
    - "memoryless" (U_s): from the draw's own g. Unbiased for losses whose gradient is linear in g, and noisier.

    Batches come from a permutation of the points for each epoch; it and the noise depend on (seed, epoch, update) alone, so that
    with `state_dict` in a checkpoint (`Checkpoints(..., others={"distillation": this})`) a run goes on bit for bit. Processes
    that share a chain make the same steps, each of its own copy.

    Args:
        student: gives (B, width) for inputs (B, ...), width the sum of its heads' (`num_classes` for `Predictive`): several
            heads of one trunk are columns of one output, in the order of `expectations`.
        optimizer: of the student's parameters, any of torch.optim.
        inputs: the distillation points, (points, ...); on any device, without labels.
        expectations: what the student learns, a head for each.
        num_classes: C, of the draws' logits.
        estimator: "running" or "memoryless".
        every: draws of a chain from one step of the student to the next.
        batch_size: points of a step.
        input_noise: standard deviation of Gaussian noise on the inputs, new at every step, the same for draw and student.
        seed: of order and noise.

    Attributes:
        student, optimizer: may be replaced between draws, as by a pruned student and its optimizer.
        means: for each head the running mean of g, (points, numbers); None where it has no memory.
        counts: int32 (points,): draws in them.
        updates: steps that the student has taken.

    Raises:
        ValueError: a number out of range, no heads, a head that needs memory without it; the message names it.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Rows,
        expectations: Sequence[Expectation],
        *,
        num_classes: int,
        estimator: Estimator = "running",
        every: int = 1,
        batch_size: int = 100,
        input_noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator = {estimator!r}: must be one of {get_args(Estimator)}")
        if not expectations:
            raise ValueError("expectations = (): must be at least one")
        for name, value, least in (("num_classes", num_classes, 2), ("every", every, 1), ("batch_size", batch_size, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r}: must be an int of at least {least}")
        points = len(inputs)
        if batch_size > points:
            raise ValueError(f"batch_size = {batch_size}: must be at most {points}, the number of points")
        if not 0 <= input_noise < float("inf"):
            raise ValueError(f"input_noise = {input_noise}: must be finite and at least 0")
        check_field("seed", seed)
        for head in expectations:
            if head.memory == "required" and estimator == "memoryless":
                raise ValueError(f"estimator = 'memoryless' with {type(head).__name__}: must be 'running'")
        self.student, self.optimizer, self.inputs = student, optimizer, inputs
        self.expectations, self.num_classes = tuple(expectations), num_classes
        self.estimator, self.every, self.batch_size = estimator, every, batch_size
        self.input_noise, self.seed, self.updates = input_noise, seed, 0
        device = self._device
        self.counts = torch.zeros(points, dtype=torch.int32, device=device)
        self.means = [
            torch.zeros(points, head.numbers(num_classes), device=device)
            if estimator == "running" and head.memory != "useless"
            else None
            for head in self.expectations
        ]
        self._order: tuple[int, Tensor] | None = None  # of an epoch, its permutation

    @property
    def _device(self) -> torch.device:
        return next(self.student.parameters()).device

    # ---- the loop ----

    def on_draw(self, draw: Draw) -> None:
        """Learn from the draw, if it is its turn."""
        if draw.index % self.every == 0:
            self.update(draw.model)

    def update(self, model: nn.Module, rows: Tensor | None = None) -> Tensor:
        """One step of the student by one draw.

        Args:
            model: the draw's network, evaluated in eval mode and without gradients.
            rows: int64 (B,), the points to learn from, which may be repeated; None: the next batch.

        Returns:
            The loss of the batch, 0-dim, before the step.

        Raises:
            ValueError: rows out of range, a student or a network whose output has another shape. Nothing is changed then.
        """
        if rows is None:
            rows = self._next_rows()
        elif rows.dim() != 1 or not len(rows) or not 0 <= int(rows.min()) <= int(rows.max()) < len(self.inputs):
            raise ValueError(f"rows of shape {tuple(rows.shape)}: must be (B,), B >= 1, in [0, {len(self.inputs)})")
        x = self._noisy(self.inputs[rows].to(self._device, non_blocking=True))
        rows = rows.to(self._device, non_blocking=True)
        with torch.no_grad(), evaluating(model):
            logits = model(x)
        if logits.shape != (len(x), self.num_classes):
            raise ValueError(
                f"the draw's logits have shape {tuple(logits.shape)}: must be ({len(x)}, {self.num_classes})"
            )
        outputs = self._heads(self.student(x))
        loss = torch.stack([part.mean() for part in self._losses(logits, rows, outputs)]).sum()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.updates += 1
        return loss.detach()

    def _losses(self, logits: Tensor, rows: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """(B,) of every head; the draw becomes part of the running means."""
        self.counts.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
        counts = self.counts[rows]
        losses = []
        for head, mean, output in zip(self.expectations, self.means, outputs, strict=True):
            g = head.statistic(logits)
            if mean is not None:
                # k values more at a point of n: each moves the mean by its distance over n + k
                mean.index_add_(0, rows, (g.float() - mean[rows]) / counts[:, None])
                g = mean[rows]
            losses.append(head.loss(g.to(output.dtype), None if mean is None else counts, output))
        return losses

    def _next_rows(self) -> Tensor:
        per_epoch = len(self.inputs) // self.batch_size
        epoch, batch = divmod(self.updates, per_epoch)
        if self._order is None or self._order[0] != epoch:
            noise = normal_(torch.empty(len(self.inputs)), seed=self.seed, step=epoch, tag=Tag.DISTILLATION)
            self._order = epoch, noise.argsort(stable=True)
        return self._order[1][batch * self.batch_size : (batch + 1) * self.batch_size]

    def _noisy(self, x: Tensor) -> Tensor:
        if self.input_noise == 0:
            return x
        noise = torch.empty(x.shape, device=x.device)
        normal_(noise, seed=self.seed, step=self.updates, parameter=1, tag=Tag.DISTILLATION)  # parameter 0: the order
        return x + self.input_noise * noise.to(x.dtype)

    def _heads(self, output: Tensor) -> tuple[Tensor, ...]:
        widths = [head.width(self.num_classes) for head in self.expectations]
        if output.dim() != 2 or output.shape[1] != sum(widths):
            raise ValueError(f"student's output has shape {tuple(output.shape)}: must be (B, {sum(widths)})")
        return torch.split(output, widths, 1)

    # ---- what was learned ----

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the student says of inputs (B, ...): one reading for each of `expectations`, in eval mode."""
        with evaluating(self.student):
            outputs = self._heads(self.student(x.to(self._device)))
        return tuple(head.read(output) for head, output in zip(self.expectations, outputs, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "version": VERSION,
            **self._settings(),
            "updates": self.updates,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.counts,
            "means": list(self.means),
        }

    def _settings(self) -> dict[str, int]:
        return {"seed": self.seed, "batch_size": self.batch_size, "points": len(self.inputs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: another version, seed, batch size, number of points or heads. Nothing is changed then.
        """
        for name, value in {"version": VERSION, **self._settings()}.items():
            if state[name] != value:
                raise ValueError(f"the saved distillation has {name} = {state[name]}: must be {value}, as now")
        shapes = [
            [None if mean is None else tuple(mean.shape) for mean in means] for means in (state["means"], self.means)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the saved means have shapes {shapes[0]}: must be {shapes[1]}, those of the heads")
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.counts.copy_(state["counts"])
        for mine, saved in zip(self.means, state["means"], strict=True):
            if mine is not None:
                mine.copy_(saved)
        self.updates = state["updates"]
