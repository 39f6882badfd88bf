"""What cells of codes say about probabilities: certified bounds, tails, shortest intervals. A code is 1024 logit(p), rounded."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bkd_fast.ops.sketch import CODE_MAX, CODE_MIN, CODES_PER_UNIT, CodeQuantile, Histogram, Tiles, sketch_histogram

SLACK = 1.5  # codes are rounded by half a code, and computed in float32 to less than one
CHUNK_BYTES = 2**25  # of plain histograms at a time


def probability_of(codes: Tensor) -> Tensor:
    """float32 p of codes, which need not be whole."""
    return (codes.double() / CODES_PER_UNIT).sigmoid().float()


def code_of(p: Tensor) -> Tensor:
    """float64 code of p, not rounded: infinite at 0 and 1."""
    return torch.logit(p.double()) * CODES_PER_UNIT


def point_of(found: CodeQuantile) -> Tensor:
    """The interpolated order statistic: 0 where the class is masked, NaN without draws."""
    p = probability_of(found.point)
    masked: Tensor = (found.upper == CODE_MIN) & ~p.isnan()
    return p.masked_fill(masked, 0)


def bounds_of(found: CodeQuantile) -> tuple[Tensor, Tensor]:
    """(lower, upper), which certainly hold the order statistic; 0 and 1 where it is beyond the codes' range."""
    empty = found.point.isnan()
    lower = probability_of(found.lower - SLACK)
    upper = probability_of(found.upper + SLACK)
    # rounded outwards
    lower = torch.nextafter(lower, torch.zeros_like(lower)).masked_fill(found.lower == CODE_MIN, 0)
    upper = torch.nextafter(upper, torch.ones_like(upper)).masked_fill(found.upper == CODE_MAX, 1)
    return lower.masked_fill(empty, torch.nan), upper.masked_fill(empty, torch.nan)


def histograms(tiles: Tiles) -> Iterator[tuple[slice, Histogram]]:
    """The plain histograms of all rows, a few at a time."""
    rows = tiles.counts.numel()
    step = max(1, CHUNK_BYTES // (4 * tiles.counters.shape[1] * tiles.row_cells))
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        yield slice(begin, end), sketch_histogram(tiles, begin, end)


def tails_of(tiles: Tiles, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of the draws with p > threshold, float32 (rows, row_cells): certainly at least, about, certainly at most.

    threshold: float64, like the result. NaN without draws.
    """
    lower, about, upper = (torch.empty_like(threshold, dtype=torch.float32) for _ in range(3))
    for rows, histogram in histograms(tiles):
        code = code_of(threshold[rows])[..., None]
        draws = tiles.counts[rows].double()[:, None]
        first, last = histogram.first.double(), histogram.last.double()
        inside = ((last + 0.5 - code) / (last - first + 1)).clamp(0, 1).masked_fill(histogram.last == CODE_MIN, 0)
        # codes at the ends of the scale stand for everything beyond
        surely = first.masked_fill(histogram.first == CODE_MIN, -torch.inf) - SLACK > code
        possibly = last.masked_fill(histogram.last == CODE_MAX, torch.inf) + SLACK > code
        for out, weight in ((lower, surely), (about, inside), (upper, possibly)):
            out[rows] = ((histogram.counts * weight).sum(-1) / draws).float()
    return lower, about, upper


def shortest_of(tiles: Tiles, level: float) -> tuple[Tensor, Tensor]:
    """(lower, upper), float32 (rows, row_cells): the shortest interval of p that holds `level` of the draws; NaN without draws.

    The draws of a bin are taken as evenly spread over it; of the intervals that start or end at a bin's edge the shortest is
    taken.
    """
    shape = (tiles.counts.numel(), tiles.row_cells)
    lower, upper = (torch.empty(shape, device=tiles.counts.device) for _ in range(2))
    for rows, histogram in histograms(tiles):
        lower[rows], upper[rows] = _shortest(histogram, level)
    lower.masked_fill_(tiles.maximum[: lower.numel()].view(shape) == CODE_MIN, 0)  # masked classes
    empty = (tiles.counts == 0)[:, None]
    return lower.masked_fill_(empty, torch.nan), upper.masked_fill_(empty, torch.nan)


def _shortest(histogram: Histogram, level: float) -> tuple[Tensor, Tensor]:
    cells = histogram.counts.shape[:2]
    through = histogram.counts.double().cumsum(-1)
    through = torch.cat([torch.zeros(*cells, 1, device=through.device), through], -1)  # draws below every edge
    edge = torch.cat([histogram.first[..., :1] - 0.5, histogram.last + 0.5], -1).double()
    edge = edge.cummax(-1).values  # what lies beyond the largest code holds nothing
    mass = level * through[..., -1:]

    def code_at(draws: Tensor) -> Tensor:
        """Where so many draws lie below."""
        after = torch.searchsorted(through, draws).clamp(1, through.shape[-1] - 1)
        low, high = through.gather(-1, after - 1), through.gather(-1, after)
        share = ((draws - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        return edge.gather(-1, after - 1) + share * (edge.gather(-1, after) - edge.gather(-1, after - 1))

    from_edges = through.clamp(max=through[..., -1:] - mass)
    to_edges = through.clamp(min=mass)
    starts = torch.cat([code_at(from_edges), code_at(to_edges - mass)], -1)
    ends = torch.cat([code_at(from_edges + mass), code_at(to_edges)], -1)
    low, high = probability_of(starts), probability_of(ends)
    best = (high - low).argmin(-1, keepdim=True)
    return low.gather(-1, best)[..., 0], high.gather(-1, best)[..., 0]
