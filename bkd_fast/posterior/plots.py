"""Figures of a posterior predictive, and the pieces of them that reports draw with."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bkd_fast.errors import MissingLibraryError
from bkd_fast.posterior.calibration import ReliabilityBins, reliability_bins
from bkd_fast.posterior.selective import risk_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bkd_fast.posterior.predictive import PosteriorPredictive

BLUE, ORANGE, FAINT = "#0072b2", "#d55e00", "#b5b5b5"  # of Okabe and Ito's palette
FEW = 10  # bins with fewer examples are drawn hollow and unconnected
LEVEL = 0.95
SHOWN = 8  # rows, and classes of each, where nothing else is asked for


class Plots:
    """Figures of a posterior, as `posterior.plot`. Each gives a matplotlib Figure, which notebooks show and `savefig` writes."""

    def __init__(self, posterior: "PosteriorPredictive") -> None:
        self.posterior = posterior

    def intervals(self, rows: Tensor | None = None, level: float = LEVEL) -> "Figure":
        """Class probabilities of some rows with their credible intervals, the most probable of the tracked classes first.

        Args:
            rows: int64 ids; None: the least certain rows by mean deviance, the least certain first.
            level: of the equal-tailed intervals.

        Raises:
            MissingLibraryError: matplotlib is not installed.
            ValueError: level is not in (0, 1), or rows out of range.
        """
        posterior = self.posterior
        lower, upper = posterior.interval(level)
        if rows is None:
            rows = posterior.mean_deviance.nan_to_num(-1).argsort(descending=True, stable=True)[:SHOWN]
        elif rows.numel() == 0 or not 0 <= int(rows.min()) <= int(rows.max()) < posterior.num_rows:
            raise ValueError(f"rows = {rows.tolist()}: must be some of 0 .. {posterior.num_rows - 1}")
        classes = posterior.tracked_classes
        mean = posterior.mean.gather(1, classes)
        across = min(4, len(rows))
        figure = _figure(2.4 * across, 2.1 * -(-len(rows) // across))
        grid = figure.subplots(-(-len(rows) // across), across, squeeze=False, sharex=True)
        for axes in grid.flat[len(rows) :]:
            axes.set_visible(False)
        for axes, row in zip(grid.flat, rows.tolist(), strict=False):
            best = mean[row].argsort(descending=True, stable=True)[:SHOWN]
            places = np.arange(len(best))
            ends = [end[row, best].cpu().numpy() for end in (lower, upper)]
            axes.hlines(places, *ends, color=BLUE, linewidth=3.2, alpha=0.45)
            axes.plot(mean[row, best].cpu().numpy(), places, "o", color=BLUE, markersize=3.6)
            axes.set(xlim=(-0.03, 1.03), ylim=(len(best) - 0.4, -0.6), yticks=places)
            axes.set_yticklabels([str(c) for c in classes[row, best].tolist()], fontsize=7.5)
            axes.set_title(f"row {row}", fontsize=9, loc="left")
        for axes in grid[-1]:
            axes.set_xlabel(f"p, mean and {100 * level:g} %", fontsize=8)
        return figure

    def reliability(self, labels: Tensor, bins: int = 15) -> "Figure":
        """Accuracy against confidence of the posterior mean, with the number of rows in each bin.

        Raises:
            MissingLibraryError: matplotlib is not installed.
            ValueError: labels of another shape or out of range; a row without draws.
        """
        found = reliability_bins(self.posterior.mean, labels.to(self.posterior.device), bins)
        figure = _figure(4.2, 4.2)
        top, bottom = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
        draw_reliability(top, bottom, found, BLUE, "o")
        top.set_title(f"ECE {100 * found.expected_calibration_error:.1f} %", fontsize=9, loc="left")
        top.set_ylabel("accuracy in the bin")
        bottom.set(xlabel="confidence: probability of the top class", ylabel="rows")
        return figure

    def risk_coverage(self, labels: Tensor) -> "Figure":
        """The error rate of the rows that remain when the least certain ones are refused, by three scores and the best possible.

        Raises:
            MissingLibraryError: matplotlib is not installed.
            ValueError: labels of another shape; a row without draws.
        """
        posterior = self.posterior
        wrong = (posterior.mean.argmax(1) != labels.to(posterior.device)).double()
        figure = _figure(5.2, 3.6)
        axes = figure.subplots()
        scores = {
            "mean deviance": (posterior.mean_deviance, BLUE, "-"),
            "mutual information": (posterior.mutual_information, ORANGE, "--"),
            "1 - confidence": (1 - posterior.mean.max(1).values, "#009e73", "-."),
            "the errors themselves": (wrong, FAINT, ":"),
        }
        for name, (score, colour, line) in scores.items():
            curve = risk_coverage(score, wrong)
            share = (100 * curve.coverage).cpu().numpy()
            label = f"{name}, area {100 * curve.area:.2f} %"
            axes.plot(share, (100 * curve.risk).cpu().numpy(), line, color=colour, linewidth=1.5, label=label)
        axes.set(xlim=(0, 100), xlabel="rows answered (%)", ylabel="errors among them (%)")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        return figure

    def convergence(self) -> "Figure":
        """R-hat of the diagnostic cells, and their effective draws.

        Raises:
            MissingLibraryError: matplotlib is not installed.
            ValueError: the posterior keeps no diagnostics.
        """
        found = self.posterior.diagnostics()
        figure = _figure(7.6, 3.2)
        left, right = figure.subplots(1, 2)
        rhat, ess = (_finite(array) for array in (found.rhat, found.ess))
        left.hist(rhat.clip(max=1.2), bins=60, color=BLUE, alpha=0.8)
        left.axvline(found.limit, color=ORANGE, linewidth=1.2)
        left.set_title(f"{100 * found.unconverged:.1f} % of the cells above {found.limit:g}", fontsize=9, loc="left")
        left.set(xlabel="rank-normalised split R-hat (1.2 and more at 1.2)", ylabel="cells")
        if len(ess):
            right.hist(ess, bins=np.geomspace(max(1.0, ess.min()), max(2.0, ess.max()), 60), color=BLUE, alpha=0.8)
        right.set(xscale="log", xlabel="effective draws, of all chains", ylabel="cells")
        right.tick_params(axis="x", which="minor", labelbottom=False)  # over one decade they would overlap
        right.set_title(f"of {found.draws:,} draws", fontsize=9, loc="left")
        return figure


def draw_reliability(top: "Axes", bottom: "Axes", bins: ReliabilityBins, colour: str, marker: str) -> None:
    """Accuracy against confidence into `top`, with one binomial standard error; the bins' counts into `bottom`."""
    edges, filled = bins.edges.cpu().numpy(), (bins.count > 0).cpu().numpy()
    confidence, accuracy = (array.cpu().numpy()[filled] for array in (bins.confidence, bins.accuracy))
    count = bins.count.cpu().numpy()
    top.plot([0, 1], [0, 1], color=FAINT, linewidth=1, zorder=0)
    error = np.sqrt(np.clip(accuracy * (1 - accuracy), 0, None) / count[filled])  # bins of a few examples say little
    for solid in (True, False):
        here = (count[filled] >= FEW) == solid
        top.errorbar(
            confidence[here],
            accuracy[here],
            yerr=error[here],
            color=colour,
            marker=marker,
            markersize=4.5,
            fillstyle="full" if solid else "none",
            linewidth=1.2 if solid else 0,
            elinewidth=0.8,
        )
    top.set(xlim=(0, 1.02), ylim=(-0.02, 1.04))
    bottom.bar(edges[:-1], count, width=np.diff(edges), align="edge", color=colour, alpha=0.55, linewidth=0)
    bottom.set_yscale("symlog", linthresh=1)


def _figure(width: float, height: float) -> "Figure":
    """Without pyplot, whose figures would have to be closed."""
    try:
        from matplotlib import figure
    except ImportError as error:
        raise MissingLibraryError("matplotlib is not installed: pip install 'bkd_fast[export]'") from error
    return figure.Figure(figsize=(width, height), layout="constrained")


def _finite(array: Tensor) -> Any:
    values = array.double().flatten()
    return values[torch.isfinite(values)].cpu().numpy()
