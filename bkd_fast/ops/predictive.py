"""Operation C, the posterior predictive: draws of logits become per-cell moments and histograms and per-row entropies.

For every draw s and row: p_s = softmax(logits_s). Per cell: mean and sum of squared deviations of p (Chan's merge, window
by window) and the histogram of the codes rint(1024 logit(p)), logit(p_c) = z_c - logsumexp of the other classes. Per row:
the sums of the entropies H[p_s] and of the divergences KL(p_s || r), r the mean of the row's first window (frozen), from
which the mutual information follows without cancellation: E KL(p || r) - KL(mean || r), each summed as
r ((1 + x) log(1 + x) - x), x = p / r - 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.registry import find
from bkd_fast.ops.sketch import TILE_CELLS, Tiles, check_room, empty_tiles

MAX_WINDOW = 64  # draws of one kernel call
SMALLEST_REFERENCE = 2.0**-126


class PredictiveState(NamedTuple):
    """What the draws of (rows, classes) cells have become; arrays over cells are padded to whole tiles of 64."""

    tiles: Tiles  # counts of valid draws in tiles.counts
    mean: Tensor  # float32 (tiles * 64,)
    m2: Tensor  # float32 (tiles * 64,)
    reference: Tensor  # float32 (tiles * 64,), at least 2^-126 where the row has draws
    invalid: Tensor  # int32 (rows,): draws excluded
    entropy: Tensor  # float64 (rows,): sum of H[p] in nats
    divergence: Tensor  # float64 (rows,): sum of KL(p || reference)


def empty_state(rows: int, classes: int, bins: int) -> PredictiveState:
    """A state without draws.

    Raises:
        ValueError: fewer than two classes, a negative number of rows, or bins other than 64 and 128.
    """
    if rows < 0:
        raise ValueError(f"num_rows = {rows}: must not be negative")
    if classes < 2:
        raise ValueError(f"num_classes = {classes}: must be at least 2")
    tiles = empty_tiles(rows, classes, bins)
    cells = tiles.counters.shape[0] * TILE_CELLS
    return PredictiveState(
        tiles,
        torch.zeros(cells),
        torch.zeros(cells),
        torch.zeros(cells),
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.float64),
        torch.zeros(rows, dtype=torch.float64),
    )


_LIBRARY = torch.library.Library("bkd_fast", "FRAGMENT")
_LIBRARY.define(
    "predictive_update_(Tensor logits, Tensor rows, Tensor batch, Tensor(a!) counters, Tensor(b!) minimum, "
    "Tensor(c!) maximum, Tensor(d!) counts, Tensor(e!) mean, Tensor(f!) m2, Tensor(g!) reference, Tensor(h!) invalid, "
    "Tensor(i!) entropy, Tensor(j!) divergence) -> ()"
)


@torch.library.impl(_LIBRARY, "predictive_update_", "CompositeExplicitAutograd")
def _update(
    logits: Tensor,
    rows: Tensor,
    batch: Tensor,
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    mean: Tensor,
    m2: Tensor,
    reference: Tensor,
    invalid: Tensor,
    entropy: Tensor,
    divergence: Tensor,
) -> None:
    tiles = Tiles(counters, minimum, maximum, counts, logits.shape[2])
    state = PredictiveState(tiles, mean, m2, reference, invalid, entropy, divergence)
    find("predictive_update_", logits.device)(logits, rows, batch, state)


@torch.library.register_fake("bkd_fast::predictive_update_", lib=_LIBRARY)
def _update_fake(
    logits: Tensor,
    rows: Tensor,
    batch: Tensor,
    counters: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    counts: Tensor,
    mean: Tensor,
    m2: Tensor,
    reference: Tensor,
    invalid: Tensor,
    entropy: Tensor,
    divergence: Tensor,
) -> None:
    return None


def predictive_update_(state: PredictiveState, logits: Tensor, rows: Tensor | None = None) -> None:
    """Add W draws of logits for a batch of rows, in place.

    Args:
        state: of (rows, C) cells.
        logits: float32 (W, B, C). -inf is a masked class (p = 0). A row of a draw that holds NaN or +inf, or nothing
            but -inf, is excluded and counted in `state.invalid`.
        rows: int64 (B,), the row of each batch row, each at most once; None: 0 .. rows-1, and B must be all rows.

    Raises:
        TypeError: dtypes other than these.
        ValueError: shapes that disagree, rows out of range or repeated, more than 65,535 draws in a row. Nothing is
            changed then.
    """
    num_rows, classes = state.tiles.counts.numel(), state.tiles.row_cells
    if logits.dtype != torch.float32:
        raise TypeError(f"logits have dtype {logits.dtype}: must be torch.float32")
    if logits.dim() != 3 or logits.shape[2] != classes:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: must be (draws, rows, {classes})")
    size = logits.shape[1]
    if rows is None:
        if size != num_rows:
            raise ValueError(
                f"logits have {size} rows and rows = None: must be all {num_rows} rows, or rows must name them"
            )
        order = batch = torch.arange(num_rows)
        check_room(state.tiles.counts, logits.shape[0])
    else:
        order, batch = _sorted_rows(rows, size, num_rows)
        check_room(state.tiles.counts[order], logits.shape[0])
    if size == 0:
        return
    logits = logits.detach().contiguous()
    windows = -(-logits.shape[0] // MAX_WINDOW)
    for window in logits.tensor_split(windows) if windows > 1 else [logits] * windows:
        torch.ops.bkd_fast.predictive_update_(
            window, order, batch, *state.tiles[:4], state.mean, state.m2, state.reference, state.invalid, state.entropy,
            state.divergence,
        )  # fmt: skip


def _sorted_rows(rows: Tensor, size: int, num_rows: int) -> tuple[Tensor, Tensor]:
    if rows.dtype != torch.int64:
        raise TypeError(f"rows has dtype {rows.dtype}: must be torch.int64")
    if rows.shape != (size,):
        raise ValueError(f"rows has shape {tuple(rows.shape)}: must be ({size},), one row for each row of logits")
    order, batch = rows.detach().cpu().sort()
    if size == 0:
        return order, batch
    if int(order[0]) < 0 or int(order[-1]) >= num_rows:
        wrong = int(order[0]) if int(order[0]) < 0 else int(order[-1])
        raise ValueError(f"rows holds {wrong}: must be in 0 .. {num_rows - 1}")
    repeated = order[1:][order[1:] == order[:-1]]
    if repeated.numel():
        raise ValueError(f"rows holds {int(repeated[0])} twice: a row may appear once in a call")
    return order, batch
