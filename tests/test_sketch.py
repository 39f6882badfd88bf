"""The public sketch: certified quantiles of any tensor, one state whatever the order, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkd_fast import QuantileSketch

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.9, 0.975, 1.0)
KINDS = ("normal", "walk", "sorted", "constant", "outliers", "cauchy", "missing", "infinite")


def values_of(kind: str, draws: int, seed: int) -> Tensor:
    """float32 (draws, 3, 4)."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(draws, 3, 4))
    if kind == "walk":
        x = x.cumsum(0)
    elif kind == "sorted":
        x = np.sort(x, 0)
    elif kind == "constant":
        x = np.full_like(x, 0.123)
    elif kind == "outliers":
        x[generator.random(x.shape) < 0.02] += 1e6
    elif kind == "cauchy":
        x = generator.standard_cauchy(x.shape)
    elif kind == "missing":
        x[generator.random(x.shape) < 0.2] = np.nan
        x[:, 0, 0] = np.nan
    elif kind == "infinite":
        x[generator.random(x.shape) < 0.1] = np.inf
        x[generator.random(x.shape) < 0.1] = -np.inf
    return torch.from_numpy(x).float()


@given(
    st.sampled_from(KINDS), st.integers(1, 400), st.integers(0, 2**32 - 1), st.sampled_from([64, 128]),
    st.sampled_from([1e-3, 0.02, 3.0]), st.sampled_from([0.0, -7.25]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_exact_order_statistic_lies_within_the_bounds(kind, draws, seed, bins, resolution, center):
    values = values_of(kind, draws, seed)
    sketch = QuantileSketch((3, 4), resolution, center, bins=bins)
    for piece in values.tensor_split([draws // 3]):
        sketch.update(piece)
    exact = values.double().numpy()
    n = (~np.isnan(exact)).sum(0)
    assert torch.equal(sketch.counts, torch.from_numpy(n))
    for q in QUANTILES:
        rank = np.clip(np.ceil(q * n).astype(int), 1, np.maximum(n, 1))
        expected = np.take_along_axis(np.sort(exact, 0), rank[None] - 1, 0)[0]
        lower, upper = (bound.numpy() for bound in sketch.quantile_bounds(q))
        point = sketch.quantile(q).numpy()
        some = n > 0
        assert (lower[some] <= expected[some]).all() and (expected[some] <= upper[some]).all()
        assert np.isnan(lower[~some]).all() and np.isnan(point[~some]).all()
        inside = some & np.isfinite(lower) & np.isfinite(upper)
        slack = 1e-6 * (1 + np.abs(point))  # float32
        assert (lower - slack <= point)[inside].all() and (point <= upper + slack)[inside].all()


def test_bounds_are_as_tight_as_promised() -> None:
    values = values_of("normal", 1000, seed=0)
    sketch = QuantileSketch((3, 4), 1e-3)
    sketch.update(values[:50])
    lower, upper = sketch.quantile_bounds(0.3)
    assert (upper - lower).max() <= 1e-3 * (1 + 1e-6)  # up to 64 values are kept
    sketch.update(values[50:])
    lower, upper = sketch.quantile_bounds(0.3)
    span = (values.max(0).values - values.min(0).values).double()
    assert ((upper - lower) < 2 * span / 63 + 1e-3).all()
    low, high = sketch.interval(0.9)
    assert torch.equal(low, sketch.quantile((1 - 0.9) / 2)) and torch.equal(high, sketch.quantile((1 + 0.9) / 2))


@given(st.sampled_from(KINDS), st.integers(2, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_order_pieces_and_merges_do_not_change_a_bit(kind, draws, seed):
    values = values_of(kind, draws, seed)
    whole, left, right = (QuantileSketch((3, 4), 0.01) for _ in range(3))
    whole.update(values)
    shuffled = values[torch.randperm(draws, generator=torch.Generator().manual_seed(seed % 2**31))]
    for piece in shuffled[: draws // 2].split(7):
        left.update(piece)
    for value in shuffled[draws // 2 :]:
        right.update(value)
    left.merge_(right)
    loaded = QuantileSketch((3, 4), 1.0)
    loaded.load_state_dict(left.state_dict())
    for (name, a), b in zip(whole.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert a == b if isinstance(a, int) else torch.equal(a, b), name


def test_every_element_may_have_its_own_scale() -> None:
    scale = torch.tensor([1e-6, 1.0, 1e6])
    values = torch.randn(500, 3, generator=torch.Generator().manual_seed(1)) * scale + 3 * scale
    sketch = QuantileSketch((3,), scale / 100, 3 * scale)
    sketch.update(values)
    median = values.double().quantile(0.5, dim=0, interpolation="lower")
    assert ((sketch.quantile(0.5) - median).abs() <= 0.15 * scale).all()


def test_the_guard_of_the_counters() -> None:
    sketch = QuantileSketch((2,), 1.0)
    for _ in range(65):
        sketch.update(torch.zeros(1000, 2))
    sketch.update(torch.tensor([[0.0, torch.nan]]).repeat(535, 1))
    state = sketch.state_dict()
    with pytest.raises(ValueError, match="65536 draws in one row"):
        sketch.update(torch.zeros(2))
    other = QuantileSketch((2,), 1.0)
    other.update(torch.zeros(2))
    with pytest.raises(ValueError, match="65536 draws"):
        sketch.merge_(other)
    assert all(
        torch.equal(a, b) for a, b in zip(list(state.values())[2:], list(sketch.state_dict().values())[2:], strict=True)
    )


def test_bad_input() -> None:
    for resolution in (0.0, -1.0, float("nan"), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match=r"resolution = .*must be positive and finite"):
            QuantileSketch((2,), resolution)
    with pytest.raises(ValueError, match=r"center has shape \(3,\): must broadcast to \(2,\)"):
        QuantileSketch((2,), 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match="bins = 32"):
        QuantileSketch((2,), 1.0, bins=32)
    sketch = QuantileSketch((2,), 1.0)
    with pytest.raises(ValueError, match=r"values have shape \(3,\): must be \(2,\) or"):
        sketch.update(torch.zeros(3))
    with pytest.raises(TypeError, match=r"values have dtype torch\.complex64"):
        sketch.update(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="q = 2"):
        sketch.quantile(2)
    with pytest.raises(ValueError, match="level = 1"):
        sketch.interval(1)
    with pytest.raises(TypeError, match="other is a int"):
        sketch.merge_(3)
    with pytest.raises(ValueError, match="this sketch itself"):
        sketch.merge_(sketch)
    with pytest.raises(ValueError, match="another center"):
        sketch.merge_(QuantileSketch((2,), 1.0, 2.0))
    with pytest.raises(ValueError, match="bins = 128: must be"):
        sketch.merge_(QuantileSketch((2,), 1.0, bins=128))
    state = sketch.state_dict()
    for change, message in (
        ({"version": 2}, "version = 2: must be 1"),
        ({"counts": torch.zeros(3, dtype=torch.int32)}, r"counts: torch.int32 \(3,\): must be"),
        ({"center": torch.zeros(5, dtype=torch.float64)}, r"center has shape \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sketch.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="state lacks minimum"):
        sketch.load_state_dict({k: v for k, v in state.items() if k != "minimum"})
