"""The KD energy as it is written down: plain torch in float64, the energy by definition, the gradient in closed form.

`energy_of` is differentiable, so that autograd can judge the closed forms, here and in every other backend.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bkd_fast.ops.kd import Problem
from bkd_fast.ops.registry import implements
from bkd_fast.ops.topk import TopKLogits

INFINITY = float("inf")


def _log_softmax(logits: Tensor) -> Tensor:
    """log_softmax over the last dimension whose masked classes (-inf) get no gradient instead of NaN."""
    return logits - torch.logsumexp(logits, -1, keepdim=True)


def _expectation(weight: Tensor, value: Tensor) -> Tensor:
    """sum_k weight_k value_k where a weight of 0 takes nothing, not even of an infinite value."""
    return torch.where(weight != 0, weight * torch.where(weight != 0, value, 0.0), 0.0).sum(-1)


def _teacher_log_probs(p: Problem) -> Tensor:
    """log p_T, (teachers, rows, classes)."""
    assert p.teacher is not None
    teacher = p.teacher.double()
    return _log_softmax((teacher.log() if p.teacher_is_probs else teacher) / p.temperature)


def _log_mixture_weights(p: Problem, entropies: Tensor) -> Tensor:
    """log w of each teacher and row, from the weights given or from the teachers' entropies, both (teachers, rows)."""
    if p.weights is not None:
        weights = p.weights.T if p.weights.dim() == 2 else p.weights[:, None]
        return weights.expand_as(entropies).log()
    total = entropies.sum(0)
    even = (total <= 0) | (len(entropies) == 1)
    weights = torch.where(even, 1.0, 1.0 - entropies / torch.where(even, 1.0, total))
    return (weights / weights.sum(0)).log()


def _mixture_scores(p: Problem, log_q: Tensor) -> Tensor:
    """log (w_m Dir(q; 1 + lambda p_m)), (teachers, chains, rows)."""
    log_p = _teacher_log_probs(p)
    probabilities, strength, classes = log_p.exp(), p.prior_strength, log_q.shape[-1]
    log_weights = _log_mixture_weights(p, -_expectation(probabilities, log_p))
    normalisers = torch.lgamma(torch.tensor(classes + strength, dtype=torch.float64)) - torch.lgamma(
        1 + strength * probabilities
    ).sum(-1)
    cross = torch.stack([_expectation(teacher.expand_as(log_q), log_q) for teacher in probabilities])
    return (log_weights + normalisers)[:, None] + strength * cross


def _smoothed_target(p: Problem) -> Tensor | None:
    """y', (chains, rows, classes); rows of 0 where there is no label."""
    if p.label_weight == 0 or (p.labels is None and p.soft is None):
        return None
    logits = p.logits.double()
    unmasked = (logits > -INFINITY).double()
    even = unmasked / unmasked.sum(-1, keepdim=True)
    if p.soft is not None:
        return (1 - p.label_smoothing) * p.soft.double() + p.label_smoothing * even
    assert p.labels is not None
    labelled = p.labels != p.ignore_index
    one_hot = torch.nn.functional.one_hot(torch.where(labelled, p.labels, 0), logits.shape[-1]).double()
    return ((1 - p.label_smoothing) * one_hot + p.label_smoothing * even) * labelled[:, None]


def energy_of(p: Problem, logits: Tensor) -> Tensor:
    """Energies (chains, rows) of float64 `logits` (chains, rows, classes), by definition; differentiable."""
    energy = torch.zeros(logits.shape[:-1], dtype=torch.float64)
    target = _smoothed_target(p)
    if target is not None:
        energy = energy - p.label_weight * _expectation(target, _log_softmax(logits))
    if p.prior == "none":
        return energy
    log_q = _log_softmax(logits / p.temperature)
    if p.prior == "mixture":
        return energy - torch.logsumexp(_mixture_scores(p, log_q), 0)
    log_p = _teacher_log_probs(p)[0].expand_as(log_q)
    if p.prior == "dirichlet":
        return energy - p.prior_strength * _expectation(log_p.exp(), log_q)
    if p.prior == "continuous_categorical":
        return energy - p.prior_strength * _expectation(log_q.exp(), log_p)
    possible = log_q > -INFINITY
    return energy + p.prior_strength * _expectation(log_q.exp(), log_q - torch.where(possible, log_p, 0.0))


def _gradient_of(p: Problem, logits: Tensor) -> Tensor:
    """d energy / d logits in closed form (csrc/kd.h derives it)."""
    gradient = torch.zeros_like(logits)
    target = _smoothed_target(p)
    if target is not None:
        q = torch.softmax(logits, -1)
        gradient += p.label_weight * (target.sum(-1, keepdim=True) * q - target)
    if p.prior == "none":
        return gradient
    factor = p.prior_strength / p.temperature
    log_q, log_p = _log_softmax(logits / p.temperature), _teacher_log_probs(p)
    q = log_q.exp()
    if p.prior == "mixture":
        responsibility = torch.softmax(_mixture_scores(p, log_q), 0)
        return gradient + factor * (q - torch.einsum("mcr,mrk->crk", responsibility, log_p.exp()))
    if p.prior == "dirichlet":
        return gradient + factor * (q - log_p[0].exp())
    slope = -log_p[0] if p.prior == "continuous_categorical" else log_q - log_p[0]
    slope = torch.where(q > 0, slope, 0.0)
    return gradient + factor * q * (slope - (q * slope).sum(-1, keepdim=True))


