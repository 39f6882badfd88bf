"""Every score of a predictive distribution that no library has right, in one place.

Log loss, the Brier score and AUROC of errors are scikit-learn's; nothing here repeats them.
"""

from bkd_fast.posterior.calibration import ReliabilityBins, classwise_calibration_error, reliability_bins
from bkd_fast.posterior.coverage import (
    CellCoverage,
    IntervalCoverage,
    averaged_deviance_coverage,
    deviance_coverage,
    interval_coverage,
)
from bkd_fast.posterior.selective import (
    OODDetection,
    RiskCoverage,
    ood_detection,
    rank_correlation,
    risk_coverage,
)
from bkd_fast.posterior.votes import VoteDivergence, VotePIT, vote_divergence, vote_frequencies, vote_pit

__all__ = [
    "CellCoverage",
    "IntervalCoverage",
    "OODDetection",
    "ReliabilityBins",
    "RiskCoverage",
    "VoteDivergence",
    "VotePIT",
    "averaged_deviance_coverage",
    "classwise_calibration_error",
    "deviance_coverage",
    "interval_coverage",
    "ood_detection",
    "rank_correlation",
    "reliability_bins",
    "risk_coverage",
    "vote_divergence",
    "vote_frequencies",
    "vote_pit",
]
