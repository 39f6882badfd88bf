"""The posterior predictive in other libraries' forms: xarray, pandas, ArviZ, and HTML for notebooks."""

import html
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bkd_fast.errors import MissingLibraryError
from bkd_fast.ops.sketch import CODES_PER_UNIT

if TYPE_CHECKING:
    from bkd_fast.posterior.predictive import PosteriorPredictive

QUANTILES = (0.025, 0.5, 0.975)
ROW_RESULTS = (
    "expected_entropy", "predictive_entropy", "mutual_information", "mean_deviance", "counts", "invalid_counts",
)  # fmt: skip


def to_xarray(posterior: "PosteriorPredictive", quantiles: Sequence[float] = QUANTILES) -> Any:
    """Every result as an xarray.Dataset.

    Dimensions: row; class, for moments; tracked, for the sketch, with the coordinate tracked_class (row, tracked); quantile.

    Raises:
        MissingLibraryError: xarray is not installed.
        ValueError: a quantile is not in [0, 1].
    """
    xarray = _imported("xarray")
    by_class, by_tracked = ("row", "class"), ("row", "tracked")
    bounds = [posterior.quantile_bounds(q) for q in quantiles]
    arrays: dict[str, tuple[tuple[str, ...], Tensor]] = {
        "mean": (by_class, posterior.mean),
        "variance": (by_class, posterior.variance),
        "quantiles": (("quantile", *by_tracked), torch.stack([posterior.quantile(q) for q in quantiles])),
        "quantile_lower_bound": (("quantile", *by_tracked), torch.stack([lower for lower, _ in bounds])),
        "quantile_upper_bound": (("quantile", *by_tracked), torch.stack([upper for _, upper in bounds])),
        **{name: (("row",), getattr(posterior, name)) for name in ROW_RESULTS},
    }
    dataset = xarray.Dataset(
        {name: (dims, array.cpu().numpy()) for name, (dims, array) in arrays.items()},
        coords={
            "row": range(posterior.num_rows),
            "class": range(posterior.num_classes),
            "quantile": list(quantiles),
            "tracked_class": (by_tracked, posterior.tracked_classes.cpu().numpy()),
        },
        attrs={"library": "bkd_fast", "bins": posterior.bins, "streams": str(posterior.streams)},
    )
    if posterior.has_diagnostics:
        found = posterior.diagnostics()
        watched = ("row", "diagnosed")
        dataset = dataset.assign_coords(diagnosed_class=(watched, found.classes.cpu().numpy()))
        dataset["rhat"] = (watched, found.rhat.cpu().numpy())
        dataset["ess"] = (watched, found.ess.cpu().numpy())
    return dataset


def to_pandas(posterior: "PosteriorPredictive", level: float = 0.95) -> tuple[Any, Any]:
    """(rows, cells), two pandas.DataFrame: one line for each row, and one for each row and tracked class.

    rows: the most probable class and its mean probability, entropies, mutual information, mean deviance, counts.
    cells: mean, standard deviation, median, the equal-tailed credible interval at `level`, and the certified bounds that hold
    the interval's ends.

    Raises:
        MissingLibraryError: pandas is not installed.
        ValueError: level is not in (0, 1).
    """
    pandas = _imported("pandas")
    tails = ((1 - level) / 2, (1 + level) / 2)
    lower, upper = posterior.interval(level)
    lowest, highest = posterior.quantile_bounds(tails[0])[0], posterior.quantile_bounds(tails[1])[1]
    classes = posterior.tracked_classes
    mean, variance = posterior.mean, posterior.variance
    best = mean.nan_to_num(-1).max(1)
    rows = {
        "top_class": best.indices,
        "top_probability": best.values,
        **{name: getattr(posterior, name) for name in ROW_RESULTS},
    }
    cells = {
        "mean": mean.gather(1, classes),
        "standard_deviation": variance.gather(1, classes).sqrt(),
        "median": posterior.quantile(0.5),
        "lower": lower,
        "upper": upper,
        "lower_bound": lowest,
        "upper_bound": highest,
    }
    index = pandas.MultiIndex.from_arrays(
        [
            torch.arange(posterior.num_rows).repeat_interleave(classes.shape[1]).numpy(),
            classes.cpu().flatten().numpy(),
        ],
        names=["row", "class"],
    )
    return (
        pandas.DataFrame({name: array.cpu().numpy() for name, array in rows.items()}).rename_axis("row"),
        pandas.DataFrame({name: array.cpu().flatten().numpy() for name, array in cells.items()}, index=index),
    )


def to_arviz(posterior: "PosteriorPredictive", quantiles: Sequence[float] = QUANTILES) -> Any:
    """What ArviZ works on: an InferenceData, or the DataTree of ArviZ 1.0 and later.

    Its group `streaming_summary` is `to_xarray`. With kept traces, the group `posterior` holds `log_odds` (chain, draw, row): the
    logit of the first diagnostic class in every draw, to 1/1024, cut to the shortest chain and to the rows that all draws
    count for; `arviz.summary` and its plots read it.

    Raises:
        MissingLibraryError: ArviZ is not installed.
        ValueError: a quantile is not in [0, 1].
    """
    arviz = _imported("arviz")
    summary = to_xarray(posterior, quantiles)
    groups: dict[str, dict[str, Any]] = {}
    coords: dict[str, Any] = {}
    if posterior.has_diagnostics and (traces := posterior.diagnostics().traces) is not None:
        groups["posterior"] = {"log_odds": (traces.codes.double() / CODES_PER_UNIT).cpu().numpy()}
        coords["row"] = traces.rows.cpu().numpy()
    if hasattr(arviz, "InferenceData"):
        data = arviz.from_dict(**groups, coords=coords, dims={"log_odds": ["row"]}) if groups else arviz.InferenceData()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the scheme does not know the group
            data.add_groups(streaming_summary=summary)
        return data
    data = arviz.from_dict(groups, coords=coords, dims={"log_odds": ["row"]}) if groups else _tree()
    data["streaming_summary"] = _tree(summary)
    return data


def _tree(dataset: Any = None) -> Any:
    return _imported("xarray").DataTree(dataset)


def to_html(posterior: "PosteriorPredictive") -> str:
    """A small table for notebooks."""
    counts, invalid = posterior.counts, posterior.invalid_counts
    least, most = (int(counts.min()), int(counts.max())) if counts.numel() else (0, 0)
    lines = {
        "rows": f"{posterior.num_rows:,}",
        "classes": f"{posterior.num_classes:,}, {posterior.tracked_classes.shape[1]:,} of them tracked",
        "draws of a row": f"{least:,}" if least == most else f"{least:,} to {most:,}",
        "streams": ", ".join(f"chain {chain}: {end - start:,}" for (_, chain), (start, end) in posterior.streams),
    }
    if most:
        lines["mean predictive entropy"] = f"{float(posterior.predictive_entropy.nanmean()):.4g} nats"
        lines["of it from the parameters"] = f"{float(posterior.mutual_information.nanmean()):.3g} nats"
    if int(invalid.sum()):
        lines["excluded draws of rows"] = f"{int(invalid.sum()):,} in {int((invalid > 0).sum()):,} rows"
    if posterior.has_diagnostics and most > 3:
        lines["convergence"] = posterior.diagnostics().sentence()
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in lines.items()
    )
    return f"<table><caption>{type(posterior).__name__}</caption>{cells}</table>"


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingLibraryError(f"{name} is not installed: pip install 'bkd_fast[export]'") from error
