"""Knowledge distillation as semiparametric inference: a teacher's probabilities corrected by the labels (Dao et al., ICLR 2021).

The teacher's p is a plug-in for the unknown p0 = P(y | x). Where it errs, the student learns the error; the label's residual
y - p has mean p0 - p and takes it out, to first order, at the price of the label's noise. How much of it is used is one number
c in [0, infinity], the paper's loss correction: with psi the scale of the target (identity or log),

    gamma = psi'(p) c / (c + (y - p)^2)     c = 0: none, the plug-in; c = infinity: psi'(p), the orthogonal one.
"""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from bkd_fast.posterior.inputs import check_classes, check_probabilities

Scale: TypeAlias = Literal["probs", "log_probs"]

C_VALUES = tuple(10.0**k for k in range(-5, 4))  # the paper's grid for c, chosen by cross-validation
TREE_CLIP = 1 / 500  # the paper's least p for forests of 500 trees, in which smaller votes are none
NETWORK_CLIP = 1e-2  # and for networks


def corrected_targets(
    probs: Tensor, labels: Tensor, *, scale: Scale = "log_probs", c: float = math.inf, clip: float = 0.0
) -> Tensor:
    """(N, C) targets psi(p) + gamma (y - p), class by class, for a student that learns by squared error.

    In p and y alone, with psi(p0) wanted, the mean squared error of such a target over y ~ p0 is, for a gamma that y does not
    change, (gamma (p0 - p) - (psi(p0) - psi(p)))^2 + gamma^2 p0 (1 - p0): a bias of second order in p0 - p for gamma = psi'(p),
    and the label's variance.

    Args:
        probs: (N, C) the teacher's p, from `cross_fit` where it was trained on these rows' labels too.
        labels: (N,) classes int64, or (N, C) probabilities.
        scale: psi, the identity or the logarithm.
        c: in [0, infinity], see above; by cross-validation over `C_VALUES`.
        clip: least p in [0, 1), `TREE_CLIP` or `NETWORK_CLIP`; a larger one bounds 1 / p. A clipped row sums to more than 1.

    Raises:
        ValueError: an argument out of range; a row of probabilities that is none, by its number; p = 0 on the log scale.
    """
    p, y = _checked(probs, labels, c, clip)
    if scale not in ("probs", "log_probs"):
        raise ValueError(f"scale = {scale!r}: must be 'probs' or 'log_probs'")
    if scale == "probs":
        return p + _share(y - p, c) * (y - p)
    return _positive(p).log() + _relative_residual(p, y, c)


def squared_error(outputs: Tensor, targets: Tensor, *, centred: bool = False) -> Tensor:
    """The mean over rows of sum_k (outputs_k - targets_k)^2 / 2, the paper's squared error on logits (Ba and Caruana, 2014).

    The paper compares the student's raw outputs, which then are log probabilities themselves. A softmax does not see a shift of
    all logits of a row: `centred` takes the best shift out of the difference.

    Args:
        outputs: (N, C) logits, or probabilities where the targets are.
        targets: (N, C) of `corrected_targets`.

    Raises:
        ValueError: shapes that differ.
    """
    if outputs.shape != targets.shape or outputs.ndim != 2:
        raise ValueError(
            f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}: both must be (N, C)"
        )
    difference = outputs - targets
    if centred:
        difference = difference - difference.mean(1, keepdim=True)
    return difference.square().sum(1).mean() / 2


