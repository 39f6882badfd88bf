"""Whether the chains agree, and what their draws are worth, at the diagnostic cells of a posterior predictive."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from bkd_fast.ops.sketch import CODES_PER_UNIT, Tiles, sketch_histogram, sketch_merge_, sketch_quantile
from bkd_fast.posterior.chains import ChainRecord, Piece, copied
from bkd_fast.posterior.convergence import (
    batch_means_ess,
    between_chain_ess,
    nested_rhat,
    quantile_mcse_levels,
    rank_rhat,
    trace_ess,
)
from bkd_fast.posterior.probabilities import histograms, probability_of

LIMIT = 1.01  # of R-hat, Vehtari et al. (2021)
LEAST_BATCHES = 16  # of the shorter batches: four of the longer ones
ROWS_AT_ONCE = 2**12


class Traces(NamedTuple):
    """Every draw of the first diagnostic class of each row that all draws count for."""

    codes: Tensor  # int16 (chains, draws, rows): 1024 logit(p); the shortest chain's length
    rows: Tensor  # int64 (rows,)


@dataclass(frozen=True)
class Diagnostics:
    """Convergence of each diagnostic cell's logit(p), in function space; (N, d) float64 unless said otherwise.

    A chain here is a run of draws of one stream (run, chain), or of one cycle of its schedule. Figures are NaN where a row lacks
    draws, or where nothing varies.

    Attributes:
        classes: int64 (N, d): the label, where labels are known, and the most probable class (other than the label).
        records: what is kept of every chain.
    """

    classes: Tensor
    records: Mapping[Piece, ChainRecord]

    @property
    def chains(self) -> list[Piece]:
        """Where each chain's draws come from."""
        return sorted(self.records)

    @property
    def _sorted(self) -> list[ChainRecord]:
        return [self.records[piece] for piece in self.chains]

    @property
    def draws(self) -> int:
        """Of all chains, in the row that has most."""
        return int(torch.stack([record.counts for record in self._sorted]).sum(0).max())

    @cached_property
    def rhat(self) -> Tensor:
        """Rank-normalised split R-hat of all chains, from histograms of 128 bins.

        Within about 2e-3 of the draws' own (ArviZ's) where that is below 1.06 and the tails are not heavy (`rank_rhat` has the
        figures). A chain whose number of draws was not announced is split at the power of two nearest its middle.
        """
        halves = [half for record in self._sorted for half in record.halves()]
        least = torch.stack([half.minimum for half in halves]).amin(0)
        most = torch.stack([half.maximum for half in halves]).amax(0)
        rows, cells = self.classes.shape
        out = torch.empty(rows, cells, dtype=torch.float64, device=self.classes.device)
        for begin in range(0, rows, ROWS_AT_ONCE):
            end = min(rows, begin + ROWS_AT_ONCE)
            place = slice(begin * cells, end * cells)
            extremes = [codes[place].view(end - begin, cells) for codes in (least, most)]
            found = [sketch_histogram(half, begin, end, *extremes) for half in halves]
            counts = torch.stack([histogram.counts.flatten(0, 1) for histogram in found], 1)
            first, last = found[0].first.flatten(0, 1).double(), found[0].last.flatten(0, 1).double()
            edges = torch.cat([first[:, :1] - 0.5, last + 0.5], 1).cummax(1).values
            out[begin:end] = rank_rhat(edges, counts).view(end - begin, cells)
        return out

    def nested_rhat(self, superchains: Tensor | None = None) -> Tensor:
        """Nested R-hat (Margossian et al., 2024), for many short chains.

        Args:
            superchains: int64, for each of `chains` the group that began at one point; None: each chain is its own.

        Raises:
            ValueError: another number of chains, fewer than two groups, or groups of unequal sizes.
        """
        means, variances = self._moments()
        groups = torch.arange(len(means)) if superchains is None else superchains
        if groups.shape != (len(means),):
            raise ValueError(
                f"superchains has shape {tuple(groups.shape)}: must be ({len(means)},), a group for each chain"
            )
        return nested_rhat(means, variances, groups.to(means.device)).view(self.classes.shape)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """(chains, cells): means and variances (n - 1) of logits, exact: sums of integers."""
        means, variances = [], []
        for record in self._sorted:
            n = record.counts.double()[:, None]
            mean = record.total.double() / n
            # n times the sum of squared deviations, in integers
            spread = record.counts[:, None] * record.squares - record.total.square()
            means.append((mean / CODES_PER_UNIT).flatten())
            variances.append((spread.double() / (n * (n - 1)) / CODES_PER_UNIT**2).flatten())
        return torch.stack(means), torch.stack(variances)

    @cached_property
    def batch_ess(self) -> tuple[Tensor, Tensor]:
        """Effective draws of the mean by batch means of two lengths: 32 to 64 batches of each chain, and four times longer ones.

        Where the second is much smaller, the chain remembers longer than a batch. Rows with fewer draws than others get NaN.
        """
        found = [torch.zeros(self.classes.shape, dtype=torch.float64, device=self.classes.device) for _ in range(2)]
        _, variances = self._moments()
        for record, variance in zip(self._sorted, variances, strict=True):
            most = int(record.counts.max())
            full = most // record.batch
            if full < LEAST_BATCHES:
                return tuple(torch.full_like(ess, torch.nan) for ess in found)  # type: ignore[return-value]
            sums = record.batches[..., :full].flatten(0, 1)[None].double() / CODES_PER_UNIT
            for total, ess in zip(found, batch_means_ess(sums, record.batch, variance[None]), strict=True):
                short = (record.counts // record.batch < full)[:, None]
                total += ess.view(self.classes.shape).masked_fill(short, torch.nan)
        return found[0], found[1]

    @cached_property
    def between_chain_ess(self) -> Tensor | None:
        """Effective draws of the mean from the variance between chains; None for one chain. Its relative standard error is
        sqrt(2 / (chains - 1)), so that medians over cells tell more than single ones.
        """
        if len(self.records) < 2:
            return None
        means, variances = self._moments()
        draws = int(torch.stack([record.counts for record in self._sorted]).double().mean(0).max())
        return between_chain_ess(means, variances, draws).view(self.classes.shape)

    @property
    def ess(self) -> Tensor:
        """Effective draws of the mean: the least of the batch means' two, and of that between chains where there are four."""
        ess = torch.minimum(*self.batch_ess)
        between = self.between_chain_ess
        if between is not None and len(self.records) >= 4:
            ess = torch.where(ess.isnan(), between, torch.minimum(ess, between))
        return ess

    @property
    def traces(self) -> Traces | None:
        """The draws of the first diagnostic class; None where they are not kept."""
        traces = [record.trace for record in self._sorted]
        kept = [trace for trace in traces if trace is not None]
        if len(kept) < len(traces):
            return None
        counts = torch.stack([record.counts for record in self._sorted])
        longest = counts.amax(1)
        rows = (counts == longest[:, None]).all(0).nonzero()[:, 0]
        shortest = int(longest.min())
        return Traces(torch.stack([trace[rows, :shortest].T for trace in kept]), rows)

    @property
    def trace_ess(self) -> Tensor | None:
        """(N,) effective draws of the mean from the kept traces, as ArviZ's ess(method="mean"); None where none are kept."""
        traces = self.traces
        if traces is None:
            return None
        out = torch.full((len(self.classes),), torch.nan, dtype=torch.float64, device=self.classes.device)
        if traces.codes.shape[1] >= 4 and len(traces.rows):
            out[traces.rows] = trace_ess(traces.codes)
        return out

    @cached_property
    def _pooled(self) -> Tiles:
        """The histograms of all chains together."""
        segments = [segment for record in self._sorted for segment in record.segments]
        pooled = copied(segments[0], self.classes.device)
        for segment in segments[1:]:
            sketch_merge_(pooled, segment)
        return pooled

    def quantile_mcse(self, q: float) -> Tensor:
        """The Monte Carlo standard error of the q quantile of p: half the distance of two quantiles of beta-distributed ranks at
        `ess` (Vehtari et al., 2021), read off the histogram.

        Raises:
            ValueError: q is not in [0, 1]. ImportError: SciPy is not installed.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q = {q!r}: must be in [0, 1]")
        low, high = quantile_mcse_levels(q, self.ess)
        ends = quantiles_at(self._pooled, torch.stack([low, high]))
        return (ends[1] - ends[0]).double() / 2

    def certified_width(self, q: float) -> Tensor:
        """How far apart the bounds are that certainly hold the q quantile of p.

        Raises:
            ValueError: q is not in [0, 1].
        """
        found = sketch_quantile(self._pooled, q)
        return (
            (probability_of(found.upper + 0.5) - probability_of(found.lower - 0.5))
            .double()
            .masked_fill(found.point.isnan(), torch.nan)
        )

    @property
    def limit(self) -> float:
        """R-hat above which a cell has not converged: 1.01."""
        return LIMIT

    @property
    def unconverged(self) -> float:
        """The share of cells whose R-hat is above `limit`, among those that have one."""
        known = self.rhat[~self.rhat.isnan()]
        return float((known > LIMIT).double().mean()) if known.numel() else float("nan")

    def sentence(self) -> str:
        """The figures in one line."""
        rhat, ess = self.rhat, self.ess
        if not (~rhat.isnan()).any():
            return f"{len(self.records)} chains, {self.draws:,} draws: too few for R-hat"
        return (
            f"{len(self.records)} chain{'s' * (len(self.records) > 1)}, {self.draws:,} draws: median R-hat "
            f"{float(rhat.nanmedian()):.4f}, {100 * self.unconverged:.1f} % of the cells above {LIMIT:g}; median ESS "
            f"{float(ess.nanmedian()):.0f}"
        )


def quantiles_at(tiles: Tiles, levels: Tensor) -> Tensor:
    """float32, like levels (k, rows, row_cells): quantiles of p, each cell at levels of its own; draws evenly spread in bins."""
    out = torch.empty_like(levels, dtype=torch.float32)
    for rows, histogram in histograms(tiles):
        counts = histogram.counts.double()
        through = counts.cumsum(-1)
        asked = (levels[:, rows] * through[..., -1]).movedim(0, -1).contiguous()
        at = torch.searchsorted(through, asked).clamp(max=counts.shape[-1] - 1)
        first, last = (codes.double().gather(-1, at) for codes in (histogram.first, histogram.last))
        inside = (asked - (through - counts).gather(-1, at)) / counts.gather(-1, at).clamp_min(1)
        codes = first - 0.5 + inside.clamp(0, 1) * (last - first + 1)
        out[:, rows] = probability_of(codes).movedim(-1, 0)
    return out
