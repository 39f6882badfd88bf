"""Other libraries' forms of a posterior: the numbers arrive where they belong, and ArviZ works on them."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from bkd_fast.posterior.export import to_arviz, to_pandas, to_xarray
from bkd_fast.posterior.predictive import PosteriorPredictive

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    arviz = pytest.importorskip("arviz")
ROWS, CLASSES = 7, 5


def filled(**settings) -> PosteriorPredictive:
    pooled = None
    for chain in range(2):
        posterior = PosteriorPredictive(ROWS, CLASSES, stream=(1, chain), **settings)
        logits = torch.randn(120, ROWS, CLASSES, generator=torch.Generator().manual_seed(chain))
        if settings:
            posterior.choose_classes_by(torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(9)))
        posterior.update_logits(logits)
        if pooled is None:
            pooled = posterior
        else:
            pooled.merge_(posterior)
    assert pooled is not None
    return pooled


DIAGNOSED = {"track": "topk:2", "diagnostics": True, "traces": True}


@pytest.mark.parametrize("settings", [{}, DIAGNOSED])
def test_xarray(settings) -> None:
    posterior = filled(**settings)
    dataset = to_xarray(posterior, quantiles=(0.1, 0.9))
    np.testing.assert_array_equal(dataset["mean"].sel(row=3), posterior.mean[3])
    np.testing.assert_array_equal(dataset["quantiles"].sel(quantile=0.9), posterior.quantile(0.9))
    np.testing.assert_array_equal(dataset["quantile_lower_bound"].sel(quantile=0.1), posterior.quantile_bounds(0.1)[0])
    np.testing.assert_array_equal(dataset["tracked_class"], posterior.tracked_classes)
    np.testing.assert_array_equal(dataset["mutual_information"], posterior.mutual_information)
    assert ("rhat" in dataset) == bool(settings)
    with pytest.raises(ValueError, match="q = 3"):
        to_xarray(posterior, quantiles=(3,))


@pytest.mark.parametrize("settings", [{}, DIAGNOSED])
def test_pandas(settings) -> None:
    posterior = filled(**settings)
    rows, cells = to_pandas(posterior, 0.8)
    assert list(rows.index) == list(range(ROWS)) and rows.index.name == "row"
    np.testing.assert_array_equal(rows["top_class"], posterior.mean.argmax(1))
    np.testing.assert_allclose(rows["top_probability"], posterior.mean.amax(1))
    np.testing.assert_array_equal(rows["counts"], [240] * ROWS)
    lower, upper = posterior.interval(0.8)
    for row, place in np.ndindex(*posterior.tracked_classes.shape):
        line = cells.loc[(row, int(posterior.tracked_classes[row, place]))]
        assert line["lower"] == lower[row, place] and line["upper"] == upper[row, place]
        assert line["lower_bound"] <= line["lower"] <= line["median"] <= line["upper"] <= line["upper_bound"]
        assert line["mean"] == posterior.mean[row, int(posterior.tracked_classes[row, place])]
    assert len(cells) == posterior.tracked_classes.numel()


def test_arviz_summarises_the_traces_and_writes_the_file(tmp_path) -> None:
    posterior = filled(**DIAGNOSED)
    data = to_arviz(posterior)
    table = arviz.summary(data)
    assert len(table) == ROWS
    trace_ess = posterior.diagnostics().trace_ess
    assert trace_ess is not None
    exact = arviz.ess(data, method="mean")["log_odds"]
    np.testing.assert_allclose(exact, trace_ess, rtol=1e-6)
    path = tmp_path / "posterior.nc"
    data.to_netcdf(str(path))
    again = arviz.from_netcdf(str(path))
    np.testing.assert_array_equal(again["streaming_summary"]["mean"], posterior.mean)


def test_arviz_without_traces_has_the_summary() -> None:
    data = to_arviz(filled())
    assert "streaming_summary" in data.groups() and "posterior" not in data.groups()


def test_html_says_what_the_posterior_is() -> None:
    shown = filled(**DIAGNOSED)._repr_html_()
    for text in ("<table>", "5, 2 of them tracked", "240", "chain 0: 120, chain 1: 120", "median R-hat"):
        assert text in shown
    empty = PosteriorPredictive(3, 4)._repr_html_()
    assert "draws of a row</th><td>0" in empty


def test_missing_libraries_are_named() -> None:
    code = (
        "import sys; sys.modules.update(pandas=None, xarray=None, arviz=None)\n"
        "import torch, bkd_fast as bkd\n"
        "from bkd_fast.posterior.export import to_arviz, to_pandas, to_xarray\n"
        "p = bkd.PosteriorPredictive(2, 3)\n"
        "for export, name in ((to_pandas, 'pandas'), (to_xarray, 'xarray'), (to_arviz, 'arviz')):\n"
        "    try: export(p)\n"
        "    except ImportError as error: assert f\"{name} is not installed: pip install 'bkd_fast[export]'\" in str(error)\n"
        "    else: raise AssertionError(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
