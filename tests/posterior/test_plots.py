"""Figures: drawn without a display, with what was asked for in them."""

import matplotlib as mpl
import numpy as np
import pytest
import torch

from bkd_fast.posterior.predictive import PosteriorPredictive

mpl.use("Agg")
ROWS, CLASSES = 30, 4
LABELS = torch.arange(ROWS) % CLASSES


def filled(**settings) -> PosteriorPredictive:
    posterior = PosteriorPredictive(ROWS, CLASSES, **settings)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, ROWS, CLASSES, generator=generator) + 2 * torch.nn.functional.one_hot(LABELS, CLASSES)
    if settings:
        posterior.choose_classes_by(logits[0])
    posterior.update_logits(logits)
    return posterior


def drawn(figure, tmp_path) -> list:
    path = tmp_path / "figure.png"
    figure.savefig(path)
    assert path.stat().st_size > 5000
    return [axes for axes in figure.axes if axes.get_visible()]


def test_intervals_show_the_rows_with_their_ends(tmp_path) -> None:
    posterior = filled()
    axes = drawn(posterior.plot.intervals(rows=torch.tensor([3, 11]), level=0.9), tmp_path)
    assert [a.get_title(loc="left") for a in axes] == ["row 3", "row 11"]
    order = posterior.mean[3].argsort(descending=True)
    lower, upper = posterior.interval(0.9)
    segments = np.array([segment[:, 0] for segment in axes[0].collections[0].get_segments()])
    np.testing.assert_allclose(segments, torch.stack([lower[3, order], upper[3, order]], 1), rtol=1e-6)
    least_certain = posterior.mean_deviance.argsort(descending=True)[:8].tolist()
    axes = drawn(posterior.plot.intervals(), tmp_path)
    assert [a.get_title(loc="left") for a in axes] == [f"row {row}" for row in least_certain]
    with pytest.raises(ValueError, match=r"rows = \[30\]: must be some of 0 \.\. 29"):
        posterior.plot.intervals(torch.tensor([30]))


def test_reliability_and_risk_coverage(tmp_path) -> None:
    posterior = filled()
    top, bottom = drawn(posterior.plot.reliability(LABELS, bins=5), tmp_path)
    assert "ECE" in top.get_title(loc="left")
    assert sum(bar.get_height() for bar in bottom.patches) == ROWS
    (axes,) = drawn(posterior.plot.risk_coverage(LABELS), tmp_path)
    errors = float((posterior.mean.argmax(1) != LABELS).double().mean())
    for line in axes.lines:
        assert line.get_ydata()[-1] == pytest.approx(100 * errors)
    with pytest.raises(ValueError):
        posterior.plot.reliability(LABELS[:3])


def test_convergence(tmp_path) -> None:
    posterior = filled(diagnostics=True, labels=LABELS)
    left, right = drawn(posterior.plot.convergence(), tmp_path)
    assert sum(bar.get_height() for bar in left.patches) == int((~posterior.diagnostics().rhat.isnan()).sum())
    assert "of 100 draws" in right.get_title(loc="left")
    with pytest.raises(ValueError, match="diagnostics = False"):
        filled().plot.convergence()
