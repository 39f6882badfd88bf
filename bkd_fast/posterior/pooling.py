"""States of many processes, or of many shards of rows, made one."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bkd_fast.collectives import broadcast_, gather, processes, rank, reduce_max_, reduce_min_, reduce_sum_
from bkd_fast.ops.predictive import SMALLEST_REFERENCE, PredictiveState
from bkd_fast.ops.sketch import TILE_CELLS, Tiles, empty_tiles, level_of, sketch_histogram
from bkd_fast.posterior.chains import BINS, ChainRecord, Piece

CHUNK_CELLS = 2**17  # at a time: float64 arrays of them stay in the cache

Group = dist.ProcessGroup | None


def columns_of(tiles: Tiles, cells: Tensor) -> Tensor:
    """int16 (cells, bins): the slots of some cells, side by side."""
    return tiles.counters.view(torch.int16)[cells // TILE_CELLS, :, cells % TILE_CELLS]


def write_columns_(tiles: Tiles, cells: Tensor, columns: Tensor) -> None:
    """The inverse of `columns_of`."""
    tiles.counters.view(torch.int16)[cells // TILE_CELLS, :, cells % TILE_CELLS] = columns


def cells_of(tiles: Tiles, rows: slice) -> Tensor:
    """int64: the cells of some rows."""
    return torch.arange(rows.start * tiles.row_cells, rows.stop * tiles.row_cells, device=tiles.counts.device)


def chunks(rows: int, row_cells: int) -> list[slice]:
    """All rows, as many at a time as have CHUNK_CELLS cells."""
    step = max(1, CHUNK_CELLS // row_cells)
    return [slice(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


# ---- two states ----


def merge_moments_(mine: PredictiveState, theirs: PredictiveState, keep: bool) -> None:
    """Take the moments, entropies and divergences of another state on the same device; counts stay, for the sketches to pool.

    keep: where both have draws of a row, the divergences are taken from our reference; else from theirs.
    """
    classes = mine.tiles.row_cells
    n, m = mine.tiles.counts.double(), theirs.tiles.counts.double()
    ours = (n > 0) & (keep | (m == 0))
    for rows in chunks(len(n), classes):
        cells = slice(rows.start * classes, rows.stop * classes)
        mean, m2, reference = (array[cells].view(-1, classes) for array in (mine.mean, mine.m2, mine.reference))
        other_mean, other_m2, other = (
            array[cells].view(-1, classes) for array in (theirs.mean, theirs.m2, theirs.reference)
        )
        kept = torch.where(ours[rows, None], reference, other)
        mine.divergence[rows] += torch.where(ours[rows], 0.0, n[rows] * _shift(mean, reference, kept))
        added = torch.where(ours[rows], m[rows] * _shift(other_mean, other, kept), 0.0)
        mine.divergence[rows] += torch.where(m[rows] > 0, theirs.divergence[rows] + added, 0.0)
        reference.copy_(kept)
        # Chan's merge
        share = (m[rows] / (n + m)[rows].clamp_min(1))[:, None]
        difference = other_mean.double() - mean
        m2.add_((difference.square() * (n[rows, None] * share)).add_(other_m2).float())
        mean.add_(difference.mul_(share).float())
    mine.entropy.add_(theirs.entropy)
    mine.invalid.add_(theirs.invalid)


def _shift(mean: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    """What a draw's divergence changes by, on average, with another reference; all (rows, classes), float64 (rows,).

    E KL(p || s) = E KL(p || r) + sum_k mean_k (log r_k - log s_k) - r_k + s_k, exactly.
    """
    old, new = (array.double().clamp_min(SMALLEST_REFERENCE) for array in (reference, target))
    logs = old.log().sub_(new.log())
    return (logs.mul_(mean).sub_(old).add_(new)).sum(1)


# ---- shards of rows ----


def join_tiles(parts: Sequence[Tiles], rows: Sequence[slice]) -> Tiles:
    """These rows of each part, one after the other."""
    first, begin = parts[0], 0
    joined = empty_tiles(_count(rows), first.row_cells, first.counters.shape[1], first.counts.device)
    for part, here in zip(parts, rows, strict=True):
        number, width = here.stop - here.start, part.row_cells
        for chunk in chunks(number, width):
            cells = cells_of(part, chunk)
            write_columns_(joined, cells + begin * width, columns_of(part, cells + here.start * width))
        for mine, theirs in zip(joined[1:3], part[1:3], strict=True):
            mine[begin * width : (begin + number) * width] = theirs[here.start * width : here.stop * width]
        joined.counts[begin : begin + number] = part.counts[here]
        begin += number
    return joined


def join_states_(state: PredictiveState, parts: Sequence[PredictiveState], rows: Sequence[slice]) -> None:
    """Fill the moments of `state` with these rows of each part, one after the other; not its tiles, but their counts."""
    classes, begin = state.tiles.row_cells, 0
    for part, here in zip(parts, rows, strict=True):
        end = begin + here.stop - here.start
        for name in ("mean", "m2", "reference"):
            cells = slice(here.start * classes, here.stop * classes)
            getattr(state, name)[begin * classes : end * classes] = getattr(part, name)[cells]
        for name in ("invalid", "entropy", "divergence"):
            getattr(state, name)[begin:end] = getattr(part, name)[here]
        state.tiles.counts[begin:end] = part.tiles.counts[here]
        begin = end


def join_records(parts: Sequence[ChainRecord], rows: Sequence[slice]) -> ChainRecord:
    """These rows of each part of one piece of a chain, brought to the coarsest segments and batches among the parts."""
    segments, batch = max(part.length for part in parts), max(part.batch for part in parts)
    for part in parts:
        part.coarsen(segments, batch)
    width = max(0 if part.trace is None else part.trace.shape[1] for part in parts)
    pieces = list(zip(parts, rows, strict=True))
    traces = [part.trace[here] for part, here in pieces if part.trace is not None]
    padded = [torch.nn.functional.pad(trace, (0, width - trace.shape[1])) for trace in traces]
    return ChainRecord(
        [join_tiles(same, rows) for same in zip(*(part.segments for part in parts), strict=True)],
        segments,
        torch.cat([part.batches[here] for part, here in pieces]),
        batch,
        torch.cat([part.counts[here] for part, here in pieces]),
        torch.cat([part.total[here] for part, here in pieces]),
        torch.cat([part.squares[here] for part, here in pieces]),
        torch.cat(padded) if len(padded) == len(parts) else None,
    )


def _count(rows: Sequence[slice]) -> int:
    return sum(here.stop - here.start for here in rows)


# ---- processes ----


def pool_tiles_(tiles: Tiles, group: Group) -> None:
    """The codes of all processes, in place on each; counts included. Pooled counts must be below 65,536."""
    pooled = reduce_sum_(tiles.counts.clone(), group)
    before = _draws_before(tiles.counts, group)
    for rows in chunks(tiles.counts.numel(), tiles.row_cells):
        cells = cells_of(tiles, rows)
        least = reduce_min_(tiles.minimum[cells].int(), group)
        most = reduce_max_(tiles.maximum[cells].int(), group)
        keeps = (pooled[rows] <= tiles.counters.shape[1]).repeat_interleave(tiles.row_cells)
        columns = torch.zeros(len(cells), tiles.counters.shape[1], dtype=torch.int32, device=cells.device)
        if not bool(keeps.all()):
            columns = _counters_at(tiles, rows, least, most)
        if bool(keeps.any()):
            columns[keeps] = _shifted_codes(tiles, rows, before[rows])[keeps]
        # two counters to a word: as pooled counts stay below 65,536, none carries into the other
        packed = columns[:, ::2] | columns[:, 1::2] << 16
        reduce_sum_(packed, group)
        columns = torch.stack([packed << 16 >> 16, packed >> 16], 2).flatten(1).to(torch.int16)
        if bool(keeps.any()):
            columns[keeps] = _sorted_codes(columns[keeps], pooled[rows].repeat_interleave(tiles.row_cells)[keeps])
        write_columns_(tiles, cells, columns)
        tiles.minimum[cells] = least.to(torch.int16)
        tiles.maximum[cells] = most.to(torch.int16)
    tiles.counts.copy_(pooled)


def _draws_before(counts: Tensor, group: Group) -> Tensor:
    """How many draws the processes of lower rank hold, row by row."""
    before = torch.zeros_like(counts)
    for source in range(processes(group)):
        theirs = broadcast_(counts.clone(), source, group)
        if source < rank(group):
            before += theirs
    return before


def _counters_at(tiles: Tiles, rows: slice, least: Tensor, most: Tensor) -> Tensor:
    """int32 (cells, bins): own counters at the level of least..most, by slot."""
    shape = (rows.stop - rows.start, tiles.row_cells)
    empty = least > most  # nobody has draws
    low, high = (torch.where(empty, 0, codes).to(torch.int16).view(shape) for codes in (least, most))
    ordered = sketch_histogram(tiles, rows.start, rows.stop, low, high).counts.flatten(0, 1)
    bins = ordered.shape[1]
    first = torch.where(empty, 0, least) >> level_of(torch.where(empty, 0, least), torch.where(empty, 0, most), bins)
    slots = (first[:, None] + torch.arange(bins, device=first.device)) & (bins - 1)
    return torch.zeros_like(ordered).scatter_(1, slots.long(), ordered)


def _shifted_codes(tiles: Tiles, rows: slice, before: Tensor) -> Tensor:
    """int32 (cells, bins): own codes as unsigned numbers, behind those of the processes of lower rank; zeros elsewhere."""
    codes = columns_of(tiles, cells_of(tiles, rows)).int() & 0xFFFF
    bins = codes.shape[1]
    counts = tiles.counts[rows].repeat_interleave(tiles.row_cells)[:, None]
    source = torch.arange(bins, device=codes.device) - before.repeat_interleave(tiles.row_cells)[:, None]
    mine = (source >= 0) & (source < counts)
    return torch.where(mine, codes.gather(1, source.clamp(0, bins - 1).long()), 0)


def _sorted_codes(columns: Tensor, counts: Tensor) -> Tensor:
    """The first counts codes of every column in ascending order, then zeros."""
    kept = torch.arange(columns.shape[1], device=columns.device) < counts[:, None]
    ascending = torch.where(kept, columns.int(), 2**16).sort(1).values
    return torch.where(kept, ascending, 0).to(torch.int16)


def pool_moments_(state: PredictiveState, order: int, group: Group) -> None:
    """Means, squared deviations, entropies and divergences of all processes, in place on each; counts stay each one's own.

    order: this process's place among all, by the least of their streams: where several have draws of a row, the first one's
    reference is kept.
    """
    classes = state.tiles.row_cells
    counts = state.tiles.counts.double()
    pooled = reduce_sum_(counts.clone(), group)
    last = torch.iinfo(torch.int32).max
    holder = torch.where(counts > 0, order, last).int()
    owner = reduce_min_(holder.clone(), group)
    divergence = state.divergence.clone()
    for rows in chunks(len(counts), classes):
        cells = slice(rows.start * classes, rows.stop * classes)
        shape = (rows.stop - rows.start, classes)
        mean = state.mean[cells].view(shape).double()
        share = (counts[rows] / pooled[rows].clamp_min(1))[:, None]
        together = reduce_sum_(mean * share, group)
        m2 = state.m2[cells].view(shape).double() + counts[rows, None] * (mean - together).square()
        reference = state.reference[cells].view(shape).double()
        mine = (owner[rows] == order) & (counts[rows] > 0)
        target = reduce_sum_(torch.where(mine[:, None], reference, 0.0), group)
        shift = _shift(mean, reference, target)
        divergence[rows] += torch.where(counts[rows] > 0, counts[rows] * shift, 0.0)
        state.mean[cells] = together.flatten().float()
        state.m2[cells] = reduce_sum_(m2, group).flatten().float()
        state.reference[cells] = torch.where((pooled[rows] > 0)[:, None], target, 0.0).flatten().float()
    state.divergence.copy_(reduce_sum_(divergence, group))
    reduce_sum_(state.entropy, group)
    reduce_sum_(state.invalid, group)


def pool_chains(
    chains: dict[Piece, ChainRecord], rows: int, device: torch.device, group: Group
) -> dict[Piece, ChainRecord]:
    """Every process's pieces, on each."""
    shapes = {
        piece: (len(r.segments), r.length, r.batch, r.total.shape[1], 0 if r.trace is None else r.trace.shape[1])
        for piece, r in chains.items()
    }
    everybody: dict[Piece, ChainRecord] = {}
    for source, theirs in enumerate(gather(shapes, group)):
        for piece, (segments, length, batch, cells, traced) in theirs.items():
            record = chains.get(piece) if source == rank(group) else None
            if record is None:
                record = ChainRecord.empty(rows, cells, None, False, device)
                record.segments = [empty_tiles(rows, cells, BINS, device) for _ in range(segments)]
                record.length, record.batch = length, batch
                record.trace = torch.zeros(rows, traced, dtype=torch.int16, device=device) if traced else None
            for tensor in record.tensors().values():
                broadcast_(tensor.view(torch.uint8), source, group)
            everybody[piece] = record
    return everybody
