"""The posterior predictive's update in NumPy float64, one row at a time, as its definition reads."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkd_fast.ops.predictive import SMALLEST_REFERENCE, PredictiveState
from bkd_fast.ops.reference.sketch import Row
from bkd_fast.ops.registry import implements
from bkd_fast.ops.sketch import CODE_MAX, CODE_MIN, CODES_PER_UNIT

Floats = NDArray[np.float64]


def softmax_and_logits(z: Floats) -> tuple[Floats, Floats]:
    """Probabilities and their logits z_c - logsumexp of the other classes, over the last axis."""
    d = z - z.max(-1, keepdims=True)
    e = np.exp(d)
    top = d == 0
    rest = np.where(top, 0, e).sum(-1, keepdims=True)
    ties = top.sum(-1, keepdims=True)
    others = np.where(top, rest + (ties - 1), rest + ties - e)  # total - 1 would cancel
    with np.errstate(divide="ignore"):
        return e / (rest + ties), d - np.log(others)


def codes_of(logits: Floats) -> NDArray[np.int64]:
    """rint(1024 logit), saturated to int16."""
    return np.clip(np.rint(CODES_PER_UNIT * logits), CODE_MIN, CODE_MAX).astype(np.int64)


def entropy_of(p: Floats) -> Floats:
    """In nats, over the last axis."""
    entropy: Floats = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    return entropy


def divergence_of(p: Floats, reference: Floats) -> Floats:
    """KL(p || reference) with its linear terms, p log(p / r) - p + r: exact in differences for any positive r."""
    divergence: Floats = (p * np.log(np.where(p > 0, p, 1) / reference) - p + reference).sum(-1)
    return divergence


def is_valid(z: NDArray[np.float32]) -> NDArray[np.bool_]:
    """No NaN, no +inf, and something finite, over the last axis."""
    return np.logical_not((np.isnan(z) | np.isposinf(z)).any(-1)) & np.isfinite(z).any(axis=-1)


@implements("predictive_update_", "reference")
def predictive_update_(
    logits: Tensor, rows: Tensor, batch: Tensor, state: PredictiveState, picked: Tensor, codes: Tensor, valid: Tensor
) -> None:
    for place, (r, b) in enumerate(zip(rows.tolist(), batch.tolist(), strict=True)):
        draws = logits[:, b].numpy()
        counted = is_valid(draws)
        if picked.shape[1]:
            valid[:, place] = torch.from_numpy(counted)
        z = draws[counted].astype(np.float64)
        state.invalid[r] += len(draws) - len(z)
        if not len(z):
            continue
        p, logit = softmax_and_logits(z)
        coded = codes_of(logit)
        if picked.shape[1]:
            codes[valid[:, place], place] = torch.from_numpy(coded[:, picked[r].numpy()]).to(torch.int16)
        count = int(state.tiles.counts[r])
        if len(state.tiles.counters):
            Row(state.tiles, r).add(coded)

        classes = state.tiles.row_cells
        cells = torch.arange(r * classes, (r + 1) * classes)
        before, n = state.mean[cells].double().numpy(), count + len(z)
        shift = before if count else p[0]
        total, squares = (p - shift).sum(0), ((p - shift) ** 2).sum(0)
        mean = shift + total / n
        m2 = state.m2[cells].double().numpy() + squares - total**2 / n
        state.mean[cells] = torch.from_numpy(mean).float()
        state.m2[cells] = torch.from_numpy(m2).float()
        if count == 0:
            state.reference[cells] = torch.from_numpy(mean).float().clamp_min(SMALLEST_REFERENCE)
        reference = state.reference[cells].double().numpy()
        state.entropy[r] += float(entropy_of(p).sum())
        state.divergence[r] += float(divergence_of(p, reference).sum())
        state.tiles.counts[r] = n
