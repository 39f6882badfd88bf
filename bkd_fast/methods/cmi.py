"""Maximum conditional mutual information: teachers that keep what sets the members of a class apart (Ye et al., ICLR 2024).

With P_i the teacher's distribution on example i and Q^y, the centroid, its mean over the examples of class y::

    CMI = (1 / N) sum_i KL(P_i || Q^{y_i})

is how much a prediction says about its example beyond the class. A teacher fine-tuned on CE - strength CMI is a better estimate
of p(y given x), and so is what it teaches; one on CE + strength CMI (a negative strength here) tells nothing but the class and is
hard to distil from (CMI minimisation: Ye et al., 2025).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bkd_fast.collectives import reduce_sum_
from bkd_fast.ops.kd import REDUCTIONS, kd_energy


class CMILoss(nn.Module):
    """label_weight CE(y, q) - strength KL(q_T || Q_T^y) per example, value and gradient in one pass over the logits.

    That is a reverse KL prior of negative strength whose teacher is the centroid of each row's class, which the kernel looks up.
    The centroids are data: frozen after one `refresh_`, as in the released code, or refreshed every epoch, as in the paper.
    The recipe: a teacher trained by cross entropy, then 20 epochs of SGD at a cosine lr of .05 with a strength of .15 to .25; the
    paper found .6 and more to do harm. Students: `KDLoss.from_hinton(0.9, 4.0)`.

    Args:
        strength: lambda; negative minimises the CMI.
        classes: C.
        temperature: T > 0, of the CMI term alone: q_T = softmax(z / T), and Q_T is the mean of q_T. CMI minimisation sums terms
            of several temperatures: one loss for each, the others with label_weight 0.
        label_weight: factor of the cross entropy, >= 0.
        reduction: "mean", "sum" or "none".

    Attributes:
        centroids: (C, C) float32 probabilities, row y of class y; NaN until the first `refresh_`.

    Raises:
        ValueError: an argument out of range.
    """

    centroids: Tensor

    def __init__(
        self,
        strength: float,
        classes: int,
        temperature: float = 1.0,
        *,
        label_weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        for name, value, good, allowed in (
            ("strength", strength, math.isfinite(strength), "a finite number"),
            ("classes", classes, classes >= 2, "at least 2"),
            ("temperature", temperature, 0 < temperature < math.inf, "a finite number > 0"),
            ("label_weight", label_weight, 0 <= label_weight < math.inf, "a finite number >= 0"),
            ("reduction", reduction, reduction in REDUCTIONS, f"one of {REDUCTIONS}"),
        ):
            if not good:
                raise ValueError(f"{name} = {value!r}: must be {allowed}")
        self.strength, self.temperature, self.label_weight = float(strength), float(temperature), float(label_weight)
        self.reduction = reduction
        self.register_buffer("centroids", torch.full((classes, classes), math.nan))

    @torch.no_grad()
    def refresh_(self, model: nn.Module, loader: Iterable[Any], group: dist.ProcessGroup | None = None) -> "CMILoss":
        """Make the centroids those of a model, in eval mode, over a pass of the loader, which yields (x, labels, ...).

        Where torch.distributed runs, sums go over all processes of the group: each passes its own part of the data.

        Raises:
            ValueError: a class without examples, whose centroid is not defined; labels that are no classes.
        """
        mode = model.training
        model.eval()
        try:
            device = self.centroids.device
            batches = ((model(x.to(device)), labels.to(device)) for x, labels, *_ in loader)
            found = class_centroids(batches, len(self.centroids), self.temperature, group)
        finally:
            model.train(mode)
        self.centroids.copy_(found)
        return self

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The reduced loss.

        Args:
            logits: (..., rows, C), float32, float64, bfloat16 or float16.
            target: (rows,) int64; every row needs its class.

        Raises:
            RuntimeError: there are no centroids yet.
            TypeError, ValueError, NonFiniteError: as `KDLoss`, of which a centroid is the teacher here.
        """
        if not self._ready():
            raise RuntimeError("centroids: there are none yet; must be made by refresh_(model, loader)")
        # whose softmax at temperature T they are, though they are means of tempered probabilities already
        centroids = self.centroids.log() * self.temperature
        return kd_energy(
            logits,
            target,
            centroids,
            prior="reverse_kl",
            prior_strength=-self.strength,
            teacher_by_label=True,
            temperature=self.temperature,
            label_weight=self.label_weight,
            reduction=self.reduction,
        )

    def _ready(self) -> bool:
        """Whether there are centroids; on a GPU, where a look would wait, the loss of a row without one is NaN."""
        return self.centroids.is_cuda or not bool(self.centroids[0, 0].isnan())

    def extra_repr(self) -> str:
        return f"strength={self.strength:g}, temperature={self.temperature:g}, label_weight={self.label_weight:g}"


@torch.no_grad()
def class_centroids(
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The mean of softmax(logits / T) over the examples of each class, (C, C) float64, summed over the group's processes.

    Args:
        batches: (logits (rows, C), labels (rows,) int64), any number of them.

    Raises:
        ValueError: no examples of a class, labels that are no classes, or logits of another width; on every process alike.
    """
    sums, counts, wrong = _sums(batches, classes, temperature)
    reduce_sum_(wrong, group)
    if wrong.item():
        raise ValueError(f"{int(wrong)} rows have labels that are no classes: must be in [0, {classes})")
    reduce_sum_(sums, group)
    reduce_sum_(counts, group)
    if (counts == 0).any():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"classes {empty} have no examples: a centroid is the mean of at least one")
    return sums / counts[:, None]


def conditional_mutual_information(logits: Tensor, labels: Tensor, centroids: Tensor | None = None) -> Tensor:
    """The CMI of (rows, C) logits, 0-dim float64: mean KL(P_i || Q^{y_i}), with their own centroids or with others.

    With other centroids Q' it is larger, by sum_y pi_y KL(Q^y || Q'^y). Every class of `labels` has a centroid of its own; a
    class without examples takes no part.

    Raises:
        ValueError: labels that are no classes.
    """
    classes = logits.shape[1]
    log_p = logits.double().log_softmax(1)
    if centroids is None:
        sums, counts, wrong = _sums([(logits, labels)], classes, 1.0)
        if wrong.item():
            raise ValueError(f"{int(wrong)} rows have labels that are no classes: must be in [0, {classes})")
        centroids = sums / counts.clamp_min(1)[:, None]
    log_centroids = centroids.double().log()[labels]
    divergences: Tensor = (log_p.exp() * (log_p - log_centroids)).sum(1)
    return divergences.mean()


def _sums(batches: Iterable[tuple[Tensor, Tensor]], classes: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sums (C, C) and counts (C,) of each class's distributions, float64, and the number of rows that are of none."""
    sums = counts = wrong = torch.zeros(0)
    for logits, labels in batches:
        if logits.dim() != 2 or logits.shape[1] != classes:
            raise ValueError(f"logits has shape {tuple(logits.shape)}: must be (rows, {classes})")
        if not len(sums):
            sums = torch.zeros(classes, classes, dtype=torch.float64, device=logits.device)
            counts, wrong = sums.new_zeros(classes), sums.new_zeros(1)
        good = (labels >= 0) & (labels < classes)
        wrong += (~good).sum()
        sums.index_add_(0, labels[good], (logits[good].double() / temperature).softmax(1))
        counts += torch.bincount(labels[good], minlength=classes)
    if not len(sums):  # this process has no rows
        sums, counts, wrong = (
            torch.zeros(classes, classes).double(),
            torch.zeros(classes).double(),
            torch.zeros(1).double(),
        )
    return sums, counts, wrong