def orthogonal_targets(
    probs: Tensor, labels: Tensor, *, temperature: float = 1.0, c: float = math.inf, clip: float = 0.0
) -> Tensor:
    """(N, C) signed soft targets a with which plain cross entropy is the corrected one.

    The distillation loss CE(w, q_T), w = p_T ~ p^(1/T), q_T = softmax(z / T), corrected to first order in p is

        CE(w, q_T) + sum_k (d CE / d p_k) (share of y_k - p_k that c leaves) = CE(a, q_T),
        a = w + (1/T) w (r - sum_j w_j r_j),    r = gamma (y - p), which for c = infinity is y / p - 1.

    a sums to one and may be negative: `KDLoss(0, signed_targets=True)(z / T, a)` is the energy, for which see there; at T = 1
    and c = infinity it is the label, a = y. As a function of z it is convex, its Hessian that of CE(w, q_T); below it is bounded
    only where a >= 0, so that rows with a < 0 lean on others or on a prior on the parameters.

    Args:
        probs, labels, c, clip: as `corrected_targets`, on the log scale.
        temperature: T > 0.

    Raises:
        ValueError: as `corrected_targets`; a temperature that is not a finite number > 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature!r}: must be a finite number > 0")
    p, y = _checked(probs, labels, c, clip)
    w = (_positive(p).log() / temperature).softmax(1)
    residual = _relative_residual(p, y, c)
    return w + w * (residual - (w * residual).sum(1, keepdim=True)) / temperature


def orthogonal_labels(
    probs: Tensor,
    labels: Tensor,
    *,
    prior_strength: float,
    temperature: float = 1.0,
    c: float = math.inf,
    clip: float = 0.0,
) -> Tensor:
    """(N, C) signed labels with which the energy of Bayesian distillation has the corrected teacher in the place of its own.

    The correction sums to zero, so the log normaliser of q_T drops out and it may stand in the label's term, whatever its
    temperature: with b these labels, p the teacher and a of `orthogonal_targets`,

        CE(b, q) + lambda CE(p_T, q_T) = CE(y, q) + lambda CE(a, q_T)    b = y + (lambda / T) (a - p_T).

    So `KDLoss(lambda, T, signed_targets=True)(z, b, teacher_probs=p)` is the energy with both terms, for training and sampling.

    Args:
        probs, labels, temperature, c, clip: as `orthogonal_targets`; p as it is in `teacher_probs`, not clipped.
        prior_strength: lambda >= 0; the label weight is 1.

    Raises:
        ValueError: as `orthogonal_targets`; a prior strength that is not a finite number >= 0.
    """
    if not 0 <= prior_strength < math.inf:
        raise ValueError(f"prior_strength = {prior_strength!r}: must be a finite number >= 0")
    corrected = orthogonal_targets(probs, labels, temperature=temperature, c=c, clip=clip)
    plain = (probs.log() / temperature).softmax(1)
    return _soft(labels, probs) + prior_strength / temperature * (corrected - plain)


def _checked(probs: Tensor, labels: Tensor, c: float, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped p and soft y, both (N, C) and like `probs`."""
    check_probabilities(probs)
    if not c >= 0:
        raise ValueError(f"c = {c!r}: must be in [0, infinity]")
    if not 0 <= clip < 1:
        raise ValueError(f"clip = {clip!r}: must be in [0, 1)")
    return probs.clamp(min=clip), _soft(labels, probs)


def _soft(labels: Tensor, probs: Tensor) -> Tensor:
    """Labels as (N, C) probabilities, like `probs`."""
    if labels.is_floating_point():
        if labels.shape != probs.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}: must be {tuple(probs.shape)}, as probs")
        check_probabilities(labels)
        return labels.to(probs)
    check_classes("labels", labels, probs)
    return torch.nn.functional.one_hot(labels.long(), probs.shape[1]).to(probs)


def _positive(p: Tensor) -> Tensor:
    if not (p > 0).all():
        row, column = (p <= 0).nonzero()[0].tolist()
        raise ValueError(f"probs[{row}, {column}] = 0 has no logarithm: clip must be > 0")
    return p


def _share(residual: Tensor, c: float) -> Tensor:
    """c / (c + residual^2) for c in [0, infinity]."""
    return torch.zeros_like(residual) if c == 0 else 1 / (1 + residual.square() / c)


def _relative_residual(p: Tensor, y: Tensor, c: float) -> Tensor:
    """gamma (y - p) on the log scale."""
    return _share(y - p, c) * (y - p) / p
