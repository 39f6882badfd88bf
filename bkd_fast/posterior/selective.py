"""What a score of uncertainty is worth as a ranking: of errors, of unknown inputs, and beside a reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bkd_fast.posterior.inputs import check_pairs, check_scores


@dataclass(frozen=True)
class RiskCoverage:
    """The error rate among the predictions that remain when the most uncertain ones are refused.

    coverage: (N,) float64, k / N for k = 1..N kept predictions.
    risk: (N,) float64, error rate among the k most certain; tied scores count by their expectation over random order.
    best_area: the area that the best ranking of the same errors would have, exactly.
    """

    coverage: Tensor
    risk: Tensor
    best_area: float

    @property
    def area(self) -> float:
        """AURC, the mean risk over all coverages (Geifman, Uziel and El-Yaniv, ICLR 2019); lower is better."""
        return float(self.risk.mean())

    @property
    def excess_area(self) -> float:
        """E-AURC = AURC - `best_area` (same paper): what the ranking costs, without what the errors do; 0 is perfect.

        The paper approximates `best_area` by r + (1 - r) log(1 - r), r the error rate; this is exact at any N and loss.
        """
        return self.area - self.best_area

    @property
    def random_area(self) -> float:
        """The expected AURC of a ranking that knows nothing: the mean error."""
        return float(self.risk[-1])


@dataclass(frozen=True)
class OODDetection:
    """How well a score tells out-of-distribution inputs from in-distribution ones.

    auroc: the probability that an out-of-distribution input has the larger score, ties counting one half.
    aupr: average precision with out-of-distribution as the positive class; chance is the fraction of such inputs.
    fpr_at_95_tpr: the fraction of out-of-distribution inputs that are accepted when 95 % of the in-distribution ones are.
    """

    auroc: float
    aupr: float
    fpr_at_95_tpr: float


def risk_coverage(score: Tensor, error: Tensor) -> RiskCoverage:
    """Selective prediction by any score of uncertainty.

    Args:
        score: (N,), larger is less certain (mean deviance, entropy, 1 - confidence).
        error: (N,), the loss of each prediction; 1 for wrong and 0 for right makes the risk an error rate.

    Raises:
        ValueError: shapes disagree, there is no prediction, or a score or an error is NaN.
    """
    check_pairs("score", score, "error", error)
    error = error.double()
    _, group, size = torch.unique(score, return_inverse=True, return_counts=True)
    mean_error = torch.bincount(group, weights=error) / size
    kept = torch.arange(1, len(score) + 1, dtype=torch.float64, device=score.device)
    risk = torch.repeat_interleave(mean_error, size).cumsum(0) / kept
    best = error.sort().values.cumsum(0) / kept
    return RiskCoverage(kept / len(score), risk, float(best.mean()))


def ood_detection(in_distribution: Tensor, out_of_distribution: Tensor) -> OODDetection:
    """AUROC, AUPR and FPR at 95 % TPR of a score of uncertainty as a detector. Needs scikit-learn.

    AUROC is the same whichever class is called positive; for the other two the name must say it. AUPR is "AUPR-out"
    (Hendrycks and Gimpel, ICLR 2017). For the FPR, in-distribution is positive (Liang et al., ODIN, ICLR 2018, section 4.3);
    Hendrycks et al. (Outlier Exposure, ICLR 2019) call out-of-distribution positive there: false alarms when 95 % of such inputs
    are found, another number. Inputs with the threshold's score are all accepted, so ties never flatter.

    Args:
        in_distribution: (N,) scores, larger is less certain.
        out_of_distribution: (M,) scores.

    Raises:
        ValueError: a tensor is not one-dimensional, is empty, or holds NaN.
    """
    check_scores("in_distribution", in_distribution)
    check_scores("out_of_distribution", out_of_distribution)
    from sklearn.metrics import average_precision_score, roc_auc_score

    known, unknown = in_distribution.double(), out_of_distribution.double()
    # ranks instead of scores: the figures depend on nothing else, and scikit-learn refuses infinite scores
    rank = torch.unique(torch.cat([known, unknown]), return_inverse=True)[1].cpu().numpy()
    positive = torch.arange(len(rank)).numpy() >= len(known)
    threshold = known.sort().values[-(-19 * len(known) // 20) - 1]
    return OODDetection(
        auroc=float(roc_auc_score(positive, rank)),
        aupr=float(average_precision_score(positive, rank)),
        fpr_at_95_tpr=float((unknown <= threshold).double().mean()),
    )


def rank_correlation(score: Tensor, reference: Tensor) -> float:
    """Spearman's correlation in [-1, 1] of a score with a reference, such as the entropy of human votes. Needs SciPy.

    Tied values share their mean rank.

    Args:
        score, reference: (N,), N >= 2.

    Raises:
        ValueError: shapes disagree, there are fewer than two rows, a value is NaN, or one of them is constant.
    """
    check_pairs("score", score, "reference", reference)
    for name, values in (("score", score), ("reference", reference)):
        if bool((values == values[0]).all()):
            raise ValueError(
                f"{name}: all {len(values)} values are {float(values[0]):.6g}; a constant has no correlation"
            )
    from scipy.stats import spearmanr

    return float(spearmanr(score.double().cpu().numpy(), reference.double().cpu().numpy()).statistic)
