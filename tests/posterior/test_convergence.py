"""Convergence figures against ArviZ on stored draws, and against chains whose effective sizes are known."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from bkd_fast.posterior.convergence import (
    batch_means_ess,
    between_chain_ess,
    nested_rhat,
    quantile_mcse_levels,
    rank_rhat,
    trace_ess,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    arviz = pytest.importorskip("arviz")


BINS = 128  # of the records of chains


def chains_of(phi: float, chains: int, draws: int, cells: int, seed: int) -> np.ndarray:
    """Stationary AR(1) of unit variance, (chains, draws, cells)."""
    noise = np.random.default_rng(seed).normal(size=(chains, draws, cells))
    out = noise.copy()
    for s in range(1, draws):
        out[:, s] = phi * out[:, s - 1] + np.sqrt(1 - phi**2) * noise[:, s]
    return out


def binned(traces: np.ndarray) -> tuple[Tensor, Tensor]:
    """Histograms of the halves of every chain in the 128 dyadic bins of the pooled range (csrc/histogram.h)."""
    codes = np.rint(1024 * traces).astype(np.int64)
    chains, draws, cells = codes.shape
    half = draws // 2
    halves = np.concatenate([codes[:, :half], codes[:, -half:]])
    edges, counts = np.zeros((cells, BINS + 1)), np.zeros((cells, 2 * chains, BINS), np.int64)
    for c in range(cells):
        least, most = codes[..., c].min(), codes[..., c].max()
        level = 0
        while (most >> level) - (least >> level) >= BINS:
            level += 1
        first = least >> level
        edges[c] = ((first + np.arange(BINS + 1)) << level).clip(least, most + 1) - 0.5
        for s in range(2 * chains):
            np.add.at(counts[c, s], (halves[s, :, c] >> level) - first, 1)
    return torch.from_numpy(edges), torch.from_numpy(counts)


def rhat_of(traces: np.ndarray) -> np.ndarray:
    return np.array([arviz.rhat(traces[:, :, c]) for c in range(traces.shape[2])])


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("draws", [250, 1000])
def test_rank_rhat_is_arvizs(phi: float, draws: int) -> None:
    traces = chains_of(phi, 4, draws, 60, seed=int(10 * phi) + draws)
    exact = rhat_of(traces)
    found = rank_rhat(*binned(traces)).numpy()
    near = exact < 1.06
    assert near.sum() > (20 if phi == 0.9 and draws == 250 else 50)
    assert np.abs(found - exact)[near].max() < 2e-3
    assert np.abs(found / exact - 1).max() < 1e-2


SHAPES = {
    "heavy tails": lambda x: np.sinh(2 * x),
    "bimodal": lambda x: x + 8 * (np.random.default_rng(0).random(x.shape) < 0.3),
    "skewed": lambda x: np.exp(x),
    "unequal scales": lambda x: x * np.array([1, 1, 1, 2.0])[:, None, None],
    "one chain apart": lambda x: x + np.array([0, 0, 0, 1.5])[:, None, None],
    "a drift": lambda x: x + np.linspace(0, 1, x.shape[1])[None, :, None],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_rhat_of_hard_shapes(shape: str) -> None:
    traces = SHAPES[shape](chains_of(0.5, 4, 400, 25, seed=3))
    exact = rhat_of(traces)
    found = rank_rhat(*binned(traces)).numpy()
    assert np.abs(found - exact)[exact < 1.06].max(initial=0) < (8e-3 if shape in ("heavy tails", "skewed") else 2e-3)
    assert np.abs(found / exact - 1).max() < 0.02
    if shape in ("unequal scales", "one chain apart", "a drift"):
        assert np.median(found) > 1.02


def test_rank_rhat_of_few_constant_and_unequal_sequences() -> None:
    edges = torch.arange(9.0).expand(3, 9)
    counts = torch.zeros(3, 2, 8, dtype=torch.int64)
    counts[0, :, 3] = 10  # constant
    counts[1, :, 2], counts[1, 1, 2] = 1, 5  # a sequence of one draw
    counts[2, 0] = torch.tensor([1, 2, 3, 4, 4, 3, 2, 1])
    counts[2, 1] = 2 * counts[2, 0]  # twice as long, and the same
    found = rank_rhat(edges, counts)
    assert found[:2].isnan().all()
    assert 0.95 < float(found[2]) < 1


@pytest.mark.parametrize("phi", [-0.6, 0.0, 0.5, 0.95, 0.99])
@pytest.mark.parametrize(("chains", "draws"), [(4, 200), (1, 501), (2, 33), (3, 8)])
@pytest.mark.parametrize("rank", [False, True])
def test_trace_ess_is_arvizs(phi: float, chains: int, draws: int, rank: bool) -> None:
    traces = chains_of(phi, chains, draws, 12, seed=draws)
    traces[:, :, 0] = np.rint(2 * traces[:, :, 0])  # ties
    traces[:, :, 1] = 3.0
    found = trace_ess(torch.from_numpy(traces), rank=rank).numpy()
    method = "bulk" if rank else "mean"
    exact = [arviz.ess(traces[:, :, c], method=method) for c in range(12)]
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def variances_of(traces: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(traces.mean(1)), torch.from_numpy(traces.var(1, ddof=1))


@pytest.mark.parametrize(("phi", "draws"), [(0.0, 400), (0.5, 1600), (0.9, 12800)])
def test_batch_means_and_chains_tell_the_effective_size_that_is_known(phi: float, draws: int) -> None:
    """N (1 - phi) / (1 + phi); medians over 400 cells, whose own errors are some per cent."""
    traces = chains_of(phi, 8, draws, 400, seed=draws)
    means, variances = variances_of(traces)
    truth = 8 * draws * (1 - phi) / (1 + phi)
    length = draws // 50
    sums = torch.from_numpy(traces[:, : 50 * length].reshape(8, 50, length, 400).sum(2)).permute(0, 2, 1)
    short, long = batch_means_ess(sums, length, variances)
    assert abs(float(short.median()) / truth - 1) < 0.12
    assert abs(float(long.median()) / truth - 1) < 0.15
    # chi^2_7 / 7 has the median .907; 4 standard errors of the median of 400 such
    assert abs(0.907 * float(between_chain_ess(means, variances, draws).median()) / truth - 1) < 0.14


@pytest.mark.parametrize(("phi", "draws"), [(0.9, 100), (0.99, 200)])
def test_chains_shorter_than_their_memory_do_not_hide_it(phi: float, draws: int) -> None:
    """The variance within such a chain is too small, and that between chains makes up for it."""
    means, variances = variances_of(chains_of(phi, 64, draws, 200, seed=draws))
    lags = np.arange(1, draws)
    truth = 64 * draws / (1 + 2 * ((1 - lags / draws) * phi**lags).sum())
    found = between_chain_ess(means, variances, draws)
    # B has the relative error sqrt(2 / 63) = .18 a cell, the median of 200 cells some .016
    assert abs(float(found.median()) / truth - 1) < 0.08


def test_the_median_of_two_halves_is_in_the_middle_of_the_gap() -> None:
    traces = chains_of(0.0, 4, 250, 40, seed=9)
    far = np.arange(250) % 2 == 0
    traces = np.where(far[None, :, None], 6 + np.abs(traces), -np.abs(traces))
    exact = rhat_of(traces)
    assert np.abs(rank_rhat(*binned(traces)).numpy() - exact)[exact < 1.06].max() < 3e-3


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"edges have shape \(3, 8\) and counts \(3, 2, 8\): must be"):
        rank_rhat(torch.zeros(3, 8), torch.zeros(3, 2, 8))
    with pytest.raises(ValueError, match=r"traces have shape \(2, 3, 1\): must be .* with at least 4 draws"):
        trace_ess(torch.zeros(2, 3, 1))


def test_two_scales_show_a_memory_that_is_longer_than_the_batches() -> None:
    traces = chains_of(0.99, 4, 1280, 200, seed=1)
    _, variances = variances_of(traces)
    sums = torch.from_numpy(traces.reshape(4, 64, 20, 200).sum(2)).permute(0, 2, 1)
    short, long = batch_means_ess(sums, 20, variances)
    assert float(short.median()) > 2 * float(long.median())
    assert float(long.median()) > 4 * 1280 / 199 * 0.8


def test_nested_rhat_by_its_formula() -> None:
    generator = np.random.default_rng(5)
    traces = generator.normal(size=(6, 40, 3)) + np.repeat(generator.normal(size=(3, 1, 3)), 2, axis=0)
    means, variances = variances_of(traces)
    found = nested_rhat(means, variances, torch.tensor([0, 0, 1, 1, 2, 2])).numpy()
    for c in range(3):
        x = traces[:, :, c].reshape(3, 2, 40)
        between = x.mean((1, 2)).var(ddof=1)
        within = (x.mean(2).var(1, ddof=1) + x.var(2, ddof=1).mean(1)).mean()
        np.testing.assert_allclose(found[c], np.sqrt(1 + between / within))
    for groups in (torch.zeros(6).long(), torch.tensor([0, 0, 0, 1, 1, 2])):
        with pytest.raises(ValueError, match="superchains has groups of"):
            nested_rhat(means, variances, groups)


def test_quantile_errors_are_arvizs() -> None:
    traces = chains_of(0.5, 4, 2000, 1, seed=8)[:, :, 0]
    ascending = np.sort(traces.ravel())
    for q in (0.025, 0.5, 0.9):
        ess = torch.tensor([arviz.ess(traces, method="quantile", prob=q)], dtype=torch.float64)
        low, high = (float(level) for level in quantile_mcse_levels(q, ess))
        ours = (ascending[int(high * len(ascending))] - ascending[int(low * len(ascending))]) / 2
        assert abs(ours / arviz.mcse(traces, method="quantile", prob=q) - 1) < 0.05
