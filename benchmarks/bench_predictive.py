"""The posterior predictive's update, everything on, against quantiles of stored draws.

`numpy.quantile` and `torch.quantile` get what nobody would stream otherwise: the probabilities of all draws, already in
memory, for three quantiles; their times are per stored cell and draw, the softmax and the moments not included. Streamed
moments as TensorFlow Probability's `RunningVariance` keeps them (Welford, vectorised; no quantiles), and the vectors of KLL
sketches of DataSketches (where it is installed: pip install datasketches) get the same draws.
An update touches 4 + 2 x 144 / W bytes per cell and draw (logits once; counters, moments and reference read and written once
for W draws). Its arithmetic, about 130 vector instructions for 16 cells, is what bounds it from W = 8 on.
"""

import numpy as np
import pytest
import torch
from interleaved import Contender, Table

from bkd_fast import _native as native
from bkd_fast.ops.predictive import PredictiveState, empty_state, predictive_update_
from bkd_fast.posterior.predictive import PosteriorPredictive

CLASSES = (10, 100, 1000)
DRAWS = (1, 8, 32)
CELLS = {"in cache": 4_000, "from memory": 1_000_000}
WARM = 80  # draws before timing: past the kept codes of 64 bins
STORED = 200  # draws of the baselines
QUANTILES = (0.025, 0.5, 0.975)


def logits_of(rows: int, classes: int, draws: int) -> torch.Tensor:
    """A posterior of spread .6 around logits from 0 to 3."""
    return 0.6 * torch.randn(draws, rows, classes) + torch.linspace(0, 3, classes)


def warm_state(rows: int, classes: int, bins: int = 64) -> PredictiveState:
    state = empty_state(rows, classes, bins)
    predictive_update_(state, logits_of(rows, classes, 2 * bins if bins == 128 else WARM))
    return state


def updater(rows: int, classes: int, draws: int, bins: int = 64) -> Contender:
    state = warm_state(rows, classes, bins)
    sets = [logits_of(rows, classes, draws) for _ in range(2)]
    return Contender(lambda i: predictive_update_(state, sets[i]), sets=2)


def stored_quantiles(rows: int, classes: int) -> dict[str, Contender]:
    p = logits_of(rows, classes, STORED).softmax(-1)
    array, q = p.numpy(), torch.tensor(QUANTILES)
    return {
        "numpy.quantile": Contender(lambda _: np.quantile(array, QUANTILES, axis=0)),
        "torch.quantile": Contender(lambda _: torch.quantile(p, q, dim=0)),
    }


