"""The Brier score as a loss, for teachers whose probabilities are to be distilled."""

from torch import Tensor
from torch.nn import functional


def brier_loss(logits: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """`sum_k (q_k - y_k)^2`, q = softmax(z): a proper score (Brier, 1950), in [0, 2] for hard labels.

    Its minimum over q is the expected label, as cross entropy's is, but no single example costs more than 2. The gradient with
    respect to logits is `2 q * (s - sum_k q_k s_k)` with s = q - y. It is no log likelihood: a chain on it samples a Gibbs
    posterior, not a Bayesian one.

    Args:
        logits: (rows, classes).
        target: classes (rows,) int64, or probabilities (rows, classes).
        reduction: "mean" over rows, "sum", or "none" for (rows,).

    Raises:
        ValueError: shapes that do not agree, classes out of range, an unknown reduction.
    """
    classes = logits.shape[-1]
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction = {reduction!r}: must be 'mean', 'sum' or 'none'")
    if target.shape not in (logits.shape, logits.shape[:-1]):
        raise ValueError(
            f"target has shape {tuple(target.shape)}: must be {tuple(logits.shape[:-1])} or {tuple(logits.shape)}"
        )
    if target.dim() < logits.dim():
        if bool(((target < 0) | (target >= classes)).any()):
            raise ValueError(f"target has classes from {target.min()} to {target.max()}: must be in [0, {classes})")
        target = functional.one_hot(target, classes).to(logits.dtype)
    found = (logits.softmax(-1) - target).square().sum(-1)
    if reduction == "none":
        return found
    return found.mean() if reduction == "mean" else found.sum()
