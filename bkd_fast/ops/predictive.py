"""Operation C, the posterior predictive: draws of logits become per-cell moments and histograms and per-row entropies.

For every draw s and row: p_s = softmax(logits_s). Per cell: mean and sum of squared deviations of p (Chan's merge, window
by window) and the histogram of the codes rint(1024 logit(p)), logit(p_c) = z_c - logsumexp of the other classes. Per row:
the sums of the entropies H[p_s] and of the divergences KL(p_s || r), r the mean of the row's first window (frozen), from
which the mutual information follows without cancellation: E KL(p || r) - KL(mean || r), each summed as
r ((1 + x) log(1 + x) - x), x = p / r - 1.

The histogram may be left out; the codes of a few chosen classes of every row can then be had instead, for sketches of those
alone (`bkd_fast.ops.sketch`), in the same pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.registry import find
from bkd_fast.ops.sketch import MAX_COUNT, TILE_CELLS, Tiles, check_room, empty_tiles, tiles_on

MAX_WINDOW = 64  # draws of one kernel call
SMALLEST_REFERENCE = 2.0**-126


class PredictiveState(NamedTuple):
    """What the draws of (rows, classes) cells have become; arrays over cells are padded to whole tiles of 64."""

    tiles: Tiles  # counts of valid draws in tiles.counts; no tiles at all where there is no histogram
    mean: Tensor  # float32 (tiles * 64,)
    m2: Tensor  # float32 (tiles * 64,)
    reference: Tensor  # float32 (tiles * 64,), at least 2^-126 where the row has draws
    invalid: Tensor  # int32 (rows,): draws excluded
    entropy: Tensor  # float64 (rows,): sum of H[p] in nats
    divergence: Tensor  # float64 (rows,): sum of KL(p || reference)


class PickedCodes(NamedTuple):
    """The codes that a window of draws has for the picked classes of the batch's rows."""

    order: Tensor  # int64 (B,): rows of the state, ascending; one that is left out is num_rows
    codes: Tensor  # int16 (W, B, picks)
    valid: Tensor  # bool (W, B): whether the draw of the row counts


def empty_state(
    rows: int, classes: int, bins: int, device: torch.device | None = None, *, histogram: bool = True
) -> PredictiveState:
    """A state without draws, on `device` (None: torch's default), with a histogram of every cell or without any.

    Raises:
        ValueError: fewer than two classes, a negative number of rows, or bins other than 64 and 128.
    """
    if rows < 0:
        raise ValueError(f"num_rows = {rows}: must not be negative")
    if classes < 2:
        raise ValueError(f"num_classes = {classes}: must be at least 2")
    tiles = empty_tiles(rows, classes, bins, device)
    cells = tiles.counters.shape[0] * TILE_CELLS
    if not histogram:
        tiles = empty_tiles(0, classes, bins, device)._replace(counts=tiles.counts)
    return PredictiveState(
        tiles,
        torch.zeros(cells, device=device),
        torch.zeros(cells, device=device),
        torch.zeros(cells, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.float64, device=device),
        torch.zeros(rows, dtype=torch.float64, device=device),
    )


def state_on(state: PredictiveState, device: torch.device) -> PredictiveState:
    """The state on `device`: itself where it is there, else a copy."""
    tiles, mean, m2, reference, *of_rows = state
    of_cells = mean.to(device), m2.to(device), reference.to(device)
    invalid, entropy, divergence = (array.to(device) for array in of_rows)
    return PredictiveState(tiles_on(tiles, device), *of_cells, invalid, entropy, divergence)


class Rows(NamedTuple):
    """The rows of a batch, checked, on the state's device."""

    order: Tensor  # int64 (B,): rows of the state, ascending; one that is left out is num_rows
    batch: Tensor  # int64 (B,): the batch row of each