def _dense(p: Problem) -> Problem:
    """The same with a teacher of all rows and classes, a harmless one where a row has none."""
    classes = p.logits.shape[-1]
    if p.teacher_by_label and p.teacher is not None and p.labels is not None:
        own = p.teacher[:, p.labels.clamp(0, classes - 1)]
        return replace(p, teacher=torch.where(p.labels[:, None] != p.ignore_index, own, 1 / classes))
    if p.teacher is None or p.indices is None or p.rest is None:
        return p
    indices = torch.where(_outside(p.indices, classes), 0, p.indices)
    teacher = TopKLogits(p.teacher[0], indices, p.rest).dense(classes)
    return replace(p, teacher=teacher[None], indices=None, rest=None)


def _outside(indices: Tensor, classes: int) -> Tensor:
    return (indices < 0) | (indices >= classes)


def _faults(p: Problem) -> list[tuple[str, Tensor]]:
    """Every fault with the rows (chains, rows) that have it, in the order in which they are looked for."""
    chains, rows, classes = p.logits.shape
    found: list[tuple[str, Tensor]] = []

    def look(fault: str, bad: Tensor) -> None:
        found.append((fault, bad.expand(chains, rows)))

    def not_probabilities(values: Tensor, tolerance: float) -> Tensor:
        values = values.double()
        return ~((values >= 0).all(-1) & ((values.sum(-1) - 1).abs() <= tolerance))

    masked = p.logits == -INFINITY
    if p.labels is not None:
        look("target_out_of_range", _outside(p.labels, classes) & (p.labels != p.ignore_index))
    if p.indices is not None:
        look("teacher_index_out_of_range", _outside(p.indices, classes).any(-1))
        ordered = p.indices.sort(-1).values
        look("teacher_index_repeated", (ordered[:, 1:] == ordered[:, :-1]).any(-1))
    p = _dense(p)
    look("logits_not_finite", (p.logits.isnan() | (p.logits == INFINITY)).any(-1))
    look("logits_all_masked", masked.all(-1))
    if p.teacher is not None:
        if p.teacher_is_probs:
            look("teacher_not_probabilities", not_probabilities(p.teacher, p.tolerance_teacher).any(0))
        else:
            look("teacher_not_finite", (p.teacher.isnan() | (p.teacher == INFINITY)).any(-1).any(0))
            look("teacher_all_masked", (p.teacher == -INFINITY).all(-1).any(0))
        log_p = _teacher_log_probs(p)
        if p.prior in ("dirichlet", "mixture"):
            look("teacher_on_masked_class", ((log_p.exp() > 0).any(0) & masked).any(-1))
        else:
            look("teacher_excludes_class", ((log_p[0] == -INFINITY) & ~masked).any(-1))
    if p.weights is not None:
        look("weights_not_probabilities", not_probabilities(p.weights, p.tolerance_teacher))
    if p.label_weight != 0 and p.soft is not None:
        if p.signed_target:
            soft = p.soft.double()
            allowed = p.tolerance_target * soft.abs().sum(-1).clamp_min(1)
            good = soft.isfinite().all(-1) & ((soft.sum(-1) - 1).abs() <= allowed)
            look("target_sum_not_one", ~good)
        else:
            look("target_not_probabilities", not_probabilities(p.soft, p.tolerance_target))
        look("target_on_masked_class", ((p.soft != 0) & masked).any(-1))
    if (p.label_weight != 0 or p.teacher_by_label) and p.labels is not None:
        one_hot = (torch.arange(classes) == p.labels[:, None]) & (p.labels != p.ignore_index)[:, None]
        look("target_on_masked_class", (one_hot & masked).any(-1))
    return found


@implements("kd_energy", "reference")
def kd_energy(p: Problem) -> tuple[Tensor | float, Tensor, int, str]:
    """See `bkd_fast.ops.kd.Problem`."""
    faults = _faults(p)
    bad = torch.stack([rows for _, rows in faults]).any(0).flatten()
    bad_row, fault = -1, ""
    if bad.any():
        bad_row = int(bad.int().argmax())
        fault = next(name for name, rows in faults if rows.flatten()[bad_row])
        return 0.0, torch.empty_like(p.logits), bad_row, fault
    p, logits = _dense(p), p.logits.double()
    energy, gradient = energy_of(p, logits), p.scale * _gradient_of(p, logits)
    if p.teacher_by_label and p.labels is not None:  # a row without a label has neither term
        labelled = p.labels != p.ignore_index
        energy, gradient = energy * labelled, gradient * labelled[:, None]
    gradient = gradient.to(p.logits.dtype)
    return p.total_factor * float(energy.sum()) if p.summed else energy.to(p.accumulator), gradient, bad_row, fault
