"""States of the posterior predictive for the tests of its kernels: logits with everything in them, and how to compare states."""

import torch
from torch import Tensor

from bkd_fast.ops.predictive import PredictiveState, empty_state, predictive_update_
from bkd_fast.ops.sketch import CODE_MAX, CODE_MIN, Tiles


def logits_of(draws: int, rows: int, classes: int, seed: int, invalid: bool = True) -> Tensor:
    """Masked classes, ties, a spread that grows (so that levels rise), and rows of every kind of fault."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(rows, classes, generator=generator) + torch.randn(draws, rows, classes, generator=generator)
    z[draws // 2 :] *= 4
    z[:, 1, 0] = -torch.inf
    z[0, 2, :2] = 20.0
    z[-1, :, -1] += 25
    if invalid:
        z[0, 0, 1] = torch.nan
        z[draws // 2, rows // 2, 0] = torch.inf
        z[draws // 3, rows - 1] = -torch.inf
        z[-1, 2, 1].view(torch.int32).fill_(0x7FC00001)  # a NaN with a payload
    return z


def copied(state: PredictiveState, device: str = "cpu") -> PredictiveState:
    """A copy on `device`."""
    tiles, *others = state
    *arrays, row_cells = tiles

    def copy(array: Tensor) -> Tensor:
        return array.to(device, copy=True)

    return PredictiveState(Tiles(*map(copy, arrays), row_cells), *map(copy, others))


def arrays_of(state: PredictiveState) -> dict[str, Tensor]:
    """Every array, without the padding; counters as (cells, bins)."""
    cells = state.tiles.counts.numel() * state.tiles.row_cells
    named = {**state.tiles._asdict(), **state._asdict()}
    arrays = {name: array for name, array in named.items() if isinstance(array, Tensor)}
    counters = arrays.pop("counters").to(torch.int32).transpose(1, 2).reshape(-1, state.tiles.counters.shape[1])
    padded = state.mean.numel()
    return {"counters": counters[:cells], **{n: a[:cells] if a.numel() == padded else a for n, a in arrays.items()}}


def assert_same_bits(a: PredictiveState, b: PredictiveState) -> None:
    for (name, x), y in zip(arrays_of(a).items(), arrays_of(b).values(), strict=True):
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)), name


def assert_same_tiles(a: Tiles, b: Tiles) -> None:
    """Bit for bit, without the padding."""
    cells = a.counts.numel() * a.row_cells
    columns = [t.counters.view(torch.int16).transpose(1, 2).reshape(-1, t.counters.shape[1])[:cells] for t in (a, b)]
    assert torch.equal(*columns)
    for x, y in zip(a[1:3], b[1:3], strict=True):
        assert torch.equal(x[:cells], y[:cells])
    assert torch.equal(a.counts, b.counts)


def assert_padding_is_empty(tiles: Tiles, *moments: Tensor) -> None:
    """The cells that fill up the last tile are those of no row, whatever else was in the batch."""
    cells = tiles.counts.numel() * tiles.row_cells
    columns = tiles.counters.view(torch.int16).transpose(1, 2).reshape(-1, tiles.counters.shape[1])[cells:]
    assert len(columns) and not columns.any()
    assert (tiles.minimum[cells:] == CODE_MAX).all() and (tiles.maximum[cells:] == CODE_MIN).all()
    assert not any(moment[cells:].any() for moment in moments)


def assert_moments_close(ours: PredictiveState, theirs: PredictiveState) -> None:
    """Counts equal, moments, entropies and divergences but for sums in another order."""
    a, b = arrays_of(ours), arrays_of(theirs)
    for name in ("counts", "invalid"):
        assert torch.equal(a[name], b[name]), name
    for name, tolerance in (("mean", 2e-6), ("m2", 1e-5), ("entropy", 1e-6), ("divergence", 1e-5), ("reference", 2e-6)):
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=1e-8, msg=name)


def assert_close(ours: PredictiveState, theirs: PredictiveState) -> None:
    """Equal but for sums in another order: a code may differ by one, a float by rounding."""
    assert_moments_close(ours, theirs)
    a, b = arrays_of(ours), arrays_of(theirs)
    for name in ("minimum", "maximum"):
        assert (a[name].int() - b[name].int()).abs().max() <= 1, name
    bins = ours.tiles.counters.shape[1]
    kept = (ours.tiles.counts <= bins).repeat_interleave(ours.tiles.row_cells)
    if kept.any():
        codes = [x["counters"][kept].to(torch.int16).int() for x in (a, b)]
        assert (codes[0] - codes[1]).abs().max() <= 1
    same = ~kept & (a["minimum"] == b["minimum"]) & (a["maximum"] == b["maximum"])
    assert same.sum() >= 0.9 * (~kept).sum()
    counters = [x["counters"][same] for x in (a, b)]
    assert torch.equal(counters[0].sum(1), counters[1].sum(1))
    assert (counters[0] - counters[1]).abs().sum() <= 2e-3 * counters[0].sum()


def filled_unequally(rows: int, classes: int, bins: int, counts: list[int]) -> PredictiveState:
    """A state whose row r holds counts[r] draws, by the compiled CPU kernels."""
    state = empty_state(rows, classes, bins)
    logits = logits_of(max(counts), rows, classes, seed=bins, invalid=False)
    for r, count in enumerate(counts):
        predictive_update_(state, logits[:count, r : r + 1], torch.tensor([r]))
    return state