_LIBRARY = torch.library.Library("bkd_fast", "FRAGMENT")
_LIBRARY.define(
    "predictive_update_(Tensor logits, Tensor rows, Tensor batch, Tensor picked, Tensor(a!) counters, Tensor(b!) minimum, "
    "Tensor(c!) maximum, Tensor(d!) counts, Tensor(e!) mean, Tensor(f!) m2, Tensor(g!) reference, Tensor(h!) invalid, "
    "Tensor(i!) entropy, Tensor(j!) divergence) -> (Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "predictive_update_", "CompositeExplicitAutograd")
def _update(
    logits: Tensor,
    rows: Tensor,
    batch: Tensor,
    picked: Tensor,
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
) -> tuple[Tensor, Tensor]:
    tiles = Tiles(counters, minimum, maximum, counts, logits.shape[2])
    state = PredictiveState(tiles, mean, m2, reference, invalid, entropy, divergence)
    codes, valid = _room_for_codes(logits, rows, picked)
    find("predictive_update_", logits.device)(logits, rows, batch, state, picked, codes, valid)
    return codes, valid


def _room_for_codes(logits: Tensor, rows: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    draws, size, picks = logits.shape[0], rows.numel(), picked.shape[1]
    return (
        torch.empty(draws, size, picks, dtype=torch.int16, device=logits.device),
        torch.empty(draws, size if picks else 0, dtype=torch.bool, device=logits.device),
    )


@torch.library.register_fake("bkd_fast::predictive_update_", lib=_LIBRARY)
def _update_fake(
    logits: Tensor,
    rows: Tensor,
    batch: Tensor,
    picked: Tensor,
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
) -> tuple[Tensor, Tensor]:
    return _room_for_codes(logits, rows, picked)


def predictive_update_(
    state: PredictiveState,
    logits: Tensor,
    rows: Tensor | Rows | None = None,
    *,
    picked: Tensor | None = None,
    most: int | None = None,
) -> PickedCodes:
    """Add W draws of logits for a batch of rows, in place.

    Args:
        state: of (rows, C) cells.
        logits: float32 (W, B, C), on the state's device. -inf is a masked class (p = 0). A row of a draw that holds NaN or
            +inf, or nothing but -inf, is excluded and counted in `state.invalid`.
        rows: int64 (B,), the row of each batch row, each at most once, or what `sorted_rows` made of it; None: 0 .. rows-1, and
            B must be all rows.
        picked: int32 (rows of the state, picks), classes of every row, trusted to be in range. None: none.
        most: no row holds more draws than this; None: looked up, which waits for a GPU.

    Returns:
        PickedCodes of the picked classes.

    Raises:
        TypeError: dtypes other than these.
        ValueError: shapes or devices that disagree, rows out of range or repeated, more than 65,535 draws in a row. Nothing is
            changed then.
    """
    num_rows, classes, device = state.tiles.counts.numel(), state.tiles.row_cells, state.mean.device
    if logits.dtype != torch.float32:
        raise TypeError(f"logits have dtype {logits.dtype}: must be torch.float32")
    if logits.dim() != 3 or logits.shape[2] != classes:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: must be (draws, rows, {classes})")
    if logits.device != device:
        raise ValueError(f"logits are on {logits.device}: must be on {device}, where the state is")
    if picked is None:
        picked = torch.empty(num_rows, 0, dtype=torch.int32, device=device)
    elif picked.dtype != torch.int32 or picked.dim() != 2 or len(picked) != num_rows or picked.device != device:
        raise ValueError(
            f"picked is {picked.dtype} {tuple(picked.shape)} on {picked.device}: must be torch.int32 ({num_rows}, picks) "
            f"on {device}"
        )
    draws, size = logits.shape[:2]
    if rows is None:
        if size != num_rows:
            raise ValueError(
                f"logits have {size} rows and rows = None: must be all {num_rows} rows, or rows must name them"
            )
        every = torch.arange(num_rows, device=device)
        order, batch = every, every
    else:
        order, batch = rows if isinstance(rows, Rows) else sorted_rows(rows, size, num_rows, device)
    if most is None or most + draws > MAX_COUNT:
        check_room(state.tiles.counts if rows is None else state.tiles.counts[order[order < num_rows]], draws)
    logits, picked = logits.detach().contiguous(), picked.contiguous()
    if size == 0 or draws == 0:
        return PickedCodes(order, *_room_for_codes(logits, order, picked))
    found = [
        torch.ops.bkd_fast.predictive_update_(
            window, order, batch, picked, *state.tiles[:4], state.mean, state.m2, state.reference, state.invalid,
            state.entropy, state.divergence,
        )
        for window in logits.tensor_split(-(-draws // MAX_WINDOW))
    ]  # fmt: skip
    codes, valid = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    return PickedCodes(order, codes, valid)


def sorted_rows(rows: Tensor, size: int, num_rows: int, device: torch.device, faults: Tensor | None = None) -> Rows:
    """Check the row ids of a batch of `size` rows, and sort them.

    Args:
        rows: int64 (size,).
        device: the state's.
        faults: int64 (2,) on that device, where faults are recorded instead of raised if the rows are on a GPU, so that nothing
            waits for it: how many ids were left out because they are out of range or repeated (every copy), and one of them.
            None: they are looked at on the host.

    Raises:
        TypeError: another dtype.
        ValueError: another shape; ids out of range or repeated, where they are not recorded.
    """
    if rows.dtype != torch.int64:
        raise TypeError(f"rows has dtype {rows.dtype}: must be torch.int64")
    if rows.shape != (size,):
        raise ValueError(f"rows has shape {tuple(rows.shape)}: must be ({size},), one row for each row of logits")
    rows = rows.detach()
    if faults is not None and rows.device.type != "cpu" and device.type != "cpu" and size:
        return recorded_rows(rows.to(device), num_rows, faults)
    order, batch = rows.cpu().sort()
    if size:
        if int(order[0]) < 0 or int(order[-1]) >= num_rows:
            wrong = int(order[0]) if int(order[0]) < 0 else int(order[-1])
            raise ValueError(f"rows holds {wrong}: must be in 0 .. {num_rows - 1}")
        repeated = order[1:][order[1:] == order[:-1]]
        if repeated.numel():
            raise ValueError(f"rows holds {int(repeated[0])} twice: a row may appear once in a call")
    if device.type == "cpu":
        return Rows(order, batch)
    # from pinned memory, so that the host does not wait for the copy
    return Rows(*(ids.pin_memory().to(device, non_blocking=True) for ids in (order, batch)))


def recorded_rows(rows: Tensor, num_rows: int, faults: Tensor) -> Rows:
    """`sorted_rows` without looking: ids that are out of range or repeated are left out and recorded in `faults`."""
    order, batch = rows.sort()
    wrong = (order < 0) | (order >= num_rows)
    same = order[1:] == order[:-1]
    wrong[1:] |= same
    wrong[:-1] |= same
    found = torch.stack([faults[0] + wrong.sum(), order.gather(0, wrong.int().argmax(0, keepdim=True))[0]])
    faults.copy_(torch.where(wrong.any(), found, faults))
    order, again = order.masked_fill(wrong, num_rows).sort()
    return Rows(order, batch.gather(0, again))
