"""The figures of the report, each a function from the results to a matplotlib figure, and the one look they share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from bkd_fast.app.results import Results
from bkd_fast.app.scores import Prediction, errors, reliability, selective
from bkd_fast.posterior.plots import BLUE, FAINT, ORANGE, draw_reliability

# Okabe and Ito's palette: told apart with every kind of colour vision, and by their markers and dashes in grey
COLOURS = {"teacher": "#6b6b6b", "kd": ORANGE, "bkd": BLUE}
MARKERS = {"teacher": "s", "kd": "^", "bkd": "o"}
DASHES = {"teacher": (0, (1, 1.2)), "kd": (0, (4, 1.6)), "bkd": "-"}
# the phases of a chain: what they are called, and their background
PHASES = {
    "warm_start": ("warm start", "#f3e8d2"),
    "burn_in": ("burn-in", "#e9eef3"),
    "sampling": ("sampling", "#ffffff"),
}
INK = "#222222"
LABEL_BAND = "#ececec"

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": 160,
    "savefig.dpi": 160,
}

CLASSES_SHOWN = 10  # of an image, beside it
LONGEST_NAME = 16  # characters of a class name
# images shown at either end of the ranking by mean deviance
SHOWN = 4
SHOWN_BESIDE_LONG_NAMES = 3


def draw_all(results: Results, folder: Path) -> dict[str, Path]:
    """Write every figure as PNG; their paths by name."""
    makers: dict[str, Callable[[Results], Figure]] = {
        "intervals": intervals,
        "reliability": reliability_diagram,
        "risk_coverage": risk_coverage_curves,
        "coverage": coverage_of_intervals,
        "trace": energy_trace,
    }
    paths = {}
    for name, make in makers.items():
        with mpl.rc_context(STYLE):
            figure = make(results)
            paths[name] = folder / f"{name}.png"
            figure.savefig(paths[name])
    return paths


def intervals(results: Results) -> Figure:
    """Class probabilities with their credible intervals for the most and the least certain images."""
    order = results.bkd.uncertainty.argsort(stable=True)
    long_names = _have_long_names(results)
    shown = min(SHOWN_BESIDE_LONG_NAMES if long_names else SHOWN, len(order) // 2)
    rows = {"Most certain": order[:shown], "Least certain": order.flip(0)[:shown]}
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 1)
    bands = [figure.add_subfigure(grid[row]) for row in range(2)]
    _interval_legend(bands[0], results.config.posterior.level)
    for band, (title, images) in zip(bands, rows.items(), strict=True):
        band.suptitle(title, x=0.008, ha="left", fontsize=10, fontweight="bold")
        axes = band.subplots(1, 2 * shown, width_ratios=[0.8 if long_names else 0.62, 1] * shown, squeeze=False)[0]
        for place, image in enumerate(images.tolist()):
            _show_image(axes[2 * place], results, image)
            _show_classes(axes[2 * place + 1], results, image, last_row=title == "Least certain")
    return figure


def _interval_legend(band: SubFigure, level: float) -> None:
    blue, orange = COLOURS["bkd"], COLOURS["kd"]
    entries: list[Artist] = [
        Line2D([], [], linestyle="", marker=MARKERS["bkd"], markersize=4, color=blue, label="BKD, posterior mean"),
        Line2D([], [], linewidth=3.2, alpha=0.45, color=blue, label=f"BKD, {100 * level:g} % credible interval"),
        Line2D([], [], linestyle="", marker=MARKERS["kd"], color=orange, fillstyle="none", label="KD"),
        Patch(color=LABEL_BAND, label="the label"),
    ]
    band.legend(handles=entries, loc="upper right", ncols=len(entries), borderaxespad=0.1)


def _classes_shown(means: Tensor, label: int) -> Tensor:
    """All classes in their order; of many the most probable ones and the label, by their probability."""
    if len(means) <= CLASSES_SHOWN:
        return torch.arange(len(means))
    top = means.topk(CLASSES_SHOWN).indices
    return top if label in top else torch.cat([top[:-1], torch.tensor([label])])


def _have_long_names(results: Results) -> bool:
    return max(map(len, results.images.class_names)) > 3


def shortened(name: str) -> str:
    """A class name that fits beside an axis: what stands before the first comma, and not too much of it."""
    name = name.partition("\t")[2] or name
    return name.partition(",")[0][:LONGEST_NAME]


def _show_image(axes: Axes, results: Results, image: int) -> None:
    axes.imshow(results.images.test_picture(image).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#cccccc")
    names = results.images.class_names
    label = shortened(names[int(results.images.test_y[image])])
    guess = shortened(names[int(results.bkd.probs[image].argmax())])
    space = "\n" if _have_long_names(results) else " "
    verdict = "right" if label == guess else f"BKD says{space}{guess}"
    deviance = float(results.bkd.uncertainty[image])
    shown = f"{deviance:.2f}" if deviance >= 0.005 else "< 0.005"
    axes.set_xlabel(f"label{space}{label}\n{verdict}\ndeviance\n{shown}", fontsize=8, linespacing=1.5)


def _show_classes(axes: Axes, results: Results, image: int, *, last_row: bool) -> None:
    label, means = int(results.images.test_y[image]), results.bkd.probs[image]
    shown = _classes_shown(means, label)
    places = np.arange(len(shown))
    band = int((shown == label).nonzero())
    axes.axhspan(band - 0.5, band + 0.5, color=LABEL_BAND, zorder=0)
    axes.hlines(
        places,
        results.lower[image, shown].numpy(),
        results.upper[image, shown].numpy(),
        color=COLOURS["bkd"],
        linewidth=3.2,
        alpha=0.45,
    )
    axes.plot(means[shown].numpy(), places, MARKERS["bkd"], color=COLOURS["bkd"], markersize=3.6)
    axes.plot(
        results.kd.probs[image, shown].numpy(),
        places,
        MARKERS["kd"],
        color=COLOURS["kd"],
        markersize=4.2,
        fillstyle="none",
    )
    axes.set(xlim=(-0.04, 1.04), xticks=[0, 0.5, 1], ylim=(len(shown) - 0.4, -0.6), yticks=places)
    axes.set_xticklabels(["0", ".5", "1"])
    axes.set_yticklabels([shortened(results.images.class_names[int(k)]) for k in shown], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    if last_row:
        axes.set_xlabel("probability")


def reliability_diagram(results: Results) -> Figure:
    """Accuracy against confidence, one panel per model, with the number of images in each bin below."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    axes = figure.subplots(2, 3, height_ratios=[3, 1], sharex=True, sharey="row")
    for column, prediction in enumerate(results.predictions):
        bins = reliability(prediction, results.images.test_y)
        colour = COLOURS[prediction.key]
        top, bottom = axes[0, column], axes[1, column]
        draw_reliability(top, bottom, bins, colour, MARKERS[prediction.key])
        top.set_title(f"{prediction.name}, ECE {100 * bins.expected_calibration_error:.1f} %", color=colour)
        bottom.set_yticks([0, 10, 1000])
        bottom.set_yticklabels(["0", "10", "1000"])
        bottom.set_xlabel("confidence: probability of the top class")
    axes[0, 0].set_ylabel("accuracy in the bin")
    axes[1, 0].set_ylabel("images")
    return figure


