"""Ensemble distribution distillation: a student whose output is a Dirichlet over the draws' class probabilities.

Malinin, Mlodozeniec and Gales, *Ensemble Distribution Distillation*, ICLR 2020.
"""

import torch
from torch import Tensor

from bkd_fast.methods.posterior_expectation import Expectation, Uncertainty


class Dirichlet(Expectation):
    """A head of `PosteriorExpectation`: concentrations alpha = exp(output), fitted by maximum likelihood. Reads as alpha, (B, C).

    The likelihood of draws depends on the mean of log p alone, so that with memory the loss is that of all draws which met the
    point (g = log p).

    Args:
        smoothing: share of p that is spread evenly over the classes, in [0, 1): it keeps log p finite.

    Raises:
        ValueError: smoothing out of range.
    """

    def __init__(self, smoothing: float = 1e-4) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing = {smoothing}: must be in [0, 1)")
        self.smoothing = smoothing

    def width(self, num_classes: int) -> int:
        return num_classes

    def statistic(self, logits: Tensor) -> Tensor:
        return ((1 - self.smoothing) * logits.softmax(1) + self.smoothing / logits.shape[1]).log()

    def loss(self, g: Tensor, counts: Tensor | None, output: Tensor) -> Tensor:
        return dirichlet_nll(output, g)

    def read(self, output: Tensor) -> Tensor:
        return output.exp()


def dirichlet_nll(log_alpha: Tensor, mean_log_probs: Tensor) -> Tensor:
    """(...,) minus the mean log density of Dirichlet(alpha) at draws whose log p have that mean.

    -lnGamma(alpha_0) + sum_k lnGamma(alpha_k) - sum_k (alpha_k - 1) E log p_k, alpha_0 the sum: in float64, as large
    concentrations cancel.

    Args:
        log_alpha, mean_log_probs: (..., C).
    """
    alpha = log_alpha.double().exp()
    normaliser = torch.lgamma(alpha.sum(-1)) - torch.lgamma(alpha).sum(-1)
    return -(normaliser + ((alpha - 1) * mean_log_probs).sum(-1)).to(log_alpha.dtype)


def dirichlet_uncertainty(alpha: Tensor) -> Uncertainty:
    """What Dirichlet(alpha), alpha (N, C), says of its probabilities q: H(E q), E H(q), and their difference.

    E H(q) = sum_k (alpha_k / alpha_0) (psi(alpha_0 + 1) - psi(alpha_k + 1)). The difference is not negative but for rounding.
    """
    alpha = alpha.double()
    whole = alpha.sum(1, keepdim=True)
    mean = alpha / whole
    total = torch.special.entr(mean).sum(1)
    data = (mean * (torch.digamma(whole + 1) - torch.digamma(alpha + 1))).sum(1)
    return Uncertainty(total, data, total - data)
