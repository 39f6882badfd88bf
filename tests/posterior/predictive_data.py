"""Streams of logits that quantile sketches find hard, and the exact answers in float64."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KINDS = ("iid", "ar.9", "ar.99", "sorted", "drifting", "bimodal", "constant", "outliers", "masked", "huge", "invalid")


def autoregressive(noise: NDArray[np.float64], phi: float) -> NDArray[np.float64]:
    """A stationary AR(1) stream of unit variance along axis 0."""
    out = noise.copy()
    for s in range(1, len(out)):
        out[s] = phi * out[s - 1] + np.sqrt(1 - phi**2) * noise[s]
    return out


def stream(kind: str, draws: int, rows: int, classes: int, seed: int) -> Tensor:
    """float32 logits (draws, rows, classes)."""
    generator = np.random.default_rng(seed)
    center = 2 * generator.normal(size=(rows, classes))
    width = 0.2 + np.abs(generator.normal(size=(rows, classes)))
    z = generator.normal(size=(draws, rows, classes))
    if kind.startswith("ar"):
        z = autoregressive(z, float(kind[2:]))
    elif kind == "sorted":
        z = np.sort(z, axis=0)
    elif kind == "drifting":
        z += np.linspace(-8, 8, draws)[:, None, None]
    elif kind == "bimodal":
        z = 0.1 * z + 6 * (generator.random(z.shape) < 0.3)
    elif kind == "constant":
        z = np.zeros_like(z)
    elif kind == "outliers":
        z += 25 * (generator.random(z.shape) < 0.01)
    elif kind == "huge":
        z *= 10.0 ** generator.integers(0, 5, size=z.shape)
    z = center + width * z
    if kind == "masked":
        z[:, :, 0] = -np.inf
        z[generator.random(z.shape) < 0.1] = -np.inf
        z[:, :, -1] = 0.5
    out = torch.from_numpy(z).float()
    if kind == "invalid":
        spoiled = torch.from_numpy(generator.random(z.shape[:2]) < 0.1)
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.from_numpy(generator.integers(0, 3, z.shape[:2]))]
        out[spoiled] = bad[spoiled][:, None]
        out[spoiled, 0] = torch.where(bad[spoiled] == -torch.inf, -torch.inf, out[spoiled, 0])
    return out


def exact(logits: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p and logit(p) in float64, (draws, rows, classes); NaN in invalid rows."""
    z = logits.double().numpy()
    valid = ~(np.isnan(z) | np.isposinf(z)).any(-1) & np.isfinite(z).any(-1)
    z = np.where(valid[..., None], z, 0)
    d = z - z.max(-1, keepdims=True)
    e = np.exp(d)
    order = np.argsort(e, axis=-1)
    others = np.empty_like(e)  # sums without one class, smallest terms first: nothing cancels
    for c in range(z.shape[-1]):
        others[..., c] = np.where(order == c, 0, np.take_along_axis(e, order, -1)).sum(-1)
    with np.errstate(divide="ignore"):
        logit = d - np.log(others)
    p = e / e.sum(-1, keepdims=True)
    p[~valid], logit[~valid] = np.nan, np.nan
    return p, logit


def order_statistic(values: NDArray[np.float64], q: float) -> NDArray[np.float64]:
    """The value of rank ceil(q n) along axis 0, NaN left out."""
    n = (~np.isnan(values)).sum(0)
    rank = np.clip(np.ceil(q * n).astype(int), 1, np.maximum(n, 1))
    return np.take_along_axis(np.sort(values, axis=0), rank[None] - 1, axis=0)[0]  # NaN sorts last