def risk_coverage_curves(results: Results) -> Figure:
    """Error rate of what remains when the least certain images are refused; and where the scores put the errors."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    curves, ranks = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for prediction in results.predictions:
        curve = selective(prediction, results.images.test_y)
        curves.plot(
            100 * curve.coverage.numpy(),
            100 * curve.risk.numpy(),
            color=COLOURS[prediction.key],
            linestyle=DASHES[prediction.key],
            linewidth=1.5,
            label=f"{prediction.name} by {prediction.score}, area {100 * curve.area:.2f} %",
        )
    curves.set(xlim=(0, 100), xlabel="images answered (%)", ylabel="errors among them (%)")
    curves.set_ylim(bottom=0)
    curves.legend(loc="upper left")
    _show_ranks(ranks, results)
    return figure


def _show_ranks(axes: Axes, results: Results) -> None:
    """Histogram of the rank of every error in the model's own order of certainty."""
    shown: list[Prediction] = [results.kd, results.bkd]
    edges = np.linspace(0, 100, 11)
    for offset, prediction in zip((0, 4.2), shown, strict=True):
        wrong = errors(prediction, results.images.test_y).bool().numpy()
        ranks = prediction.uncertainty.argsort(stable=True).argsort().numpy()
        percent = 100 * (ranks[wrong] + 0.5) / len(ranks)
        count, _ = np.histogram(percent, bins=edges)
        axes.bar(
            edges[:-1] + 0.8 + offset,
            count,
            width=4.2,
            align="edge",
            color=COLOURS[prediction.key],
            alpha=0.8,
            label=f"{prediction.name}: {int(wrong.sum())} errors",
        )
    axes.set(xlim=(0, 100), xlabel="certainty rank of the image (%; right: least certain)", ylabel="errors")
    axes.legend(loc="upper left")


def coverage_of_intervals(results: Results) -> Figure:
    """How often the label's deviance lies in its credible interval, against the nominal level, in both readings."""
    level = np.array([coverage.level for coverage in results.coverage])
    readings = {
        "averaged over the draws": ([coverage.averaged for coverage in results.coverage], "full", "-"),
        "of the mean probability": ([coverage.plug_in for coverage in results.coverage], "none", DASHES["kd"]),
    }
    count = len(results.images.test_y)
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=FAINT, linewidth=1, zorder=0, label="nominal")
    for name, (values, fill, dashes) in readings.items():
        observed = np.array(values)
        axes.errorbar(
            100 * level,
            100 * observed,
            yerr=100 * np.sqrt(observed * (1 - observed) / count),
            color=COLOURS["bkd"],
            marker=MARKERS["bkd"],
            fillstyle=fill,
            linestyle=dashes,
            markersize=4.5,
            linewidth=1.2,
            elinewidth=0.8,
            label=name,
        )
    axes.set(xlim=(48, 101), ylim=(-2, 102))
    axes.set(xlabel="nominal level (%)", ylabel="labels inside their interval (%)")
    axes.legend(loc="lower right")
    return figure


def energy_trace(results: Results) -> Figure:
    """The energy along the chain, phase by phase."""
    trace = results.trace
    steps, energies = np.array(trace.steps), np.array(trace.energies)
    phases = np.array(trace.phases)
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    axes = figure.subplots()
    start = 0
    for phase, (name, colour) in PHASES.items():
        here = steps[phases == phase]
        if len(here):
            axes.axvspan(start, here[-1], color=colour, zorder=0, linewidth=0)
            axes.text(
                (start + here[-1]) / 2,
                1.02,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                fontsize=8.5,
                color="#555555",
            )
            start = here[-1]
    axes.plot(steps, energies, color=COLOURS["bkd"], linewidth=0.5, alpha=0.55)
    window = max(1, len(energies) // 60)
    if len(energies) >= 2 * window > 2:
        smooth = np.convolve(energies, np.ones(window) / window, mode="valid")
        middle = (window - 1) // 2
        axes.plot(steps[middle : middle + len(smooth)], smooth, color=INK, linewidth=1.2)
    axes.set(xlim=(0, steps[-1]), xlabel="step", ylabel="mean energy (nats per image)")
    return figure
