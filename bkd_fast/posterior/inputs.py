"""What the metrics ask of probabilities, classes, scores and levels: each check raises ValueError."""

import torch
from torch import Tensor


def check_probabilities(probs: Tensor) -> None:
    """(N, C), N >= 1, every row non-negative with a sum of 1 within 1e-3 (float32 and float16 round)."""
    if probs.ndim != 2 or len(probs) == 0:
        raise ValueError(f"probabilities have shape {tuple(probs.shape)}: must be (N, C) with N >= 1")
    total = probs.double().sum(dim=1)
    bad = (probs < 0).any(dim=1) | ~torch.isclose(total, torch.ones_like(total), atol=1e-3)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"probabilities in row {row}: must be >= 0 and sum to 1; they sum to {float(total[row]):.6g}")


def check_classes(name: str, classes: Tensor, cells: Tensor) -> None:
    """(N,) integers in [0, C), one for each row of cells (N, C)."""
    if classes.shape != cells.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(classes.shape)}: must be ({len(cells)},), one class for each row")
    if classes.is_floating_point() or bool((classes < 0).any()) or bool((classes >= cells.shape[1]).any()):
        raise ValueError(
            f"{name} of {classes.dtype} in [{classes.min()}, {classes.max()}]: must be integers in [0, {cells.shape[1]})"
        )


def check_predictions(probs: Tensor, labels: Tensor) -> None:
    """Probabilities (N, C) and a label for each row."""
    check_probabilities(probs)
    check_classes("labels", labels, probs)


def check_scores(name: str, score: Tensor) -> None:
    """(N,), N >= 1, without NaN."""
    if score.ndim != 1 or len(score) == 0:
        raise ValueError(f"{name} has shape {tuple(score.shape)}: must be (N,) with N >= 1")
    if torch.isnan(score).any():
        raise ValueError(f"{name}: {int(torch.isnan(score).sum())} of {len(score)} values are NaN, which have no rank")


def check_pairs(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Two scores of the same N rows."""
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} has shape {tuple(first.shape)} and {second_name} {tuple(second.shape)}: both must be (N,)"
        )
    check_scores(first_name, first)
    check_scores(second_name, second)


def check_level(level: float) -> None:
    """A credible interval's level."""
    if not 0 < level < 1:
        raise ValueError(f"level = {level!r}: must be in (0, 1)")