@pytest.mark.parametrize("where", CELLS)
@pytest.mark.parametrize("classes", CLASSES)
def test_update(benchmark, threads, show, classes, where):
    rows = CELLS[where] // classes
    table = Table(f"predictive update, C = {classes}, {where}, {threads} thread{'s' * (threads > 1)}", "cell and draw")
    baseline_rows = min(rows, 20_000 // classes)  # their time per cell does not depend on the number of cells
    stored = stored_quantiles(baseline_rows, classes)
    others = table.time("stored draws", stored, baseline_rows * classes * STORED, seconds=2, repeats=5)
    table.rows.pop()
    for draws in DRAWS:
        contender = updater(rows, classes, draws)
        ours = table.time(f"W = {draws}", {"update": contender}, rows * classes * draws, seconds=2)
        table.rows[-1] = (f"W = {draws}", {**ours, **others})
        for name, value in others.items():
            benchmark.extra_info[f"{name} / update, W = {draws}"] = value / ours["update"]
    show(table)
    benchmark.pedantic(contender.run, args=(0,), rounds=3)


def running_variance(rows: int, classes: int, draws: int) -> Contender:
    """Streamed mean and variance of the probabilities, draw by draw, as TFP-style accumulators do."""
    count, mean, m2 = 0, torch.zeros(rows, classes), torch.zeros(rows, classes)
    sets = [logits_of(rows, classes, draws) for _ in range(2)]

    def run(i: int) -> None:
        nonlocal count
        for logits in sets[i]:
            p = logits.softmax(-1)
            count += 1
            delta = p - mean
            mean.add_(delta, alpha=1 / count)
            m2.addcmul_(delta, p - mean)

    return Contender(run, sets=2)


def kll_vector(rows: int, classes: int, draws: int) -> Contender | None:
    try:
        from datasketches import vector_of_kll_floats_sketches
    except ImportError:
        return None
    sketches = vector_of_kll_floats_sketches(200, rows * classes)
    draws_of = logits_of(rows, classes, draws).softmax(-1).flatten(1).numpy()
    return Contender(lambda _: [sketches.update(draw) for draw in draws_of])


def test_other_streams(benchmark, show):
    """Everything on, tracked classes, and what others stream: per cell and draw, from memory, one thread."""
    torch.set_num_threads(1)
    rows, classes, draws = 500, 1000, 32
    posteriors = {"all classes": PosteriorPredictive(rows, classes)}
    labels = torch.arange(rows) % classes
    for name, settings in {
        "16 classes and the label": {"track": "topk:16", "labels": labels},
        "the same with diagnostics": {"track": "topk:16", "labels": labels, "diagnostics": True},
    }.items():
        posteriors[name] = PosteriorPredictive(rows, classes, **settings)
        posteriors[name].choose_classes_by(logits_of(rows, classes, 1)[0])
    sets = [logits_of(rows, classes, draws) for _ in range(2)]
    contenders = {}
    for name, posterior in posteriors.items():
        for _ in range(3):
            posterior.update_logits(sets[0])
        contenders[name] = Contender(lambda i, p=posterior: p.update_logits(sets[i]), sets=2)
    contenders["moments, Welford"] = running_variance(rows, classes, draws)
    table = Table("streams, C = 1000, W = 32, from memory, 1 thread", "cell and draw")
    ours = table.time("all", contenders, rows * classes * draws, repeats=5)
    kll = kll_vector(20, classes, draws)
    if kll is not None:
        table.rows[-1][1].update(table.time("KLL", {"DataSketches' KLL": kll}, 20 * classes * draws, repeats=3))
        table.rows.pop()
    show(table)
    for name, value in ours.items():
        benchmark.extra_info[name] = value
    benchmark.pedantic(contenders["all classes"].run, args=(0,), rounds=3)


def test_cost_is_constant_in_draws_and_linear_in_rows(benchmark, show):
    torch.set_num_threads(1)
    draws = 32
    table = Table("predictive update, C = 100, W = 32, 1 thread", "cell and draw")
    for rows in (100, 1000, 10_000):
        table.time(f"{rows:,} rows", {"update": updater(rows, 100, draws)}, rows * 100 * draws, repeats=5)
    for held in (128, 2048, 16_384):
        state, logits = empty_state(200, 100, 64), logits_of(200, 100, draws)
        for _ in range(held // draws):
            predictive_update_(state, logits)
        contender = Contender(lambda _, state=state, logits=logits: predictive_update_(state, logits))
        table.time(f"200 rows that hold {held:,} draws", {"update": contender}, 200 * 100 * draws, repeats=5)
    show(table)
    benchmark.pedantic(contender.run, args=(0,), rounds=3)


def test_instruction_sets_and_bins(benchmark, show):
    torch.set_num_threads(1)
    table = Table("predictive update, C = 1000, W = 32, from memory, 1 thread", "cell and draw")
    try:
        for bins in (64, 128):
            contender = updater(1000, 1000, 32, bins)

            def run_with(isa, contender=contender):
                def run(i):
                    native.use_isa(isa)
                    contender.run(i)

                return Contender(run, sets=2)

            contenders = {isa: run_with(isa) for isa in reversed(native.isas())}
            table.time(f"{bins} bins", contenders, 1000 * 1000 * 32, repeats=5)
    finally:
        native.use_isa(native.isas()[-1])
    show(table)
    benchmark.pedantic(contender.run, args=(0,), rounds=1)


def test_reading_and_merging(benchmark, show):
    """Per cell: a quantile, its bounds, the deviance quantile, a merge."""
    rows, classes = 1000, 1000
    posterior, others = PosteriorPredictive(rows, classes), iter(range(1, 1000))
    posterior.update_logits(logits_of(rows, classes, WARM))

    def merge(_):
        other.load_state_dict({**state, "run": (run := next(others)), "streams": torch.tensor([[run, 0, 0, WARM]])})
        posterior.merge_(other)

    other = PosteriorPredictive(rows, classes)
    state = other.state_dict() | {k: v for k, v in posterior.state_dict().items() if k not in ("run", "streams")}
    contenders = {
        "quantile": lambda _: posterior.quantile(0.975),
        "bounds": lambda _: posterior.quantile_bounds(0.975),
        "deviance": lambda _: posterior.deviance_upper(0.95),
        "exceedance": lambda _: posterior.exceedance(0.1),
        "shortest interval": lambda _: posterior.highest_density_interval(0.95),
        "load + merge": merge,
    }
    table = Table("posterior predictive, reading and merging", "cell")
    table.time("C = 1000", contenders, rows * classes, repeats=5)
    show(table)
    benchmark.pedantic(lambda: posterior.quantile(0.975), rounds=3)
