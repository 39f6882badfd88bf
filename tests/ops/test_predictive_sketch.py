"""The dyadic logit histogram's tiles: known levels and slots, reading, merging, and the guard of the counters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_fast.ops import use_backend
from bkd_fast.ops.predictive import PredictiveState, empty_state, predictive_update_
from bkd_fast.ops.reference.sketch import Row, level_of
from bkd_fast.ops.sketch import (
    Tiles,
    check_room,
    sketch_deviance_quantile,
    sketch_merge_,
    sketch_quantile,
    sketch_sort_,
)


def filled(rows: int, classes: int, draws: int, seed: int, bins: int = 64, spread: float = 1.0) -> PredictiveState:
    generator = torch.Generator().manual_seed(seed)
    center = 3 * torch.randn(rows, classes, generator=generator)
    state = empty_state(rows, classes, bins)
    predictive_update_(state, center + spread * torch.randn(draws, rows, classes, generator=generator))
    return state


@given(st.integers(-32768, 32767), st.integers(-32768, 32767), st.sampled_from([64, 128]))
def test_level_is_the_least_that_fits(a: int, b: int, bins: int) -> None:
    low, high = min(a, b), max(a, b)
    level = int(level_of(np.array([low]), np.array([high]), bins)[0])
    assert (high >> level) - (low >> level) < bins
    assert level == 0 or (high >> (level - 1)) - (low >> (level - 1)) >= bins
    # no two codes of the range that differ in bin share a slot
    assert (1 << level) <= max(1, 2 * (high - low) / (bins - 1))


def test_codes_and_counters_of_a_cell_by_hand() -> None:
    """Two classes: logit(p_0) = z_0 - z_1 exactly, so codes are chosen freely."""
    codes = torch.tensor([0, 5, 5, -3, 64, 1023, -32768, 32767, 40000, -40000])
    logits = torch.stack([codes / 1024, torch.zeros(len(codes))], 1)[:, None]
    state = empty_state(1, 2, 64)
    predictive_update_(state, logits)
    kept = state.tiles.counters[0, : len(codes), 0].view(torch.int16)
    # float32 logits are exact here, saturated at the ends
    assert kept.tolist() == [0, 5, 5, -3, 64, 1023, -32768, 32767, 32767, -32768]
    assert (int(state.tiles.minimum[0]), int(state.tiles.maximum[0])) == (-32768, 32767)

    state = empty_state(1, 2, 64)
    predictive_update_(state, (torch.arange(100) / 1024).reshape(100, 1, 1) * torch.tensor([1.0, 0.0]))
    # codes 0 .. 99 need level 1: two codes to each of 50 slots
    assert state.tiles.counters[0, :, 0].tolist() == [2] * 50 + [0] * 14
    predictive_update_(state, torch.tensor([[[-3 / 1024, 0.0]]]))  # bin -2 is slot 62
    assert state.tiles.counters[0, :, 0].tolist() == [2] * 50 + [0] * 12 + [1, 0]
    predictive_update_(state, torch.tensor([[[200 / 1024, 0.0]]]))  # level 2: bins -1 .. 50
    assert state.tiles.counters[0, :, 0].tolist() == [4] * 25 + [0] * 25 + [1] + [0] * 12 + [1]


@pytest.mark.parametrize("bins", [64, 128])
@pytest.mark.parametrize("draws", [1, 64, 65, 128, 129, 700])
def test_quantiles_agree_with_the_reference(draws: int, bins: int) -> None:
    tiles = filled(13, 7, draws, seed=draws, bins=bins).tiles
    for q in (0.0, 0.025, 1 / 3, 0.5, 0.975, 1.0):
        ours = sketch_quantile(tiles, q)
        with use_backend("reference"):
            oracle = sketch_quantile(tiles, q)
        assert torch.equal(ours.lower, oracle.lower)
        assert torch.equal(ours.upper, oracle.upper)
        torch.testing.assert_close(ours.point, oracle.point, rtol=1e-6, atol=1e-3)
        assert (ours.lower - 0.5 <= ours.point).all() and (ours.point <= ours.upper + 0.5).all()


@pytest.mark.parametrize("draws", [1, 40, 64, 65, 500])
def test_deviance_quantile_agrees_with_the_reference(draws: int) -> None:
    tiles = filled(13, 7, draws, seed=draws).tiles
    for shift in (0.0, 0.25, 0.5, 0.75):
        level = (torch.linspace(0.05, 1, 13, dtype=torch.float64) + shift - 0.05) % 0.95 + 0.05  # another for each row
        ours = sketch_deviance_quantile(tiles, level)
        with use_backend("reference"):
            oracle = sketch_deviance_quantile(tiles, level)
        # the same weighted codes; where the sum meets the level within rounding, the next code (2^-10) is as right
        torch.testing.assert_close(ours, oracle, rtol=1.1e-3, atol=1e-9)
        assert (ours / oracle - 1).abs().median() < 1e-6


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (20, 44), (30, 35), (64, 1), (200, 10), (10, 200), (300, 400)])
def test_merge_agrees_with_the_reference_and_with_one_stream(n: int, m: int) -> None:
    def tiles_of(draws: slice) -> Tiles:
        state = empty_state(11, 9, 64)
        predictive_update_(state, logits[draws])
        return state.tiles

    logits = torch.randn(n + m, 11, 9, generator=torch.Generator().manual_seed(n + 3 * m))
    logits[n:] *= 3
    merged, oracle, whole = tiles_of(slice(n)), tiles_of(slice(n)), tiles_of(slice(n + m))
    other = tiles_of(slice(n, n + m))
    before = [t.clone() for t in other[:4]]
    sketch_merge_(merged, other)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, other[:4], strict=True))
    with use_backend("reference"):
        sketch_merge_(oracle, other)
    for tiles in (merged, oracle, whole):
        sketch_sort_(tiles)
    for tiles in (oracle, whole):
        for r in range(11):
            a, b = Row(merged, r), Row(tiles, r)
            assert a.count == b.count
            assert (
                (a.counters == b.counters).all() and (a.minimum == b.minimum).all() and (a.maximum == b.maximum).all()
            )


def test_merging_whole_tiles_at_one_level_adds() -> None:
    """The plain path: both sides count, at equal levels; 65,535 draws fill a counter exactly."""
    logits = torch.zeros(30000, 32, 2)
    states = [empty_state(32, 2, 64) for _ in range(2)]
    for state in states:
        predictive_update_(state, logits)
    sketch_merge_(states[0].tiles, states[1].tiles)
    assert states[0].tiles.counts.tolist() == [60000] * 32
    assert states[0].tiles.counters[0, 0].tolist() == [60000] * 64
    assert not states[0].tiles.counters[0, 1:].to(torch.int32).any()
    with pytest.raises(ValueError, match="90000 draws in one row: a posterior holds at most 65535"):
        sketch_merge_(states[0].tiles, states[1].tiles)
    predictive_update_(states[0], logits[:5535])
    assert states[0].tiles.counters[0, 0].tolist() == [65535] * 64
    with pytest.raises(ValueError, match="65536 draws"):
        predictive_update_(states[0], logits[:1])
    assert states[0].tiles.counts.tolist() == [65535] * 32


@given(st.integers(0, 2**31), st.integers(1, 300), st.sampled_from([64, 128]))
@settings(max_examples=30, deadline=None)
def test_sorting_makes_permutations_equal(seed: int, draws: int, bins: int) -> None:
    logits = torch.randn(draws, 3, 5, generator=torch.Generator().manual_seed(seed))
    states = []
    for order in (slice(None), torch.randperm(draws, generator=torch.Generator().manual_seed(seed + 1))):
        state = empty_state(3, 5, bins)
        predictive_update_(state, logits[order])
        sketch_sort_(state.tiles)
        states.append(state.tiles)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*(t[:4] for t in states), strict=True)
    )


def test_bad_input() -> None:
    tiles = filled(3, 5, 10, seed=0).tiles
    for q in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"q = .*must be in"):
            sketch_quantile(tiles, q)
    for level in (torch.full((3,), 0.5), torch.full((4,), 0.5, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"level is .*must be torch.float64 \(3,\)"):
            sketch_deviance_quantile(tiles, level)
    with pytest.raises(ValueError, match="other has counters"):
        sketch_merge_(tiles, filled(3, 50, 10, seed=0).tiles)
    with pytest.raises(ValueError, match="row_cells = 4: must be 5"):
        sketch_merge_(tiles, filled(3, 4, 10, seed=0).tiles)
    check_room(torch.tensor([65535], dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="65536 draws"):
        check_room(torch.tensor([65535], dtype=torch.int32), 1)


def test_opcheck() -> None:
    tiles, other = filled(3, 5, 100, seed=0).tiles, filled(3, 5, 20, seed=1).tiles
    ops = torch.ops.bkd_fast
    torch.library.opcheck(ops.sketch_sort_.default, (tiles.counters, tiles.counts, 5))
    torch.library.opcheck(ops.sketch_quantile.default, (*tiles, 0.3))
    torch.library.opcheck(ops.sketch_deviance_quantile.default, (*tiles, torch.full((3,), 0.3).double()))
    torch.library.opcheck(ops.sketch_merge_.default, (*tiles[:4], *other))
