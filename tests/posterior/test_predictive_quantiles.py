"""The sketch's promises on hard streams: one state whatever the order, certified quantiles, their measured error."""

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predictive_data import KINDS, exact, order_statistic, stream
from torch import Tensor

from bkd_fast.errors import BKDFastWarning
from bkd_fast.posterior.predictive import PosteriorPredictive

HISTOGRAM = ("counters", "minimum", "maximum", "counts", "invalid")
QUANTILES = (0.0, 0.005, 0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975, 0.995, 1.0)

kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32 - 1)


def posterior_of(pieces: Sequence[Tensor], bins: int = 64, run: int = 0) -> PosteriorPredictive:
    posterior = PosteriorPredictive(pieces[0].shape[1], pieces[0].shape[2], bins=bins, stream=(run, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BKDFastWarning)  # of invalid rows; tested elsewhere
        for piece in pieces:
            posterior.update_logits(piece)
    return posterior


def cut(logits: Tensor, at: Sequence[float]) -> list[Tensor]:
    places = sorted({round(x * len(logits)) for x in at})
    return [piece for piece in logits.tensor_split(places) if len(piece)]


def assert_same_histogram(a: PosteriorPredictive, b: PosteriorPredictive) -> None:
    x, y = a.state_dict(), b.state_dict()
    for name in HISTOGRAM:
        assert torch.equal(x[name].view(torch.uint8), y[name].view(torch.uint8)), name


cases = given(
    kind=kinds,
    seed=seeds,
    draws=st.one_of(st.integers(1, 140), st.integers(141, 600)),
    shape=st.sampled_from([(3, 2), (5, 7), (2, 40), (7, 10)]),
    bins=st.sampled_from([64, 128]),
    at=st.lists(st.floats(0, 1), min_size=1, max_size=6),
)


@cases
@settings(max_examples=60, deadline=None)
def test_order_and_batching_do_not_change_a_bit(
    kind: str, seed: int, draws: int, shape: tuple[int, int], bins: int, at: list[float]
) -> None:
    logits = stream(kind, draws, *shape, seed)
    permuted = logits[torch.randperm(draws, generator=torch.Generator().manual_seed(seed))]
    assert_same_histogram(posterior_of([logits], bins), posterior_of(cut(permuted, at), bins))


@cases
@settings(max_examples=60, deadline=None)
def test_any_merge_tree_gives_the_same_bits(
    kind: str, seed: int, draws: int, shape: tuple[int, int], bins: int, at: list[float]
) -> None:
    logits = stream(kind, draws, *shape, seed)
    pieces = [posterior_of([piece], bins, run) for run, piece in enumerate(cut(logits, at))]
    generator = np.random.default_rng(seed)
    while len(pieces) > 1:
        left = pieces.pop(generator.integers(len(pieces)))
        right = pieces.pop(generator.integers(len(pieces)))
        left.merge_(right)
        pieces.append(left)
    whole = posterior_of([logits], bins)
    assert_same_histogram(pieces[0], whole)
    # sums in float32 about the first draw: where that is an outlier near 1, a small mean keeps its absolute rounding
    for name in ("mean", "expected_entropy"):
        torch.testing.assert_close(getattr(pieces[0], name), getattr(whole, name), rtol=2e-6, atol=1e-6, equal_nan=True)


@cases
@settings(max_examples=40, deadline=None)
def test_saving_and_resuming_gives_the_same_bits(
    kind: str, seed: int, draws: int, shape: tuple[int, int], bins: int, at: list[float]
) -> None:
    logits = stream(kind, draws, *shape, seed)
    resumed = PosteriorPredictive(*shape, bins=bins)
    first = True
    for piece in cut(logits, at):
        again = PosteriorPredictive(*shape, bins=bins)
        again.load_state_dict(posterior_of([piece[:0]], bins).state_dict() if first else resumed.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BKDFastWarning)
            again.update_logits(piece)
        resumed, first = again, False
    straight = posterior_of(cut(logits, at), bins)
    for name, value in resumed.state_dict().items():
        other = straight.state_dict()[name]
        if isinstance(value, Tensor):
            assert torch.equal(value.view(torch.uint8), other.view(torch.uint8)), name
        else:
            assert value == other, name


@cases
@settings(max_examples=150, deadline=None)
def test_certificate_contains_the_order_statistic(
    kind: str, seed: int, draws: int, shape: tuple[int, int], bins: int, at: list[float]
) -> None:
    logits = stream(kind, draws, *shape, seed)
    posterior = posterior_of(cut(logits, at), bins)
    p, logit = exact(logits)
    single = torch.softmax(logits, -1).double().numpy()
    single[np.isnan(p)] = np.nan
    clipped = np.clip(logit, -32, 32)
    missing = np.isnan(clipped)
    code_range = np.where(missing, -np.inf, clipped).max(0) - np.where(missing, np.inf, clipped).min(0)
    for q in QUANTILES:
        lower, upper = (bound.double().numpy() for bound in posterior.quantile_bounds(q))
        truth = order_statistic(p, q)
        held = ~np.isnan(truth)
        assert (np.isnan(lower) == ~held).all() and (np.isnan(upper) == ~held).all()
        assert (lower[held] <= truth[held]).all() and (truth[held] <= upper[held]).all()
        # float32 probabilities carry a rounding of their own, one unit in the last place
        rounded = order_statistic(single, q)[held]
        assert (lower[held] <= rounded * (1 + 3e-7)).all() and (rounded <= upper[held] * (1 + 3e-7) + 1e-37).all()
        # and it is no wider than promised: 2 R / (bins - 1) and some codes of 1/1024
        width = np.minimum(2 * code_range / (bins - 1), 64) + 6 / 1024
        certain = held & (np.abs(order_statistic(logit, q)) < 30)
        assert (upper - lower <= width / 4 + 2e-7)[certain].all()
        estimate = posterior.quantile(q).double().numpy()
        assert (lower[held] <= estimate[held]).all() and (estimate[held] <= upper[held]).all()


@cases
@settings(max_examples=40, deadline=None)
def test_few_draws_are_kept_exactly(
    kind: str, seed: int, draws: int, shape: tuple[int, int], bins: int, at: list[float]
) -> None:
    """To half a code, 2^-11 in logits, and float32's rounding of the logits themselves."""
    if kind == "huge":  # logits of 10^4 have a rounding of 2^-11 themselves
        kind = "iid"
    logits = stream(kind, min(draws, bins), *shape, seed)
    posterior = posterior_of(cut(logits, at), bins)
    _, logit = exact(logits)
    for q in QUANTILES:
        truth = order_statistic(logit, q)
        p = posterior.quantile(q).double().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.abs(np.log(p) - np.log1p(-p) - truth)
        seen = np.abs(truth) < 5  # float32 probabilities resolve 2^-11 in logits up to there
        seen |= (truth < 0) & (truth > -31)
        seen &= ~np.isnan(truth)
        assert error[seen].max(initial=0) <= 2**-11 + 2e-5


def rank_errors(posterior: PosteriorPredictive, p: np.ndarray, q: float) -> np.ndarray:
    """|rank of the reported quantile - q| in shares of the draws, (rows, classes); p sorted along axis 0."""
    x = posterior.quantile(q).numpy()
    below, through = (p < x).mean(0), (p <= x).mean(0)
    return np.maximum(0, np.maximum(below - q, q - through))


@pytest.mark.parametrize("draws", [1000, 3000, 10000])
@pytest.mark.parametrize("kind", ["iid", "ar.9", "ar.99"])
def test_rank_error_of_interpolated_quantiles(kind: str, draws: int) -> None:
    """The ends of 90, 95 and 99 % intervals. In the middle a bin holds up to a tenth of the draws: the noise of their
    places in it is .25 % of 1000 draws."""
    logits = stream(kind, draws, 40, 10, seed=draws)
    posterior = posterior_of(list(logits.split(32)))
    p = np.sort(exact(logits)[0].astype(np.float32), axis=0)
    ends = np.stack([rank_errors(posterior, p, q) for q in (0.005, 0.025, 0.05, 0.95, 0.975, 0.995)])
    middle = np.stack([rank_errors(posterior, p, q) for q in (0.25, 0.5, 0.75)])
    assert ends.mean() <= 0.0012
    assert middle.mean() <= 0.003
    assert max(ends.max(), middle.max()) <= 0.03
