"""A million cells: bytes a cell, and that an update costs no multiple of a softmax it should not."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bkd_fast.posterior.predictive import PosteriorPredictive

pytest.importorskip("bkd_fast._native")
ROWS, CLASSES, DRAWS = 1000, 1000, 32


@pytest.fixture(scope="module")
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(DRAWS, ROWS, CLASSES, generator=generator) + 3 * torch.randn(ROWS, CLASSES, generator=generator)


def filled(logits: Tensor, **settings) -> PosteriorPredictive:
    posterior = PosteriorPredictive(ROWS, CLASSES, **settings)
    if settings:
        posterior.choose_classes_by(logits[0])
    for _ in range(3):  # past the kept codes
        posterior.update_logits(logits)
    return posterior


def bytes_of(posterior: PosteriorPredictive) -> int:
    return sum(value.nbytes for value in posterior.state_dict().values() if isinstance(value, Tensor))


def test_bytes_of_a_cell(logits: Tensor) -> None:
    """64 counters, two extremes, mean, squares and reference; 12 bytes where a class is not tracked. 50 M cells are 7.2 GB."""
    cells, of_rows = ROWS * CLASSES, 100 * ROWS
    assert bytes_of(filled(logits)) <= 144 * cells + of_rows
    labels = torch.zeros(ROWS, dtype=torch.int64)
    tracked = filled(logits, track="topk:16", labels=labels)
    assert bytes_of(tracked) <= 12 * cells + 17 * (132 + 4) * ROWS + of_rows
    records = filled(logits, track="topk:16", labels=labels, diagnostics=True)
    assert bytes_of(records) - bytes_of(tracked) <= 2 * (4 * 260 + 4 * 64 + 16 + 4) * ROWS + of_rows


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def test_an_update_costs_a_few_softmaxes(logits: Tensor) -> None:
    """Some 4 times one, everything on, and less with few classes tracked. The bars are gross: figures are `make bench`'s."""
    whole, few = filled(logits), filled(logits, track="topk:16")
    contenders: dict[str, Callable[[], object]] = {
        "softmax": lambda: logits.softmax(-1),
        "whole": lambda: whole.update_logits(logits),
        "few": lambda: few.update_logits(logits),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(5):  # in turns: a machine's speed drifts
        for name, run in contenders.items():
            times[name].append(seconds(run))
    median = {name: statistics.median(values) for name, values in times.items()}
    assert median["whole"] < 15 * median["softmax"]
    assert median["few"] < median["whole"]
