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

UNLABELLED = -100  # the label of a row that takes no part, as torch's losses have it


class CMILoss(nn.Module):
    """label_weight CE(y, q) - strength KL(q_T || Q_T^y) per example, value and gradient in one pass over the logits.

    That is a reverse KL prior of negative strength whose teacher is the centroid of each row's class, which the kernel looks up.
    The centroids are data: frozen after one `refresh_`, as in the released code, or refreshed every epoch, as in the paper.
    The recipe: a teacher trained by cross entropy, then 20 epochs of SGD at a cosine lr of .05 with a strength of .15 to .25; the
    paper found .6 and more to do harm. Students: `KDLoss.from_hinton(0.9, 4.0)`.

    Args:
        strength: lambda; negative minimises the CMI.
        classes: C.
        temperature: T > 0, of the CMI term alone: q_T = softmax(z / T), and Q_T is the mean of q_T. CMI minimisation has the term
            at many temperatures: one loss for each, all but one with label_weight 0; how its paper weighs them is not in here.
        label_weight: factor of the cross entropy, >= 0.
        reduction: "mean" over all rows, labelled or not, "sum" or "none".

    Attributes:
        centroid_logits: (C, C) float32, T log Q_T^y in row y, which keeps centroids of any size; NaN until the first `refresh_`.

    Raises:
        ValueError: an argument out of range.
    """

    centroid_logits: Tensor

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
        self.register_buffer("centroid_logits", torch.full((classes, classes), math.nan))

    @property
    def centroids(self) -> Tensor:
        """(C, C) probabilities, row y of class y."""
        return (self.centroid_logits / self.temperature).softmax(1)

    @torch.no_grad()
    def refresh_(self, model: nn.Module, loader: Iterable[Any], group: dist.ProcessGroup | None = None) -> "CMILoss":
        """Make the centroids those of a model, in eval mode, over a pass of the loader, which yields (x, labels, ...).

        Where torch.distributed runs, sums go over all processes of the group: each passes its own part of the data.

        Raises:
            ValueError: as `class_centroids`.
        """
        modes = [(module, module.training) for module in model.modules()]
        device = next(model.parameters(), self.centroid_logits).device
        batches = ((model(x.to(device)), labels.to(device)) for x, labels, *_ in loader)
        model.eval()
        try:
            found = class_centroids(batches, len(self.centroid_logits), self.temperature, group, device)
        finally:
            for module, training in modes:
                module.training = training
        self.centroid_logits.copy_(found.log() * self.temperature)
        return self

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The reduced loss.

        Args:
            logits: (..., rows, C), float32, float64, bfloat16 or float16.
            target: (rows,) int64: classes, or -100 for a row that has neither term.

        Raises:
            RuntimeError: there are no centroids yet. On a GPU, where a look would wait, `bkd_fast.ops.faults.check_faults` tells.
            TypeError, ValueError, NonFiniteError: as `KDLoss`, of which a centroid is the teacher here.
        """
        if not (self.centroid_logits.is_cuda or torch.compiler.is_compiling()) and self.centroid_logits[0, 0].isnan():
            raise RuntimeError("centroids: there are none yet; must be made by refresh_(model, loader)")
        return kd_energy(
            logits,
            target,
            self.centroid_logits,
            prior="reverse_kl",
            prior_strength=-self.strength,
            teacher_by_label=True,
            temperature=self.temperature,
            label_weight=self.label_weight,
            ignore_index=UNLABELLED,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"strength={self.strength:g}, temperature={self.temperature:g}, label_weight={self.label_weight:g}"


@torch.no_grad()
def class_centroids(
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The mean of softmax(logits / T) over the examples of each class, (C, C) float64, summed over the group's processes.

    Args:
        batches: (logits (rows, C), labels (rows,) int64), any number of them; rows of label -100 take no part.
        device: of the sums; None: the first batch's. A process that may have no batch names the one its group talks from.

    Raises:
        ValueError: no examples of a class, or labels that are no classes: on every process alike. Logits of another width.
    """
    sums, counts, wrong = _sums(batches, classes, temperature, device)
    for each in (sums, counts, wrong):
        reduce_sum_(each, group)
    _refuse(int(wrong), classes)
    if (counts == 0).any():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"classes {empty} have no examples: a centroid is the mean of at least one")
    return sums / counts[:, None]


def conditional_mutual_information(logits: Tensor, labels: Tensor, centroids: Tensor | None = None) -> Tensor:
    """The CMI of (rows, C) logits, 0-dim float64: mean KL(P_i || Q^{y_i}), with their own centroids or with others (C, C).

    With other centroids Q' it is larger, by sum_y pi_y KL(Q^y || Q'^y). Rows of label -100 take no part; a class without
    examples needs no centroid.

    Raises:
        ValueError: labels that are no classes, centroids of another shape.
    """
    classes = logits.shape[1]
    if centroids is not None and centroids.shape != (classes, classes):
        raise ValueError(f"centroids has shape {tuple(centroids.shape)}: must be {(classes, classes)}")
    logits, labels = logits[labels != UNLABELLED], labels[labels != UNLABELLED]
    _refuse(int(_outside(labels, classes).sum()), classes)
    if centroids is None:
        sums, counts, _ = _sums([(logits, labels)], classes, 1.0, None)
        centroids = sums / counts[:, None]
    log_p, log_centroids = logits.double().log_softmax(1), centroids.double().log()[labels]
    p = log_p.exp()
    divergences: Tensor = torch.where(p > 0, p * (log_p - log_centroids), 0.0).sum(1)
    return divergences.mean()


def _outside(labels: Tensor, classes: int) -> Tensor:
    return (labels < 0) | (labels >= classes)


def _refuse(wrong: int, classes: int) -> None:
    if wrong:
        raise ValueError(f"{wrong} rows have labels that are no classes: must be in [0, {classes}), or {UNLABELLED}")


def _sums(
    batches: Iterable[tuple[Tensor, Tensor]], classes: int, temperature: float, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums (C, C) and counts (C,) of each class's distributions, float64, and the number of rows whose labels are none."""
    sums = torch.zeros(classes, classes, dtype=torch.float64, device=device)
    counts, wrong = sums.new_zeros(classes), sums.new_zeros(1)
    for logits, labels in batches:
        if logits.dim() != 2 or logits.shape[1] != classes:
            raise ValueError(f"logits has shape {tuple(logits.shape)}: must be (rows, {classes})")
        if device is None:
            device = logits.device
            sums, counts, wrong = sums.to(device), counts.to(device), wrong.to(device)
        outside = _outside(labels, classes)
        wrong += (outside & (labels != UNLABELLED)).sum()
        p, mine = (logits.double() / temperature).softmax(1)[~outside], labels[~outside]
        sums.index_add_(0, mine, p)
        counts += torch.bincount(mine, minlength=classes)
    return sums, counts, wrong
